"""How fast is each attention, forward and backward, and how much do documents cost?

    python benchmarks/attention.py --out benchmarks/results/NAME.json
    python benchmarks/attention.py --tiles        also with other tiles, to tune the kernel's table

Layers of the presets in bfloat16. On an NVIDIA GPU these are compared: cuDNN's causal kernel on
whole rows, which is the baseline for documents; cuDNN with the documents as a mask; this package's
kernels, on Hopper both, on whole rows and on documents; XLA's operations on documents. Elsewhere
only XLA's run. Each is first checked in one row and one group of heads against the reference in
float32. TFLOP/s count only pairs of tokens that attend to each other.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import alternate, parser, repeated, report

from consyn_jax.model.attention import BACKENDS, causal_attention
from consyn_jax.model.kernels.reference_attention import (
    Documents,
    attend,
    attention_mask,
    documents,
)

MEAN_LENGTH = 512  # of a document, in tokens
BOUND = 0.01  # relative error in bfloat16
PASSES = 3.5  # a forward pass is two matmuls, a backward pass five


class Layer(NamedTuple):
    """Sizes of one attention layer."""

    B: int
    T: int
    N: int
    K: int
    H: int


LAYERS = {
    "verse": Layer(16, 2048, 12, 12, 64),
    "stanza": Layer(4, 4096, 16, 8, 128),
    "epic": Layer(2, 4096, 40, 8, 128),
}
SMALL = {"small": Layer(2, 256, 4, 2, 32)}
Attention = Callable[[Any, Any, Any, Documents], jax.Array]


def contestants() -> Iterator[tuple[str, bool, Attention]]:
    """The attentions of this device: name, whether rows hold documents, and the function."""
    xla = partial(causal_attention, backend="xla")
    if jax.default_backend() != "gpu":
        yield "XLA", False, lambda q, k, v, inside: xla(q, k, v, None)
        yield "XLA", True, xla
        return
    fused = partial(causal_attention, backend="fused")
    yield "cuDNN, causal", False, causal_cudnn
    yield "kernel", False, fused
    yield "kernel", True, fused
    yield "cuDNN, mask", True, masked_cudnn
    yield "XLA", True, xla


def causal_cudnn(q: Any, k: Any, v: Any, inside: Documents) -> jax.Array:
    """cuDNN on whole rows."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def masked_cudnn(q: Any, k: Any, v: Any, inside: Documents) -> jax.Array:
    """cuDNN with the documents as a mask over all pairs of tokens."""
    positions = jnp.arange(q.shape[1])
    return jax.nn.dot_product_attention(
        q, k, v, mask=attention_mask(positions, positions, inside.first_BT), implementation="cudnn"
    )


def with_tiles() -> Iterator[tuple[str, Attention]]:
    """The kernel with other tiles for one of its three kernels, and a name for each."""
    from consyn_jax.model.kernels.document_attention import Tile, document_attention, tiles_for

    def attention(q: Any, k: Any, v: Any, inside: Documents, which: str, tile: Tile) -> jax.Array:
        tiles = dataclasses.replace(tiles_for(q.shape[3]), **{which: tile})
        return document_attention(q, k, v, *inside, tiles=tiles)

    for which in ("forward", "queries", "keys"):
        for own, step, warps, stages in (
            (64, 64, 4, 2),
            (64, 64, 4, 3),
            (128, 32, 4, 3),
            (128, 64, 8, 3),
            (128, 128, 8, 2),
            (128, 128, 8, 3),
        ):
            tile = Tile(own, step, warps, stages)
            yield (
                f"kernel, {which} {own} x {step}, {warps} warps, {stages} stages",
                partial(attention, which=which, tile=tile),
            )


def packed(layer: Layer) -> np.ndarray:
    """Segment ids of rows cut from a sequence of documents, as packing does."""
    rng, tokens = np.random.default_rng(0), layer.B * layer.T
    lengths = rng.geometric(1 / min(MEAN_LENGTH, layer.T // 4), tokens)
    return np.repeat(np.arange(tokens), lengths)[:tokens].reshape(layer.B, layer.T).astype(np.int32)


def pairs(segments: np.ndarray) -> float:
    """The number of pairs of tokens that attend to each other."""
    lengths = np.concatenate([np.unique(row, return_counts=True)[1] for row in segments]).astype(
        float
    )
    return float((lengths * (lengths + 1) / 2).sum())


def both_ways(
    attention: Attention, q: Any, k: Any, v: Any, dout: Any, inside: Documents
) -> tuple[jax.Array, ...]:
    """Output and gradients."""
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, inside), q, k, v)
    return (out, *pull(dout))


def one_group(given: tuple[jax.Array, ...], group: int) -> tuple[jax.Array, ...]:
    """Inputs and output gradient of one row and one group of heads."""
    return tuple(x[:1, :, :heads] for x, heads in zip(given, (group, 1, 1, group), strict=True))


def reference(part: tuple[jax.Array, ...], inside: Documents) -> tuple[jax.Array, ...]:
    """Output and gradients in float32."""
    row = Documents(*(a[:1] for a in inside))
    positions = jnp.arange(part[0].shape[1])

    def exact(q: Any, k: Any, v: Any, inside: Documents) -> jax.Array:
        return attend(q, k, v, attention_mask(positions, positions, inside.first_BT))

    with jax.default_matmul_precision("highest"):
        found = jax.jit(partial(both_ways, exact))(*(x.astype(jnp.float32) for x in part), row)
    return jax.block_until_ready(found)


