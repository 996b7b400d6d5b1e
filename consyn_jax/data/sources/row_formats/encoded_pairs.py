"""Encode preference pairs to ids and targets, as TRL's `DPOTrainer` does.

The prompt is encoded alone and with each answer. An answer begins at the first id that differs from
those of the prompt alone. If the two answers begin at different positions, the smaller position
counts for both. An answer may begin inside the prompt, because a tokenizer may merge the end of the
prompt with the answer, and a template may render the prompt differently if an answer follows.
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
    """A pair encoded as one document, and facts about it to report.

    Attributes:
        document: prompt and chosen answer, then a token with target `BETWEEN`, then prompt and
            rejected answer.
        notices: keys of `corpus_report.NOTICES` that apply to the pair.
    """

    document: EncodedChat
    notices: tuple[str, ...]


def encode_pair(
    pair: Pair, tokenizer: BPETokenizer, chats: Callable[[], ChatEncoder]
) -> EncodedPair:
    """Encode a pair to ids and targets.

    Args:
        chats: function that returns the encoder of conversations; called for pairs of messages.

    Raises:
        TemplateFault: the chat template refuses a conversation.
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
            raise TemplateFault(
                "it leaves out the text of an answer, so there is nothing to train on"
            )
        own = np.ones(len(answer), np.uint8)
        own[:size] = 0
        if not isinstance(pair.prompt, str):
            own[:1] = GIVEN  # no BOS is put before rendered text
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
    """Encode a pair of texts.

    Returns:
        The text of the prompt with each answer; and three lists of ids: of the prompt alone, of
        the prompt with the chosen answer, and of the prompt with the rejected answer.
    """
    assert isinstance(pair.prompt, str)
    texts = [f"{pair.prompt}{answer}" for answer in (pair.chosen, pair.rejected)]
    prompt, *answers = tokenizer.encode_batch([pair.prompt, *texts])
    return texts, [prompt, *([*ids, tokenizer.eos_token_id] for ids in answers)]


def _of_messages(pair: Pair, chats: ChatEncoder) -> tuple[list[str], list[list[int]], int]:
    """Encode a pair of conversations.

    Returns:
        The rendered text of the prompt with each answer; three lists of ids: of the prompt alone,
        of the prompt with the chosen answer, and of the prompt with the rejected answer; and the
        number of messages that the template omits.
    """

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
    """Return the length of the longest common prefix of two lists of ids.

    >>> _common_length([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
