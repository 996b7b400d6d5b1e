"""Continuous batching: each slot extends one text, and takes the next one when it is finished.

A continuation depends only on the text's own tokens and draws, not on its slot or other texts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from consyn_jax.errors import UserError
from consyn_jax.integers import round_up
from consyn_jax.model.generation.decoding import (
    CHUNK,
    Plan,
    Prompts,
    Slots,
    decode,
    empty_slots,
    prefill,
    rotations,
)
from consyn_jax.model.generation.draws import Sampling, seed_key
from consyn_jax.model.generation.runtime_weights import Weights, mesh_of
from consyn_jax.model.rope import spans_until
from consyn_jax.model_config import ModelConfig

SMALLEST_BUCKET = 16  # tokens


class Request(NamedTuple):
    """A text to continue.

    Attributes:
        ids: The prompt, at least one token.
        max_tokens: Number of tokens to add at most; they must fit the context after the prompt.
        prompt, sequence: Numbers that the text's draws depend on.
    """

    ids: Sequence[int]
    max_tokens: int
    prompt: int = 0
    sequence: int = 0


class Piece(NamedTuple):
    """New tokens of a request.

    Attributes:
        request: Index of the request in the call.
        ends: Why the text ends here: "eos" (the last token ends texts) or "length"; "" if it
            continues.
    """

    request: int
    tokens: tuple[int, ...]
    ends: str


@dataclass
class _Text:
    """A request in progress: its tokens so far; the last `count` are new."""

    number: int
    request: Request
    ids: list[int] = field(default_factory=list)
    count: int = 0


def bucket(tokens: int, most: int) -> int:
    """Round a length up to one that programs are compiled for: 2^n, 1.5 x 2^n, or `most`.

    >>> [bucket(n, 100) for n in (1, 17, 25, 33, 49, 65, 97)]
    [16, 24, 32, 48, 64, 96, 100]
    """
    size = SMALLEST_BUCKET
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, most)


class Engine:
    """A model with slots for texts. Programs are compiled for the shapes that requests need.

    Args:
        weights: From `runtime_weights`.
        num_slots: Texts to generate at the same time.
        sampling: Settings for the choice of tokens.
        attention: The backend of prefill, a key of `attention.BACKENDS`.
        ends: Ids that end a text; by default the model's.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        num_slots: int,
        sampling: Sampling,
        *,
        attention: str = "xla",
        ends: Iterable[int] | None = None,
    ) -> None:
        mesh = mesh_of(weights)
        ends = tuple(sorted(set(config.eos_token_ids if ends is None else ends)))
        filters = sampling.filters(config.vocab_size)
        self.plan = Plan(config, filters, ends, attention if mesh is None else "xla", mesh)
        self.num_slots, self._weights = num_slots, weights
        self._values, self._base = sampling.values(), seed_key(sampling.seed)
        self._size = 0
        self._slots: Slots | None = None
        self._tables: Any = None
        self._stopped: set[int] = set()

    # ------------------------------------------------------------------------------------- running

    def run(self, requests: Sequence[Request], steps: int = CHUNK) -> Iterator[Piece]:
        """Continue all requests, and yield their tokens as they come.

        Args:
            steps: Tokens in a piece at most, up to `CHUNK`.

        Raises:
            UserError: An empty prompt, or one that leaves no room in the context.
        """
        for request in requests:
            check_request(request, self.plan.config.context)
        self._stopped.clear()
        context = self.plan.config.context
        # sized by the prompt's bucket: other prompts in that bucket can use the same cache
        needs = (bucket(len(r.ids), context) + r.max_tokens for r in requests)
        self.reserve(min(max(needs, default=0), context))
        waiting = deque(
            _Text(number, request, list(request.ids)) for number, request in enumerate(requests)
        )
        places: list[_Text | None] = [None] * self.num_slots
        while waiting or any(places):
            yield from self._fill(places, waiting)
            yield from self._decode(places, waiting, steps)

    def stop(self, request: int) -> None:
        """End a request of the running call after the piece that was yielded last."""
        self._stopped.add(request)

    def reserve(self, tokens: int) -> None:
        """Grow the cache to hold texts of this many tokens; a larger cache is kept."""
        config, weights = self.plan.config, self._weights
        size = min(round_up(bucket(max(tokens, 1), config.context), 8), config.context)
        if size > self._size:
            self._slots = None  # freed first, as memory may not hold both
            dtype = weights["embedding"].dtype
            self._slots = empty_slots(self.plan, self.num_slots, size, dtype)
            self._tables, self._size = rotations(config, size), size

    # ------------------------------------------------------------------------------------- prefill

    def _fill(self, places: list[_Text | None], waiting: deque[_Text]) -> Iterator[Piece]:
        """Put waiting texts into free places; a text that ends at once frees its place again."""
        while waiting and None in places:
            free = [slot for slot, text in enumerate(places) if text is None]
            taken: dict[int, list[tuple[int, _Text]]] = {}
            for slot in free[: len(waiting)]:
                text = waiting.popleft()
                if text.number not in self._stopped:
                    taken.setdefault(bucket(len(text.ids), self._size), []).append((slot, text))
            for length, group in taken.items():
                rows = self.num_slots if 2 * len(group) > self.num_slots else 1
                for start in range(0, len(group), rows):
                    yield from self._prefill(group[start : start + rows], rows, length, places)
            self._requeue(places, waiting)

    def _prefill(
        self, group: list[tuple[int, _Text]], rows: int, length: int, places: list[_Text | None]
    ) -> Iterator[Piece]:
        ids = np.zeros((rows, length), np.int32)
        numbers = np.zeros((len(Prompts._fields) - 1, rows), np.int32)
        numbers[0], numbers[1] = 1, self.num_slots  # padding rows write nothing
        for row, (slot, text) in enumerate(group):
            ids[row, : len(text.ids)] = text.ids
            request = text.request
            numbers[:, row] = (
                *(len(text.ids), slot, text.count, self._limit(text), self._is_long(text)),
                *(request.prompt, request.sequence),
            )
            places[slot] = text
        assert self._slots is not None
        self._slots, first = prefill(
            self.plan,
            self._weights,
            self._tables,
            self._slots,
            Prompts(ids, *numbers),
            self._base,
            self._values,
        )
        for (slot, _), token in zip(group, np.asarray(first).tolist(), strict=False):
            yield self._added(places, slot, [token])

    # -------------------------------------------------------------------------------------- decode

    def _decode(
        self, places: list[_Text | None], waiting: deque[_Text], steps: int
    ) -> Iterator[Piece]:
        for slot, text in enumerate(places):
            if text is not None and text.number in self._stopped:
                places[slot] = None
        running = np.array([text is not None for text in places])
        if not running.any() or (waiting and not running.all()):
            return  # nothing to do, or first fill the places
        enough = running.sum() if waiting else 1
        assert self._slots is not None
        self._slots, tokens, count = decode(
            self.plan,
            self._weights,
            self._tables,
            self._slots,
            running,
            np.int32(min(steps, CHUNK)),
            np.int32(enough),
            self._values,
        )
        assert int(count) > 0, "no slot is active, and texts are not finished"
        columns = np.asarray(tokens)[: int(count)].T
        for slot in np.flatnonzero(running).tolist():
            new = columns[slot]
            yield self._added(places, slot, new[new >= 0].tolist())
        self._requeue(places, waiting)

    # --------------------------------------------------------------------------------------- texts

    def _added(self, places: list[_Text | None], slot: int, tokens: list[int]) -> Piece:
        """Add tokens to the text in a slot, and free the slot if they are the text's last ones."""
        text = places[slot]
        assert text is not None
        text.ids += tokens
        text.count += len(tokens)
        ends = ""
        if tokens and tokens[-1] in self.plan.ends:
            ends = "eos"
        elif text.count >= text.request.max_tokens:
            ends = "length"
        if ends:
            places[slot] = None
        return Piece(text.number, tuple(tokens), ends)

    def _requeue(self, places: list[_Text | None], waiting: deque[_Text]) -> None:
        """Queue texts whose rotary embedding changes for a new prefill, as in transformers."""
        for slot, text in enumerate(places):
            if text is not None and len(text.ids) == self._segment_end(text):
                places[slot] = None
                waiting.appendleft(text)

    def _segment_end(self, text: _Text) -> int | None:
        """Length at which the text's rotary embedding changes and it needs a new prefill, or None.

        It is one above the limit, because the last token is predicted by the tokens before it.
        """
        limit = spans_until(self.plan.config)
        prompt = len(text.ids) - text.count
        return None if limit is None or prompt > limit else limit + 1

    def _limit(self, text: _Text) -> int:
        """Number of new tokens at which the text's slot must stop."""
        end, prompt = self._segment_end(text), len(text.ids) - text.count
        whole = text.request.max_tokens
        return whole if end is None or len(text.ids) >= end else min(whole, end - prompt)

    def _is_long(self, text: _Text) -> int:
        limit = spans_until(self.plan.config)
        return int(limit is not None and len(text.ids) > limit and self._tables[0].shape[0] > 1)


def check_request(request: Request, context: int) -> None:
    """Check that a request can be continued within the context.

    Raises:
        UserError: It is empty or too long.
    """
    T, where = len(request.ids), f"Prompt {request.prompt}"
    if T < 1:
        raise UserError(f"{where} is empty. Start it with the BOS token.")
    if context <= T:
        raise UserError(
            f"{where} has {T:,} tokens, and the model's context is {context:,}. Shorten it."
        )
    if T + request.max_tokens > context:
        raise UserError(
            f"{where} has {T:,} tokens, which with {request.max_tokens:,} new ones exceed the "
            f"model's context of {context:,}. Ask for at most {context - T:,}."
        )
