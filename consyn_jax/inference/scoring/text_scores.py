"""Compute perplexity and bits per byte of documents, with equal weight for all tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from consyn_jax.errors import UserError
from consyn_jax.inference.scoring.documents import Documents, TokenDocument
from consyn_jax.inference.scoring.text_windows import Window, windows
from consyn_jax.scoring.scorer import Scorer, Wanted

GROUP_TOKENS = 1 << 20  # tokens in a group of windows, which are sorted by length

Progress = Callable[[int, int], None]
"""Function called with the number of tokens read so far, and the total number of tokens."""


@dataclass
class TextScores:
    """Sums over the scored tokens of a data source.

    Attributes:
        window, stride: Length and stride of the windows, in tokens.
        nll: Negative log-likelihood, in nats, of each document, or of each window if there is only
            one document; float64.
        tokens: Number of scored tokens of each document or window.
        greedy: Number of scored tokens that were the model's likeliest token.
        unscored: Number of tokens that are not scored because nothing precedes them in their
            window.
        num_bytes: Bytes of the text; None if unknown.
    """

    window: int
    stride: int
    documents: int
    unit: str
    nll: np.ndarray
    tokens: np.ndarray
    greedy: int
    unscored: int
    num_bytes: int | None
    notes: tuple[str, ...] = ()

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, in nats per token."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def metrics(self) -> dict[str, float]:
        """Loss, perplexity, bits per token and, if the number of bytes is known, bits per byte."""
        loss = self.loss
        found = {
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_token": loss / math.log(2),
            "loss": loss,
            "accuracy": self.greedy / float(self.tokens.sum()),
        }
        if self.num_bytes:
            found["bits_per_byte"] = float(self.nll.sum()) / math.log(2) / self.num_bytes
        return found


@dataclass
class _Group:
    """Windows that are scored together."""

    wanted: list[Wanted] = field(default_factory=list)
    scored: list[np.ndarray] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    tokens: int = 0

    def add(self, number: int, document: TokenDocument, window: Window) -> None:
        begin, end, first = window
        self.wanted.append(Wanted(document.ids[begin:end], first - begin))
        self.scored.append(document.scored[first:end])
        self.owner.append(number)
        self.tokens += end - begin


def score_texts(
    scorer: Scorer,
    documents: Documents,
    window: int | None,
    stride: int | None,
    progress: Progress | None = None,
) -> TextScores:
    """Score whole documents in windows.

    Args:
        window: Tokens in a window; None for the model's context.
        stride: Tokens between the starts of consecutive windows; None for half a window.

    Raises:
        UserError: The window does not fit the model, or nothing is scored.
    """
    size, step = _checked(scorer, window, stride)
    sums: list[tuple[int, float, int]] = []  # for each window: its document, nats, tokens
    greedy = unscored = count = read = 0
    group = _Group()

    def finish() -> None:
        nonlocal greedy, group
        for owner, mask, scores in zip(
            group.owner, group.scored, scorer.score(group.wanted), strict=True
        ):
            nats = -scores.log_likelihood[mask].astype(np.float64).sum()
            sums.append((owner, float(nats), int(mask.sum())))
            greedy += int(scores.is_greedy[mask].sum())
        group = _Group()

    for count, document in enumerate(documents, 1):
        covered = 0
        for part in _worth_scoring(document, size, step):
            group.add(count - 1, document, part)
            covered += int(document.scored[part.first : part.end].sum())
            if group.tokens >= GROUP_TOKENS:
                finish()
        unscored += int(document.scored.sum()) - covered
        read += len(document.ids)
        if progress is not None:
            progress(read, documents.split.num_tokens)
    finish()
    nll, tokens, unit = _by_unit(sums, count)
    return TextScores(
        size, step, count, unit, nll, tokens, greedy, unscored, documents.num_bytes, documents.notes
    )


def _worth_scoring(document: TokenDocument, size: int, step: int) -> Iterator[Window]:
    """The windows of a document that score at least one token."""
    for part in windows(len(document.ids), size, step):
        if document.scored[part.first : part.end].any():
            yield part


def _checked(scorer: Scorer, window: int | None, stride: int | None) -> tuple[int, int]:
    context = scorer.config.context
    size = context if window is None else window
    if size > context + 1:
        raise UserError(
            f"--window {size} is more than {context + 1}: the model's context of {context} tokens, "
            "plus one token to predict. Lower --window."
        )
    step = max(size // 2, 1) if stride is None else stride
    if step > size:
        raise UserError(
            f"--stride {step} is more than the window of {size} tokens, so tokens would be left "
            "out. Lower --stride."
        )
    return size, step


def _by_unit(
    sums: list[tuple[int, float, int]], documents: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the nats and the number of tokens of each unit, and the name of the unit.

    The unit is a document, or a window if there is only one document.

    Raises:
        UserError: No token is scored.
    """
    if not sum(number for _, _, number in sums):
        raise UserError(
            "No token of --data can be scored: each text has only one token, or no target of the "
            "loss. Give longer texts."
        )
    owners = np.array([owner for owner, _, _ in sums], np.int64)
    nats = np.array([value for _, value, _ in sums], np.float64)
    tokens = np.array([number for _, _, number in sums], np.float64)
    if documents == 1:
        return nats, tokens, "window"
    return (
        np.bincount(owners, nats, documents),
        np.bincount(owners, tokens, documents),
        "document",
    )
