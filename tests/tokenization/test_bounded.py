"""A tokenizer.json that never ends, or that makes the Rust library panic, is a sentence."""

import json
import time

import pytest

from consyn_jax.errors import UserError
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.tokenization import bounded as module
from consyn_jax.tokenization.bounded import bounded, guarded


class PanicException(BaseException):
    """As the library's: not an Exception."""


def panic() -> None:
    raise PanicException("called `Option::unwrap()` on a `None` value")


def test_a_panic_is_a_sentence_and_other_errors_stay() -> None:
    for call in (lambda: guarded(panic), lambda: bounded(panic, 5)):
        with pytest.raises(UserError, match=r"tokenizers library fail \(called `Option"):
            call()
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: 1 / 0, 5)
    assert bounded(lambda: 3, 5) == 3


def test_a_call_that_does_not_end_is_given_up() -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match="did not finish a text within"):
        bounded(lambda: time.sleep(100), 0.1)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("expression", [r"(?:\w+\s?)+$", r"(?:[a-z]+0?)+$"])
def test_expressions_with_nested_repetitions(
    expression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROBE_S", 1.0)
    content = json.loads(BPETokenizer.bytes().to_json())
    split = {
        "type": "Split",
        "pattern": {"Regex": expression},
        "behavior": "Isolated",
        "invert": False,
    }
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            split,
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": False,
            },
        ],
    }
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"did not finish a text within|makes the tokenizers library fail"
    ):
        BPETokenizer(json.dumps(content))
    assert time.monotonic() - began < 60  # for ever without a limit
