"""Render chat templates as transformers does, in Jinja's sandbox and with limits on time and size.

A template comes with a model, so it is an untrusted program. It gets only plain JSON values, cannot
reach Python's internals, and is stopped if it writes or computes too much. Templates can use the
helpers of `transformers.utils.chat_template_utils`: `raise_exception`, `strftime_now`, `tojson`,
`dict`, `namespace`, loop controls, and `generation` blocks around text that the model writes.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from consyn_jax.errors import UserError, brief

# The date in all renderings, so that the same rows give the same tokens on any day. It is the
# default date of Llama 3.2's template. transformers and TRL use the current date instead.
RENDERED_DAY = datetime.datetime(2024, 7, 26)
LONGEST_TEXT = 16 << 20  # characters of a rendered conversation
LONGEST_S = 20.0
MOST_ITERATIONS = 1_000_000  # in all `range` loops of one rendering together


class TemplateFault(Exception):
    """The template refuses a conversation, fails, or exceeds a limit."""


def writes_date(source: str) -> bool:
    """Whether a template writes the date; every template gets the fixed date `RENDERED_DAY`."""
    return "strftime_now" in source


class Rendered(NamedTuple):
    """A rendered conversation.

    Attributes:
        blocks: (start, end) in characters of each `generation` block.
    """

    text: str
    blocks: list[tuple[int, int]]


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja template.
        variables: values for every rendering, in addition to the conversation, such as `bos_token`.

    Raises:
        UserError: the text is not Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None) -> None:
        self.source, self.variables = source, dict(variables or {})
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            line = getattr(error, "lineno", 0)
            raise UserError(
                f"The chat template is not valid Jinja: {brief(error)} (line {line}). Give "
                "another template with --chat_template FILE, or use --chat_template plain."
            ) from error

    @property
    def has_marks(self) -> bool:
        """Whether the template has `generation` blocks around the model's text."""
        return self._environment.has_marks

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None = None,
        generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Render a conversation.

        Args:
            messages: plain JSON values, without nulls.
            generation_prompt: whether to end with the prompt for the model's answer.
            variables: further values for this rendering, which override `self.variables`.

        Raises:
            TemplateFault: the template refuses the conversation, fails, or exceeds a limit.
        """
        values = {**self.variables, **(variables or {})}
        values |= {"tools": tools, "documents": values.get("documents")}
        values |= {
            "messages": _with_reasoning(messages),
            "add_generation_prompt": generation_prompt,
        }
        pieces: list[str] = []
        try:
            with self._environment.counting() as count:
                for piece in self._template.generate(**values):
                    pieces.append(piece)
                    count.wrote(len(piece))
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise TemplateFault(brief(error)) from error
        except (ArithmeticError, RecursionError, MemoryError) as error:
            raise TemplateFault(brief(error)) from error
        return Rendered("".join(pieces), count.blocks)


def _with_reasoning(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copy each message's reasoning to all keys under which templates look for it."""
    names = ("reasoning_content", "thinking", "reasoning")
    found = []
    for message in messages:
        reasoning = next((message[name] for name in names if message.get(name) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        found.append(message)
    return found


# ------------------------------------------------------------------------------------- environment


class _Count:
    """Counters of one rendering: length of the text, loop iterations, and generation blocks."""

    def __init__(self) -> None:
        self.written, self.iterations, self.blocks = 0, 0, list[tuple[int, int]]()
        self._deadline = time.monotonic() + LONGEST_S

    def wrote(self, length: int) -> None:
        self.written += length
        if self.written > LONGEST_TEXT:
            raise TemplateFault(f"it writes more than {LONGEST_TEXT >> 20} million characters")
        self.check_time()

    def check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise TemplateFault(f"it takes longer than {LONGEST_S:.0f} seconds")


class _Code(CodeGenerator):
    """Compiles `a ~ b` to a call of `_Environment.joined`, which limits the length."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Generation(jinja2.ext.Extension):
    """Jinja extension for `{% generation %}...{% endgeneration %}` around the model's own text."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's attribute)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.environment.has_marks = True  # type: ignore[attr-defined]
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text = str(caller())
        self.environment.mark(len(text))  # type: ignore[attr-defined]
        return text


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with transformers' helpers and with limits."""

    code_generator_class = _Code
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        self.has_marks = False
        self._count: _Count | None = None
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        self.filters["tojson"] = _tojson
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": RENDERED_DAY.strftime,
            "range": self._range,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        del self.globals["lipsum"]

    @contextmanager
    def counting(self) -> Iterator[_Count]:
        """Count the work of one rendering inside a `with` block."""
        self._count = _Count()
        try:
            yield self._count
        finally:
            self._count = None

    def mark(self, length: int) -> None:
        """Record that the next `length` characters of the rendered text are a generation block."""
        if self._count is not None:
            self._count.blocks.append((self._count.written, self._count.written + length))

    def joined(self, parts: tuple[Any, ...]) -> str:
        """Return the text of `a ~ b ~ c`, within the length limit."""
        texts = [str(part) for part in parts]
        self._check_length(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Run a binary operation, and refuse a result that is too large."""
        if operator == "*":
            sizes = [
                (len(a), b)
                for a, b in ((left, right), (right, left))
                if isinstance(a, str | list | tuple) and isinstance(b, int)
            ]
            self._check_length(max((size * times for size, times in sizes), default=0))
        if operator == "**" and not (abs(left) <= 1 << 32 and abs(right) <= 64):
            raise TemplateFault("it computes a number that is too large")
        if operator == "%" and isinstance(left, str) and any(c.isdigit() for c in left):
            raise TemplateFault("it formats text with a width, which could exceed the length limit")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str | list | tuple):
            self._check_length(len(result))
        return result

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call a function, unless the time limit is exceeded."""
        if self._count is not None:
            self._count.check_time()
        return super().call(*args, **kwargs)

    def _check_length(self, length: int) -> None:
        if length > LONGEST_TEXT:
            raise TemplateFault(f"it builds a text of over {LONGEST_TEXT >> 20} million characters")

    def _range(self, *args: int) -> range:
        numbers = range(*args)
        if self._count is not None:
            self._count.iterations += len(numbers)
            if self._count.iterations > MOST_ITERATIONS:
                raise TemplateFault(f"it loops more than {MOST_ITERATIONS:,} times")
            self._count.check_time()
        return numbers


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Encode a value as JSON, without Jinja's escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Dict:
    """A function for `dict(...)`; the class `dict` would give access to Python's internals."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """Do the same as `dict.fromkeys`."""
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """Jinja's `namespace(...)`, but without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may name an attribute `self`
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"{name!r} is not allowed as the name of an attribute"
        )