def distance(
    attention: Attention,
    part: tuple[jax.Array, ...],
    inside: Documents,
    expected: tuple[jax.Array, ...],
) -> float:
    """Largest relative error of output and gradients."""
    row = Documents(*(a[:1] for a in inside))
    found = jax.jit(partial(both_ways, attention))(*part, row)
    return max(
        float(jnp.linalg.norm(f.astype(jnp.float32) - e) / jnp.linalg.norm(e))
        for f, e in zip(found, expected, strict=True)
    )


def measure(tiny: bool = False, other_tiles: bool = False, budget_s: float = 1e9) -> dict[str, Any]:
    """Milliseconds of forward and backward pass together, temporary memory and errors.

    Args:
        other_tiles: also measure those of `with_tiles`.
        budget_s: seconds for everything; each layer has its share, and attentions that begin after
            it are left out and named.
    """
    on_gpu = jax.default_backend() == "gpu"
    layers = LAYERS if on_gpu and not tiny else SMALL
    tiles = with_tiles() if other_tiles and on_gpu else ()
    optional = [(name, docs, attention) for name, attention in tiles for docs in (False, True)]
    if on_gpu and jax.devices()[0].compute_capability.startswith(BACKENDS["hopper"].capability):
        hopper = partial(causal_attention, backend="hopper")  # has not run on a GPU yet
        optional = [("kernel for Hopper", docs, hopper) for docs in (False, True)] + optional
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    ends = time.monotonic() + budget_s
    for number, (preset, layer) in enumerate(layers.items()):
        share_s = (ends - time.monotonic()) / (len(layers) - number)
        found, failed = measure_layer(layer, optional, tiny, share_s)
        rows += [{"layer": preset, **row} for row in found]
        absent |= {f"{preset}, {label}": error for label, error in failed.items()}
    return {
        "rows": rows,
        "not_here": absent,
        "layers": {name: layer._asdict() for name, layer in layers.items()},
        "mean_document": MEAN_LENGTH,
    }


def measure_layer(
    layer: Layer, optional: list[tuple[str, bool, Attention]], tiny: bool, budget_s: float
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of one layer, and the errors of attentions that this GPU cannot run.

    Args:
        optional: attentions that may fail, because their tiles do not fit or no GPU has run them.
        budget_s: after this many seconds no other attention begins.
    """
    ends = time.monotonic() + 0.7 * budget_s  # the rest is for taking turns
    keys, heads = jax.random.split(jax.random.key(0), 4), (layer.N, layer.K, layer.K, layer.N)
    given = tuple(
        jax.random.normal(key, (layer.B, layer.T, n, layer.H), jnp.bfloat16)
        for key, n in zip(keys, heads, strict=True)
    )
    segments = {False: np.zeros((layer.B, layer.T), np.int32), True: packed(layer)}
    inside = {docs: documents(jnp.asarray(ids)) for docs, ids in segments.items()}
    part = one_group(given, layer.N // layer.K)
    expected = {docs: reference(part, inside[docs]) for docs in inside}
    calls, rounds = (3, 3) if tiny else (10, 5)
    turns, about, failed = {}, {}, {}
    for name, docs, attention in [*contestants(), *optional]:
        label = f"{name}, {'documents' if docs else 'whole rows'}"
        if turns and time.monotonic() > ends:
            failed[label] = "no time was left"
            continue
        try:
            error = distance(attention, part, inside[docs], expected[docs])
            step = jax.jit(partial(both_ways, attention)).lower(*given, inside[docs]).compile()
        except jax.errors.JaxRuntimeError as failure:
            if attention not in [tried for _, _, tried in optional]:
                raise
            failed[label] = str(failure).splitlines()[0][:200]
            continue
        turns[label] = repeated(partial(step, *given, inside[docs]), calls)
        about[label] = error, step.memory_analysis().temp_size_in_bytes, pairs(segments[docs])
    seconds = alternate(turns, rounds)
    medians = {label: float(np.median(times)) / calls for label, times in seconds.items()}
    base = medians[next(iter(medians))]
    return [
        _row(layer, label, median, base, *about[label]) for label, median in medians.items()
    ], failed


def _row(
    layer: Layer, label: str, median: float, base: float, error: float, temporary: int, seen: float
) -> dict[str, Any]:
    flops = PASSES * 4 * seen * layer.N * layer.H
    return {
        "attention": label,
        "ms": 1e3 * median,
        "against the first": median / base,
        "TFLOP/s": flops / median / 1e12,
        "temporary MB": temporary / 1e6,
        "error": error,
        "right": error <= BOUND,
    }


def main() -> None:
    """Run, print the table, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--tiles", action="store_true", help="also other tiles for the kernel")
    arguments.add_argument(
        "--budget_s", type=float, default=1e9, help="seconds, after which no attention begins"
    )
    given = arguments.parse_args()
    report(measure(given.tiny, given.tiles, given.budget_s), given.out)


if __name__ == "__main__":
    main()
