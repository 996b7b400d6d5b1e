"""What does cross-entropy in chunks cost, compared with all logits at once?

    python benchmarks/cross_entropy.py --out benchmarks/results/NAME.json

Time and memory of the loss and of the gradients of hidden states and head. On a GPU in bfloat16:
stanza's head, where both fit, with training's chunks and with others; and 65,536 tokens by 131,072
words, where the logits alone would take 32 GiB. Elsewhere in float32 and small. Temporaries are the
memory of the compiled program besides its inputs and results; the gradients are results. Errors are
those of the gradients, against all logits at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import alternate, parser, repeated, report

from consyn_jax.distributed.hardware import described_memory
from consyn_jax.model.arithmetic import LOGITS_AT_ONCE
from consyn_jax.model.kernels.softmax_gradient import softmax_gradient
from consyn_jax.training.loss import GPU_CHUNKS, Chunks, cross_entropy, head_loss

TRAINING = "as in training"
SLOWER = 1.03  # at most, with training's chunks, where both fit


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
    rows: list[dict[str, Any]] = []
    for name, size in (SIZES if on_gpu else SMALL).items():
        found = measure_size(size, dtype, on_gpu, 3 if tiny else 7)
        rows += [{"head": name, **row} for row in found]
    if on_gpu:
        rows.append(softmax_kernel())
    first = rows[0]["head"]
    ratio = next(
        row["against all at once"]
        for row in rows
        if (row["head"], row["logits"]) == (first, TRAINING)
    )
    return {"rows": rows, "dtype": jnp.dtype(dtype).name, "slower": ratio, "holds": ratio <= SLOWER}


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


def softmax_kernel(tokens: int = 2048, words: int = 49_152) -> dict[str, Any]:
    """The row of the kernel for the softmax and its gradient, alone, on float32 logits."""
    keys = jax.random.split(jax.random.key(0))
    logits = jax.random.normal(keys[0], (tokens, words))
    labels = jax.random.randint(keys[1], (tokens,), 0, words)

    @jax.jit
    def kernel(logits: Any, labels: Any, weights: Any) -> Any:
        return softmax_gradient(logits, labels, weights, words, 0.0, 0.0, jnp.bfloat16)

    turn = repeated(partial(kernel, logits, labels, jnp.ones(tokens)), 50)
    (seconds,) = alternate({"": turn}, 7).values()
    size = f"{tokens:,} x {words:,}"
    return {"head": size, "logits": "softmax kernel", "ms": 1e3 * float(np.median(seconds)) / 50}


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
