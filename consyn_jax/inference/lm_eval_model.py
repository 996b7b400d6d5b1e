"""`lm_eval --model consyn`: run the tasks of lm-evaluation-harness on any model of this package.

`ConsynLM` is the class behind the entry point `lm_eval.models`. It reproduces the numbers of
lm_eval's own `hf` model (0.4.13, lm_eval/models/huggingface.py): the same tokens, with special
tokens recognised in text; the same windows; contexts truncated on the left in the same way;
generated tokens decoded without their prompt.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from consyn_jax.errors import UserError, listed
from consyn_jax.inference.model_source import find_source
from consyn_jax.inference.scoring.evaluate_models import evaluation_tokenizer
from consyn_jax.inference.scoring.ready_scorer import load_scorer
from consyn_jax.inference.text_generation.generation_options import GenerateModelOptions
from consyn_jax.inference.text_generation.prompts import GivenPrompt, PromptEncoder
from consyn_jax.inference.text_generation.ready_model import Runtime, load_runtime
from consyn_jax.model.generation.draws import Sampling
from consyn_jax.model.generation.engine import Request
from consyn_jax.scoring.request_tokens import encode_pair
from consyn_jax.scoring.scorer import Scorer, Wanted

if TYPE_CHECKING:
    ConsynLM: type

MAX_TOKENS = 256  # of generated text, if the task sets no limit; as in lm_eval
STOP_STEPS = 16  # tokens between two checks for a stop string
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DRAWS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
ARGUMENTS = "pretrained, step, tokenizer, dtype, mesh"
log = logging.getLogger(__name__)


class HarnessModel:
    """Implements lm_eval's model interface with the scorer and the generation engine.

    Args:
        pretrained: The model: a directory, a run, a checkpoint, or a hub id.
        step, tokenizer, dtype, mesh: Values of the `consyn-evaluate` flags with these names.
        batch_size: Sequences in a batch; "auto" means 8.
        more: Other settings from lm_eval's command line.

    Raises:
        UserError: The model cannot be used, or an argument is unknown.
    """

    def __init__(
        self,
        pretrained: str = "",
        step: int | None = None,
        tokenizer: str | None = None,
        dtype: str = "auto",
        mesh: str = "auto",
        batch_size: int | str = 8,
        **more: Any,
    ) -> None:
        super().__init__()
        unknown = [name for name in more if name not in ("device", "max_batch_size")]
        if unknown:
            raise UserError(
                f"--model_args has {listed(unknown)}, which --model consyn does not know. Known: "
                f"{ARGUMENTS}."
            )
        if not pretrained:
            raise UserError("No model is given. Write --model_args pretrained=MODEL.")
        if more.get("device"):
            log.warning(
                "--device %s has no effect: JAX takes the devices of the platform that the "
                "environment variable JAX_PLATFORMS names.",
                more["device"],
            )
        self._source = find_source(str(pretrained), step)
        self._own = evaluation_tokenizer(self._source, tokenizer)
        self._tokens = Tokenizer.from_str(self._own.to_json())
        self._options = (dtype, mesh)
        self.batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)

    # -------------------------------------------------------------------------------------- tokens

    @property
    def _prefix(self) -> int:
        """Id of the token used for an empty context."""
        bos = self._own.bos_token_id
        return self._own.eos_token_id if bos is None else bos

    def _encode(self, text: str, begins: bool = True) -> list[int]:
        """Encode a text, in which special tokens are recognised.

        With `begins`, BOS is put in front if the tokenizer begins texts with BOS.
        """
        ids: list[int] = self._tokens.encode(text, add_special_tokens=False).ids if text else []
        first = self._own.first_id
        if not begins or first is None or ids[:1] == [first]:
            return ids
        return [first, *ids]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            before, after = encode_pair(context, continuation)
            start = self._encode(before)
            whole = self._encode(before + after)
            return (start, whole[len(start) :]) if start else ([self._prefix], whole)
        ids = self._encode(continuation, begins=False)
        return [self._prefix], ids[1:] if ids[:1] == [self._prefix] else ids

    # --------------------------------------------------------------------------------- likelihoods

    @cached_property
    def _scorer(self) -> Scorer:
        return load_scorer(self._source, *self._options, self.batch_size)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether greedy decoding generates it."""
        context, wanted, cut = self._source.config.context, list[Wanted](), 0
        for request in requests:
            before, after = self._pair(*request.args)
            if not after or len(after) > context:
                raise UserError(
                    f"{request.task_name} has a continuation of {len(after):,} tokens, but the "
                    f"model takes 1 to {context:,} tokens: {request.args[1][:60]!r}."
                )
            ids = (before + after)[-(context + 1) :]
            cut += len(ids) < len(before) + len(after)
            wanted.append(Wanted(np.array(ids, np.int32), len(ids) - len(after)))
        if cut:
            log.warning(
                "%d of %d contexts cut from the left to the model's context.", cut, len(wanted)
            )
        answers = [
            (float(s.log_likelihood.astype(np.float64).sum()), bool(s.is_greedy.all()))
            for s in self._scorer.score(wanted)
        ]
        self._keep("loglikelihood", requests, answers)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return each text's log-likelihood, the sum over all of its tokens.

        A long text is scored in windows (`rolling_windows`). They may overlap, but each token is
        scored in one window only.
        """
        wanted, owners = list[Wanted](), list[int]()
        for number, request in enumerate(requests):
            for window in rolling_windows(
                self._encode(request.args[0]), self._prefix, self._source.config.context
            ):
                wanted.append(window)
                owners.append(number)
        nats = [s.log_likelihood.astype(np.float64).sum() for s in self._scorer.score(wanted)]
        totals = np.bincount(owners, nats, len(requests)).tolist()
        self._keep("loglikelihood_rolling", requests, totals)
        return totals

    def _keep(self, name: str, requests: Sequence[Any], results: Sequence[Any]) -> None:
        hook = getattr(self, "cache_hook", None)
        for request, result in zip(requests, results, strict=True):
            if hook is not None:
                hook.add_partial(name, request.args, result)

    # ---------------------------------------------------------------------------------- generation

    @cached_property
    def _runtime(self) -> Runtime:
        dtype, mesh = self._options
        return load_runtime(self._source, GenerateModelOptions(dtype=dtype, mesh=mesh), self._own)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate a text for each context, up to a stop string, EOS or the token limit."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        for kind, numbers in groups.items():
            contexts = [requests[number].args[0] for number in numbers]
            found = self._generate(contexts, json.loads(kind))
            for number, text in zip(numbers, found, strict=True):
                texts[number] = text
        self._keep("generate_until", requests, texts)
        return texts

    def _generate(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        sampling, most, stops = generation_settings(settings)
        context = self._source.config.context
        if most >= context:
            raise UserError(
                f"max_gen_toks {most} leaves no room for a prompt in the model's context of "
                f"{context} tokens. Lower it with --gen_kwargs max_gen_toks={context // 2}."
            )
        stops.append(self._tokens.decode([self._own.eos_token_id], skip_special_tokens=False))
        encoded = [(self._encode(text) or [self._prefix])[-(context - most) :] for text in contexts]
        requests = [Request(ids, most, number) for number, ids in enumerate(encoded)]
        engine = self._runtime.engine(min(self.batch_size, len(requests)), sampling)
        new: list[list[int]] = [[] for _ in requests]
        ended = set[int]()
        for piece in engine.run(requests, STOP_STEPS):
            if piece.request in ended:
                continue
            new[piece.request] += piece.tokens
            text = self._own.decode(new[piece.request])
            if any(stop and stop in text for stop in stops):
                ended.add(piece.request)
                engine.stop(piece.request)
        return [cut_at(self._own.decode(ids), stops) for ids in new]

    # --------------------------------------------------------------------------------------- chats

    @property
    def tokenizer_name(self) -> str:
        """A name that identifies the tokenizer, for lm_eval's cache of requests."""
        return f"{self._source.name.replace('/', '__')}-{self._own.sha256[:12]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja source of the model's template, for lm_eval's record."""
        return self._own.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation as text, up to the beginning of the answer.

        Raises:
            UserError: The model has no template, or the last message is to be continued.
        """
        if self._own.chat_template is None:
            raise UserError(
                f"{self._source.name} has no chat template. Leave --apply_chat_template out."
            )
        if not add_generation_prompt:
            raise UserError(
                "Tasks that give the beginning of the answer (gen_prefix) cannot be combined "
                "with chat templates. Leave --apply_chat_template out."
            )
        encoder = PromptEncoder(self._own, self._own.chat_template)
        return encoder.encode(GivenPrompt("A conversation", None, chat_history)).text


def rolling_windows(ids: list[int], prefix: int, context: int) -> Iterator[Wanted]:
    """The windows of lm_eval's `loglikelihood_rolling`; even the last window has a full context.

    >>> [(w.ids.tolist(), w.first) for w in rolling_windows([1, 2, 3, 4, 5, 6], 0, 4)]
    [([0, 1, 2, 3, 4], 1), ([2, 3, 4, 5, 6], 3)]
    """
    whole = [prefix, *ids]
    done = 1
    while done < len(whole):
        end = min(done + context, len(whole))
        begin = max(0, end - context - 1)
        yield Wanted(np.array(whole[begin:end], np.int32), done - begin)
        done = end


def generation_settings(given: dict[str, Any]) -> tuple[Sampling, int, list[str]]:
    """Read the sampling options, the maximum number of new tokens, and the stop strings.

    Args:
        given: The `generation_kwargs` of a task.

    Raises:
        UserError: A setting is not supported.

    >>> generation_settings({"until": "Q:", "max_gen_toks": 8})[1:]
    (8, ['Q:'])
    """
    settings = {name: value for name, value in given.items() if value is not None}
    until = settings.pop("until", [])
    limits = [settings.pop(name) for name in LIMITS if name in settings]
    draws = settings.pop("do_sample", float(settings.get("temperature", 0.0)) > 0)
    values = {name: settings.pop(name) for name in DRAWS if name in settings}
    odd = [name for name, value in settings.items() if value not in (1, False)]
    if odd:
        raise UserError(
            f"generation_kwargs has {listed(odd)}, which --model consyn does not support. Known: "
            "until, "
            f"do_sample, {', '.join(DRAWS)} and {LIMITS[0]}."
        )
    if not draws:
        values = {n: v for n, v in values.items() if n == "repetition_penalty"}
    elif "temperature" not in values:
        values["temperature"] = 1.0
    stops = [until] if isinstance(until, str) else list(until)
    return Sampling(**values), int(limits[0]) if limits else MAX_TOKENS, stops


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string.

    >>> cut_at("one Q: two", ["Q:", ""])
    'one '
    """
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text


@cache
def _class() -> type:
    from lm_eval.api.model import LM

    return type("ConsynLM", (HarnessModel, LM), {"__doc__": HarnessModel.__doc__})


def __getattr__(name: str) -> Any:
    """Define `ConsynLM` on first access, because its base class is imported from lm_eval."""
    if name != "ConsynLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _class()
