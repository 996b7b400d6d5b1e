"""What does cross-entropy in chunks cost, compared with all logits at once?

    python benchmarks/cross_entropy.py --out benchmarks/results/NAME.json

First the kernel of softmax and gradient alone, with logits in float32 and in bfloat16: us, and the
share of the specified bandwidth if it reads each logit and writes each gradient once.

Then time and memory of the loss and of the gradients of hidden states and head. On a GPU in bfloat16:
stanza's head, where both fit, with training's chunks and with others; and 65,536 tokens by 131,072
words, where the logits alone would take 32 GiB. Elsewhere in float32 and small. Temporaries are the
memory of the compiled program besides its inputs and results; the gradients are results. Errors are
those of the gradients, against all logits at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from harness import alternate, parser, repeated, report
from jax.experimental import pallas

from consyn_jax.distributed.hardware import described_gpu, described_memory
from consyn_jax.model.arithmetic import LOGITS_AT_ONCE
from consyn_jax.model.kernels.softmax_gradient import softmax_gradient
from consyn_jax.training.loss import GPU_CHUNKS, Chunks, cross_entropy, head_loss

TRAINING = "as in training"
SLOWER = 1.03  # at most, with training's chunks, where both fit
SOFTMAX = (2_048, 49_152)  # tokens and words


class Size(NamedTuple):
    """The sizes of one head."""

    tokens: int
    words: int
    width: int
    plain_fits: bool


SIZES = {
    "stanza": Size(16_384, 49_152, 2048, True),
    "131,072 words": Size(65_536, 131_072, 2048, False),
}
SMALL = {"small": Size(2_048, 8_192, 256, True)}


def plain(x: Any, head: Any, labels: Any, mask: Any) -> jax.Array:
    """All logits at once, in float32."""
    logits = jnp.einsum("BTD,VD->BTV", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
    return cross_entropy(logits, labels, mask).nll


def chunked(x: Any, head: Any, labels: Any, mask: Any, chunks: Chunks) -> jax.Array:
    """In chunks, as in training."""
    return head_loss(x, head, labels, mask, head.shape[0], chunks).nll


def losses_of(size: Size, on_gpu: bool) -> dict[str, Callable[..., jax.Array]]:
    """The losses to compare, by name."""
    elements = size.tokens * size.words // 16  # small sizes get as many chunks
    training = Chunks(elements)
    if on_gpu:
        training = GPU_CHUNKS._replace(gpu_bytes=described_memory(jax.devices()[0].device_kind))
    losses: dict[str, Callable[..., jax.Array]] = {"all at once": plain} if size.plain_fits else {}
    losses[TRAINING] = partial(chunked, chunks=training)
    others = (LOGITS_AT_ONCE, 4 * LOGITS_AT_ONCE) if on_gpu else (elements // 2, 4 * elements)
    for other in others:
        name = f"{other / 2**20:.3g} Mi at once"
        losses[name] = partial(chunked, chunks=training._replace(elements=other))
    if training.kernel:
        losses["without the kernel"] = partial(chunked, chunks=training._replace(kernel=False))
        rounded = training._replace(logits_dtype=jnp.bfloat16)
        losses["in bfloat16"] = partial(chunked, chunks=rounded)
    return losses


def measure(tiny: bool = False) -> dict[str, Any]:
    """Milliseconds, MB and errors by size and chunk."""
    on_gpu = jax.default_backend() == "gpu" and not tiny
    dtype = jnp.bfloat16 if on_gpu else jnp.float32
    rows = measure_softmax(on_gpu, 3 if tiny else 7)
    for name, size in (SIZES if on_gpu else SMALL).items():
        found = measure_size(size, dtype, on_gpu, 3 if tiny else 7)
        rows += [{"head": name, **row} for row in found]
    ratio = next(row["against all at once"] for row in rows if row["logits"] == TRAINING)
    return {"rows": rows, "dtype": jnp.dtype(dtype).name, "slower": ratio, "holds": ratio <= SLOWER}


def measure_softmax(on_gpu: bool, rounds: int) -> list[dict[str, Any]]:
    """The rows of the kernel alone. Without a GPU it is interpreted, and small."""
    (n, words), calls = (SOFTMAX, 20) if on_gpu else ((8, 512), 1)
    contestants, sizes = {}, {}
    for dtype in (jnp.float32, jnp.bfloat16):
        name = f"softmax kernel, {jnp.dtype(dtype).name}"
        contestants[name] = _softmax_turn(n, words, dtype, calls, interpret=not on_gpu)
        sizes[name] = n * words * (jnp.dtype(dtype).itemsize + jnp.dtype(jnp.bfloat16).itemsize)
    gpu = described_gpu(jax.devices()[0].device_kind)
    rows = []
    for name, times in alternate(contestants, rounds).items():
        seconds = float(np.median(times)) / calls
        rate = sizes[name] / seconds
        rows.append(
            {
                "head": f"{n:,} x {words:,}",
                "logits": name,
                "us": 1e6 * seconds,
                "share of bandwidth": rate / gpu.memory_bandwidth if on_gpu and gpu else None,
            }
        )
    return rows


def _softmax_turn(
    n: int, words: int, dtype: Any, calls: int, interpret: bool
) -> Callable[[], None]:
    """Make a turn of `calls` calls of the kernel in one program, without any copy between them.

    Each call gets its weights from the one before, so that all are executed. Where the gradient
    overwrites the logits, it is what the next call reads.
    """
    keys = jax.random.split(jax.random.key(0), 2)
    labels = jax.random.randint(keys[1], (n,), 0, words)

    def turn_of(logits: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        for _ in range(calls):  # not a loop of XLA, which has small kernels of its own
            gradient, _, weights, *_ = softmax_gradient(
                logits, labels, weights, words, 0.0, 0.0, jnp.bfloat16
            )
            logits = gradient if dtype == jnp.bfloat16 else logits
        return logits, weights

    carry = 3 * jax.random.normal(keys[0], (n, words), dtype), jnp.ones(n)
    run = partial(pallas.pallas_call, interpret=interpret)
    with mock.patch.object(pallas, "pallas_call", run):
        step = jax.jit(turn_of, donate_argnums=(0, 1)).lower(*carry).compile()

    def turn() -> None:
        nonlocal carry
        carry = jax.block_until_ready(step(*carry))

    return turn


def measure_size(size: Size, dtype: Any, on_gpu: bool, rounds: int) -> list[dict[str, Any]]:
    """The rows of one size."""
    keys, calls = jax.random.split(jax.random.key(0), 3), 5 if on_gpu else 1
    x = jax.random.normal(keys[0], (1, size.tokens, size.width)).astype(dtype)
    head = 0.02 * jax.random.normal(keys[1], (size.words, size.width))
    labels = jax.random.randint(keys[2], (1, size.tokens), 0, size.words)
    inputs = x, head, labels, jnp.ones((1, size.tokens), bool)
    steps = {
        label: jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*inputs).compile()
        for label, loss in losses_of(size, on_gpu).items()
    }
    errors = _errors(steps, inputs) if size.plain_fits else {}
    turns = {label: repeated(partial(step, *inputs), calls) for label, step in steps.items()}
    medians = {
        label: float(np.median(times)) / calls for label, times in alternate(turns, rounds).items()
    }
    flops = 6.0 * size.tokens * size.words * size.width
    return [
        {
            "logits": label,
            "ms": 1e3 * median,
            "against all at once": median / medians["all at once"] if size.plain_fits else None,
            "TFLOP/s": flops / median / 1e12,
            "temporary MB": steps[label].memory_analysis().temp_size_in_bytes / 1e6,
            "error": errors.get(label),
        }
        for label, median in medians.items()
    ]


def _errors(steps: dict[str, Any], inputs: tuple[jax.Array, ...]) -> dict[str, float]:
    """The largest relative error of each loss's gradients."""
    expected, errors = steps["all at once"](*inputs)[1], {}
    for label, step in steps.items():
        pairs = zip(step(*inputs)[1], expected, strict=True)
        errors[label] = max(float(_norm(found - e) / _norm(e)) for found, e in pairs)
    return errors


def _norm(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x.astype(jnp.float32).ravel())


def main() -> None:
    """Run, print the table, write JSON."""
    given = parser(__doc__).parse_args()
    report(measure(given.tiny), given.out)


if __name__ == "__main__":
    main()
