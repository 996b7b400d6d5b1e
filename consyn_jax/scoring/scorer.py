"""Score sequences of different lengths with a model, compiled for only a few shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, Float32, Integer

from consyn_jax.config import ModelConfig
from consyn_jax.distributed.mesh import sharding
from consyn_jax.model.parameters import Params, layout
from consyn_jax.model.rope import spans_until
from consyn_jax.model.transformer import Compute, Decoder
from consyn_jax.scoring.token_scores import TOKENS, TokenScores, token_scores

SHORTEST = 32  # tokens; shorter sequences are padded to it


class Wanted(NamedTuple):
    """A sequence of token ids, to be scored from position `first` on.

    `first` is at least 1, because nothing precedes the first token.
    """

    ids: Integer[np.ndarray, " n"]
    first: int


class Scores(NamedTuple):
    """Scores of a sequence's tokens from position `Wanted.first` on; one entry per token."""

    log_likelihood: Float32[np.ndarray, " scored"]
    is_greedy: Bool[np.ndarray, " scored"]


Tick = Callable[[int], None]
"""Function called with the number of sequences scored so far."""


@dataclass(frozen=True)
class Scorer:
    """A model's weights on a mesh, and the compiled program that scores sequences.

    Attributes:
        rows: Sequences in a batch, a multiple of the number of devices that shard the batch.
    """

    config: ModelConfig
    params: Params
    mesh: Mesh
    dtype: Any
    attention: str
    rows: int

    @property
    def description(self) -> str:
        """The number type and the devices, as text for the user."""
        split = [f"{name}={size}" for name, size in self.mesh.shape.items() if size > 1]
        device = self.mesh.devices.flat[0].device_kind
        where = f"{self.mesh.size} x {device}" + (f" ({', '.join(split)})" if split else "")
        return f"{jnp.dtype(self.dtype).name} on {where}, batches of {self.rows}"

    def score(self, sequences: Sequence[Wanted], tick: Tick | None = None) -> list[Scores]:
        """Score sequences; the scores are in the order of the sequences.

        Sequences of similar lengths share a batch and are padded to one of a few lengths, so that
        few programs are compiled. Padding follows the tokens, so attention does not see it.

        Args:
            sequences: Each has at most one token more than the model's context, because the last
                token is not an input.
        """
        results: dict[int, Scores] = {}
        waiting: tuple[list[int], TokenScores] | None = None
        for numbers, batch in self._batches(sequences):
            scores = self._run(batch)
            if waiting is not None:  # the device already works on the next batch
                self._take(*waiting, sequences, results, tick)
            waiting = numbers, scores
        if waiting is not None:
            self._take(*waiting, sequences, results, tick)
        return [results[number] for number in range(len(sequences))]

    def length_of(self, tokens: int) -> int:
        """Round a number of input tokens up to one of a few lengths.

        These are powers of two and, from 128 on, also 1.5 times a power of two. The largest is the
        model's context. The result is a multiple of the mesh's `context` axis.
        """
        length = SHORTEST
        while length < tokens:
            half_way = length * 3 // 2
            length = half_way if half_way >= max(tokens, 128) else 2 * length
        length = max(tokens, min(length, self.config.context))
        context = self.mesh.shape["context"]
        return math.ceil(length / context) * context

    def _batches(self, sequences: Sequence[Wanted]) -> Iterator[tuple[list[int], Any]]:
        """Yield batches as (indices of the sequences, int32 array [3, rows, T]).

        The array holds inputs, labels and segment ids. The longest batch comes first, so that a
        lack of memory shows at once.
        """
        lengths = [self.length_of(len(sequence.ids) - 1) for sequence in sequences]
        order = sorted(range(len(sequences)), key=lambda number: (-lengths[number], number))
        share = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        rows = min(self.rows, math.ceil(len(order) / share) * share)  # fewer for few sequences
        start = 0
        while start < len(order):
            length = lengths[order[start]]
            numbers = [n for n in order[start : start + rows] if lengths[n] == length]
            arrays = np.zeros((3, rows, length), np.int32)
            for row, number in enumerate(numbers):
                ids = sequences[number].ids
                arrays[0, row, : len(ids) - 1] = ids[:-1]
                arrays[1, row, : len(ids) - 1] = ids[1:]
                arrays[2, row, : len(ids) - 1] = 1
            yield numbers, arrays
            start += len(numbers)

    def _run(self, arrays: Any) -> TokenScores:
        place = sharding(self.mesh, TOKENS)
        inputs, labels, segments = (jax.device_put(array, place) for array in arrays)
        with jax.set_mesh(self.mesh):
            return _program(self.config, jnp.dtype(self.dtype).name, self.attention, self.mesh)(
                self.params, inputs, labels, segments
            )

    def _take(
        self,
        numbers: list[int],
        scores: TokenScores,
        sequences: Sequence[Wanted],
        results: dict[int, Scores],
        tick: Tick | None,
    ) -> None:
        log_likelihood, is_greedy = map(np.asarray, jax.device_get(scores))
        for row, number in enumerate(numbers):
            ids, first = sequences[number]
            scored = slice(first - 1, len(ids) - 1)
            results[number] = Scores(log_likelihood[row, scored].copy(), is_greedy[row, scored])
        if tick is not None:
            tick(len(numbers))


_PROGRAMS: dict[tuple[Any, ...], Any] = {}


def _program(config: ModelConfig, dtype: str, attention: str, mesh: Mesh) -> Any:
    """The jitted program of a model configuration; JAX compiles it once for each shape.

    The scores are replicated on all devices, so that each process of a run can read them.
    """
    key = (config, dtype, attention, mesh)
    if key not in _PROGRAMS:
        forward = partial(_forward, config, jnp.dtype(dtype), attention)
        _PROGRAMS[key] = jax.jit(forward, out_shardings=sharding(mesh, ()))
    return _PROGRAMS[key]


def _forward(
    config: ModelConfig,
    dtype: Any,
    attention: str,
    params: Params,
    inputs_BT: jax.Array,
    labels_BT: jax.Array,
    segments_BT: jax.Array,
) -> TokenScores:
    decoder: Decoder = nnx.merge(layout(config).graphdef, params)
    # Rotary embeddings of some models depend on the text's length, which padding must not change.
    segments = segments_BT if spans_until(config) is not None else None
    # By default, GPUs round the inputs of float32 matmuls to 10 bits of mantissa (TF32).
    precise = "highest" if dtype == jnp.float32 else "default"
    with jax.default_matmul_precision(precise):
        x_BTD = decoder.hidden(inputs_BT, segments, Compute(dtype, attention))
        return token_scores(x_BTD, decoder.head_VD, labels_BT, config.vocab_size)
