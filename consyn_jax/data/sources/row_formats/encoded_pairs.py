"""Preference pairs to ids and targets, as TRL's `DPOTrainer` encodes them.

The prompt is encoded alone, and with each answer. An answer begins where its ids first differ from
those of the prompt alone, at the same place for both answers: a tokenizer may join the end of a
prompt with the beginning of an answer, and a template may write a prompt otherwise when an answer
follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from consyn_jax.data.sources.row_formats.preference_rows import Messages, Pair
from consyn_jax.data.store.manifest import BETWEEN, GIVEN
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.tokenization.chat.chat_encoder import ChatEncoder, EncodedChat
from consyn_jax.tokenization.chat.sandbox import TemplateFault
from consyn_jax.tokenization.chat.turns import Chat


@dataclass(frozen=True)
class EncodedPair:
    """A pair as one document, and what is unusual about it.

    Attributes:
        document: prompt and chosen answer, a token marked `BETWEEN`, prompt and rejected answer.
        notices: names of `corpus_report.NOTICES`.
    """

    document: EncodedChat
    notices: tuple[str, ...]


def encode_pair(
    pair: Pair, tokenizer: BPETokenizer, chats: Callable[[], ChatEncoder]
) -> EncodedPair:
    """The ids and targets of a pair.

    Args:
        chats: makes the encoder of conversations, for pairs of messages.

    Raises:
        TemplateFault: the chat template refuses it.
    """
    if isinstance(pair.prompt, str):
        texts, ids = _of_text(pair, tokenizer)
        unwritten = 0
    else:
        texts, ids, unwritten = _of_messages(pair, chats())
    prompt, *answers = ids
    size = min(_common_length(prompt, answer) for answer in answers)
    marks = []
    for answer in answers:
        if len(answer) == size:
            raise TemplateFault("it writes nothing of an answer, so nothing would be learned")
        own = np.ones(len(answer), np.uint8)
        own[:size] = 0
        if not isinstance(pair.prompt, str):
            own[:1] = GIVEN  # no BOS is put in front of what a template writes
        marks.append(own)
    chosen, rejected = answers
    between = np.array([BETWEEN], np.uint8)
    document = EncodedChat(
        "".join(texts),
        [*chosen, tokenizer.eos_token_id, *rejected],
        np.concatenate([marks[0], between, marks[1]]),
        unwritten,
    )
    found = {
        "unwritten": bool(unwritten),
        "equal": chosen == rejected,
        "prompt_end": size < len(prompt),
    }
    return EncodedPair(document, tuple(name for name, is_there in found.items() if is_there))


def _of_text(pair: Pair, tokenizer: BPETokenizer) -> tuple[list[str], list[list[int]]]:
    """Texts with each answer; ids of the prompt alone, and with each answer and EOS."""
    assert isinstance(pair.prompt, str)
    texts = [f"{pair.prompt}{answer}" for answer in (pair.chosen, pair.rejected)]
    prompt, *answers = tokenizer.encode_batch([pair.prompt, *texts])
    return texts, [prompt, *([*ids, tokenizer.eos_token_id] for ids in answers)]


def _of_messages(pair: Pair, chats: ChatEncoder) -> tuple[list[str], list[list[int]], int]:
    """The results of `_of_text`, and the number of messages that the template leaves out."""

    def chat(messages: Messages) -> Chat:
        return Chat(messages, [False] * len(messages), pair.tools, pair.variables)

    assert isinstance(pair.prompt, list)
    prompt, texts, unwritten = pair.prompt, [], 0
    ids = [chats.prompt(chat(prompt))[1]]
    for answer in (pair.chosen, pair.rejected):
        assert isinstance(answer, list)
        text, own, left_out = chats.whole(chat([*prompt, *answer]))
        texts.append(text)
        ids.append(own)
        unwritten += left_out
    return texts, ids, unwritten


def _common_length(a: list[int], b: list[int]) -> int:
    """Number of ids at the beginning that are the same in both.

    >>> _common_length([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
