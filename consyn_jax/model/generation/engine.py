"""Continuous batching: when the text of a slot is finished, the slot starts on the next request.

A continuation depends only on its prompt and random key, not on its slot or on other texts.
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
    """A prompt to continue, with its limit of new tokens.

    Attributes:
        ids: Token ids of the prompt, at least one.
        max_tokens: Maximum number of new tokens; prompt and new tokens must fit the context.
        prompt: Index of the prompt, which seeds the draws.
        sequence: Index of this continuation among those of the prompt; it also seeds the draws.
    """

    ids: Sequence[int]
    max_tokens: int
    prompt: int = 0
    sequence: int = 0


class Piece(NamedTuple):
    """New tokens of one request, yielded by `Engine.run`.

    Attributes:
        request: Index of the request in the list given to `Engine.run`.
        tokens: The new tokens.
        ends: Why the text ends after these tokens: "eos" for an end-of-text id, "length" for
            `max_tokens`; "" if the text goes on.
    """

    request: int
    tokens: tuple[int, ...]
    ends: str


@dataclass
class _Text:
    """A request in progress.

    Attributes:
        number: Index of the request in the list given to `Engine.run`.
        ids: The prompt and the new tokens so far.
        count: Number of new tokens so far.
    """

    number: int
    request: Request
    ids: list[int] = field(default_factory=list)
    count: int = 0


def bucket(tokens: int, most: int) -> int:
    """Round a length up to 2^n or 1.5 x 2^n, so that few lengths are compiled; at most `most`.

    >>> [bucket(n, 100) for n in (1, 17, 25, 33, 49, 65, 97)]
    [16, 24, 32, 48, 64, 96, 100]
    """
    size = SMALLEST_BUCKET
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, most)


class Engine:
    """A model that generates several texts at the same time, one per slot.

    JAX compiles prefill and decoding when a shape first occurs, and then reuses the result.

    Args:
        weights: Weights of the model, as `runtime_weights` returns them.
        num_slots: Number of texts to generate at the same time.
        sampling: Settings for the choice of the next token.
        attention: Attention backend of prefill, a key of `attention.BACKENDS`.
        ends: Token ids that end a text; by default those of the model.
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
        """Continue all requests, and yield their new tokens as they are generated.

        Args:
            steps: Maximum number of tokens per piece; at most `CHUNK`.

        Raises:
            UserError: A prompt is empty, or prompt and new tokens exceed the model's context.
        """
        for request in requests:
            check_request(request, self.plan.config.context)
        self._stopped.clear()
        context = self.plan.config.context
        # Reserve for a prompt's whole bucket, so that later prompts of the bucket reuse the cache.
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
        """Stop a request of the current `run`; the request yields no further pieces."""
        self._stopped.add(request)

    def reserve(self, tokens: int) -> None:
        """Grow the KV cache to hold texts of `tokens` tokens, unless it is already large enough."""
        config, weights = self.plan.config, self._weights
        size = min(round_up(bucket(max(tokens, 1), config.context), 8), config.context)
        if size > self._size:
            self._slots = None  # freed first, as memory may not hold both
            dtype = weights["embedding"].dtype
            self._slots = empty_slots(self.plan, self.num_slots, size, dtype)
            self._tables, self._size = rotations(config, size), size

    # ------------------------------------------------------------------------------------- prefill

    def _fill(self, places: list[_Text | None], waiting: deque[_Text]) -> Iterator[Piece]:
        """Prefill waiting texts into free slots until no slot is free or no text is waiting.

        A text that ends with its first new token frees its slot again.
        """
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
            return  # nothing to decode, or free slots to fill first
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
        assert int(count) > 0, "texts are unfinished, but no slot is active"
        columns = np.asarray(tokens)[: int(count)].T
        for slot in np.flatnonzero(running).tolist():
            new = columns[slot]
            yield self._added(places, slot, new[new >= 0].tolist())
        self._requeue(places, waiting)

    # --------------------------------------------------------------------------------------- texts

    def _added(self, places: list[_Text | None], slot: int, tokens: list[int]) -> Piece:
        """Append tokens to the text in a slot, and free the slot if the text ends with them."""
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
        """Return texts to the queue for a new prefill when their rotary embedding changes."""
        for slot, text in enumerate(places):
            if text is not None and len(text.ids) == self._segment_end(text):
                places[slot] = None
                waiting.appendleft(text)

    def _segment_end(self, text: _Text) -> int | None:
        """Length at which the text's rotary embedding changes, or None if it never does.

        At this length the text needs a new prefill. The length is one above the limit of
        `spans_until`, because the newest token is not in the cache yet.
        """
        limit = spans_until(self.plan.config)
        prompt = len(text.ids) - text.count
        return None if limit is None or prompt > limit else limit + 1

    def _limit(self, text: _Text) -> int:
        """Number of new tokens after which the text ends or needs a new prefill."""
        end, prompt = self._segment_end(text), len(text.ids) - text.count
        whole = text.request.max_tokens
        return whole if end is None or len(text.ids) >= end else min(whole, end - prompt)

    def _is_long(self, text: _Text) -> int:
        limit = spans_until(self.plan.config)
        return int(limit is not None and len(text.ids) > limit and self._tables[0].shape[0] > 1)


def check_request(request: Request, context: int) -> None:
    """Check that the prompt and new tokens of a request fit the context.

    Raises:
        UserError: The prompt is empty, or prompt and new tokens exceed `context`.
    """
    T, where = len(request.ids), f"Prompt {request.prompt}"
    if T < 1:
        raise UserError(f"{where} is empty. Start it with the BOS token.")
    if context <= T:
        raise UserError(
            f"{where} has {T:,} tokens, and the model's context is {context:,}. Shorten the prompt."
        )
    if T + request.max_tokens > context:
        raise UserError(
            f"{where} has {T:,} tokens, and with {request.max_tokens:,} new tokens it exceeds the "
            f"model's context of {context:,}. Ask for at most {context - T:,} new tokens."
        )
