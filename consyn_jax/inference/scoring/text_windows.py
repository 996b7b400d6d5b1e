"""Windows over long documents, which score every token once with enough context.

As in the guide "Perplexity of fixed-length models" of transformers
(https://huggingface.co/docs/transformers/perplexity), a window begins every S tokens (the stride).
It has W tokens, or fewer at the end, and scores the tokens that no earlier window has scored.
Nothing precedes the first token of a window, so with S = W this token is not scored. lm_eval's
`loglikelihood_rolling` has W = context + 1 and S = context.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """Tokens `begin` to `end` (excluded) of a document; those from `first` on are scored."""

    begin: int
    end: int
    first: int


def windows(length: int, size: int, stride: int) -> Iterator[Window]:
    """The windows of a document of `length` tokens; none if it has fewer than two.

    >>> list(windows(10, 6, 3))
    [Window(begin=0, end=6, first=1), Window(begin=3, end=9, first=6),
    Window(begin=6, end=10, first=9)]
    >>> sum(w.end - w.first for w in windows(10, 4, 4)), list(windows(1, 4, 2))
    (7, [])
    """
    done = 0
    for begin in range(0, length, stride):
        end = min(begin + size, length)
        first = max(done, begin + 1)
        if first < end:
            yield Window(begin, end, first)
        done = end
        if end == length:
            return
