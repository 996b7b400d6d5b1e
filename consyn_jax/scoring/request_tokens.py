"""Tokenise requests as lm_eval does (`TemplateLM._encode_pair`).

White space at the end of a context is moved to the continuation. Then context and continuation are
tokenised as one text. If the context alone has n ids, the continuation has the ids after the first
n. BOS is put in front if the model's training texts begin with it. An empty context becomes BOS, or
EOS if there is no BOS.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from consyn_jax.errors import UserError
from consyn_jax.scoring.request_rows import Request
from consyn_jax.scoring.scorer import Wanted
from consyn_jax.tokenization import BPETokenizer

TEXTS_AT_ONCE = 4096


@dataclass(frozen=True)
class Encoded:
    """Requests as token ids.

    Attributes:
        wanted: The sequences to score, one per context and continuation, in the order of the
            requests.
        cut: Number of contexts that were truncated at their beginning to fit the model.
        changed: Number of contexts whose ids change when the continuation follows.
        context: The model's context length, in tokens.
    """

    wanted: list[Wanted]
    cut: int
    changed: int
    context: int

    @property
    def notes(self) -> list[str]:
        """Notes about truncated and changed contexts, with counts."""
        notes = []
        if self.cut:
            notes.append(
                f"{self.cut:,} of {len(self.wanted):,} contexts truncated on the left to the "
                f"model's {self.context:,} tokens"
            )
        if self.changed:
            notes.append(
                f"{self.changed:,} contexts are tokenised differently when the continuation follows"
            )
        return notes


def encode_pair(context: str, continuation: str) -> tuple[str, str]:
    """Move white space at the end of the context to the continuation.

    >>> encode_pair("2 + 2 = ", "4")
    ('2 + 2 =', ' 4')
    """
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def encode_requests(requests: Iterable[Request], tokenizer: BPETokenizer, context: int) -> Encoded:
    """Tokenise requests, and truncate contexts on the left to fit the model.

    Args:
        context: The model's context length, in tokens.

    Raises:
        UserError: A continuation adds no token to its context, or does not fit the model's context.
    """
    pairs = [(request.place, *encode_pair(*pair)) for request in requests for pair in request.pairs]
    contexts = _encode(tokenizer, [before for _, before, _ in pairs])
    wholes = _encode(tokenizer, [before + after for _, before, after in pairs])
    begin = [] if tokenizer.first_id is None else [tokenizer.first_id]
    wanted, cut, changed = list[Wanted](), 0, 0
    for (place, _, _), before, whole in zip(pairs, contexts, wholes, strict=True):
        start = begin if begin or before else [tokenizer.eos_token_id]
        first, ids = len(start) + len(before), [*start, *whole]
        changed += whole[: len(before)] != before
        if first >= len(ids):
            raise UserError(
                f"{place} has a continuation without tokens: the tokenizer merges it into the "
                "last token of the context. Split the text so that the continuation begins "
                "with a new word."
            )
        over = len(ids) - (context + 1)
        if over > 0:
            if first - over < 1:
                raise UserError(
                    f"{place} has a continuation of {len(ids) - first:,} tokens, more than the "
                    f"model's context of {context:,}. Shorten the continuation."
                )
            cut, ids, first = cut + 1, ids[over:], first - over
        wanted.append(Wanted(np.array(ids, np.int32), first))
    return Encoded(wanted, cut, changed, context)


def _encode(tokenizer: BPETokenizer, texts: Sequence[str]) -> list[list[int]]:
    found: list[list[int]] = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        part = texts[start : start + TEXTS_AT_ONCE]
        ids = tokenizer.encode_batch(part)
        # Some tokenizers add a leading space even to an empty text, which must have no ids here.
        found += [of if text else [] for of, text in zip(ids, part, strict=True)]
    return found
