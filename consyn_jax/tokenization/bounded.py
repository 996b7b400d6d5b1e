"""Call the Rust library `tokenizers` with a time limit and a guard against panics.

A tokenizer.json is untrusted. Its regular expressions, which split text into words, may never
finish on some text, or may make the library panic. Python code sees a Rust panic as a
`BaseException` that is not an `Exception`.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from consyn_jax.errors import UserError, brief

Result = TypeVar("Result")
PROBE_S = 5.0
# The time limit assumes this speed. Even a busy machine encodes more than ten times faster.
SLOWEST_CHARACTERS_PER_S, LEAST_S = 10_000, 60.0
# Short texts on which regular expressions with nested repetitions take exponential time.
PROBES = ("a" * 64 + "!", "A" * 64 + "\n", "0" * 64 + "x", " " * 64 + ".", "aA0 " * 16, "é" * 64)


def probe(encode: Callable[[Sequence[str]], object]) -> None:
    """Test a tokenizer's regular expressions on short texts.

    An expression with nested repetitions takes exponential time on these texts.

    Raises:
        UserError: a regular expression does not finish in time, or the library panics.
    """
    with _without_stderr():  # the library prints panics to stderr
        bounded(lambda: encode(PROBES), PROBE_S)


@contextmanager
def _without_stderr() -> Iterator[None]:
    sys.stderr.flush()
    own, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)
        os.close(nowhere)


def guarded(work: Callable[[], Result]) -> Result:
    """Run `work` and return its result; turn a panic of the library into a UserError.

    Raises:
        UserError: the library panicked.
    """
    try:
        return work()
    except BaseException as error:
        # A PanicException is not an Exception and cannot be imported, so compare its name.
        if isinstance(error, Exception) or type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"The tokenizer.json makes the tokenizers library fail ({brief(error)}). Use another "
            "tokenizer, or correct its regular expressions."
        ) from error


def bounded(work: Callable[[], Result], limit_s: float) -> Result:
    """Run `work`, and wait at most `limit_s` seconds for its result.

    If `work` takes longer, it continues in its own thread, which ends with the process.

    Raises:
        UserError: `work` takes longer, or the library panics.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(guarded(work))
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="tokenizer", daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    if not results:
        raise UserError(
            f"The tokenizer did not finish a text within {limit_s:.0f} s, because of a regular "
            "expression in its tokenizer.json. Use another tokenizer, or correct the expression."
        )
    return results[0]


def limit_s(characters: int) -> float:
    """Return the time limit, in seconds, for encoding this many characters."""
    return LEAST_S + characters / SLOWEST_CHARACTERS_PER_S
