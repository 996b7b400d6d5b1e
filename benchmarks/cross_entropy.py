"""What does cross-entropy in chunks cost, against all logits at once? Time and memory, loss and gradients of hidden states and head.

    python benchmarks/cross_entropy.py --out benchmarks/results/NAME.json

On a GPU in bfloat16: stanza's head where both fit, with the chunks of training and with other ones, and 65,536 tokens by 131,072 words, where
the logits alone would take 32 GiB. Elsewhere in float32 and small. Temporaries are what the compiled program needs beside its inputs and
results; the gradients are results. Errors are of the gradients, against all logits at once.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import alternate, parser, repeated, report

from consyn_jax.model.arithmetic import LOGITS_AT_ONCE
from consyn_jax.training.loss import GPU_CHUNKS, Chunks, cross_entropy, head_loss

TRAINING = "as in training"
SLOWER = 1.03  # at most, with the chunks of training, where both fit


class Size(NamedTuple):
    """Of one head."""

    tokens: int
    words: int
    width: int
    plain_fits: bool


SIZES = {"stanza": Size(16_384, 49_152, 2048, True), "131,072 words": Size(65_536, 131_072, 2048, False)}
SMALL = {"small": Size(2_048, 8_192, 256, True)}


def plain(x: Any, head: Any, labels: Any, mask: Any) -> jax.Array:
    """All logits at once, in float32."""
    logits = jnp.einsum("BTD,VD->BTV", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
    return cross_entropy(logits, labels, mask).nll


def chunked(x: Any, head: Any, labels: Any, mask: Any, chunks: Chunks) -> jax.Array:
    """As training has it."""
    return head_loss(x, head, labels, mask, head.shape[0], chunks).nll


def measure(tiny: bool = False) -> dict[str, Any]:
    """Milliseconds, MB and errors by size and chunk."""
    on_gpu = jax.default_backend() == "gpu" and not tiny
    dtype, calls = (jnp.bfloat16, 5) if on_gpu else (jnp.float32, 1)
    rows, medians = [], {}
    for name, size in (SIZES if on_gpu else SMALL).items():
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (1, size.tokens, size.width)).astype(dtype)
        head = 0.02 * jax.random.normal(keys[1], (size.words, size.width))
        labels, mask = jax.random.randint(keys[2], (1, size.tokens), 0, size.words), jnp.ones((1, size.tokens), bool)
        training = GPU_CHUNKS if on_gpu else Chunks(size.tokens * size.words // 16)  # on small sizes as many chunks
        losses = {"all at once": plain} if size.plain_fits else {}
        losses[TRAINING] = partial(chunked, chunks=training)
        for elements in (LOGITS_AT_ONCE, 4 * LOGITS_AT_ONCE) if on_gpu else (training.elements // 2, 4 * training.elements):
            losses[f"{elements / 2**20:.3g} Mi at once"] = partial(chunked, chunks=training._replace(elements=elements))
        if training.kernel:
            losses["without the kernel"] = partial(chunked, chunks=training._replace(kernel=False))
        steps = {label: jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, head, labels, mask).compile() for label, loss in losses.items()}
        expected = steps["all at once"](x, head, labels, mask)[1] if size.plain_fits else None
        errors = {}
        for label, step in steps.items() if expected is not None else ():
            found = step(x, head, labels, mask)[1]
            errors[label] = max(float(_norm(f - e) / _norm(e)) for f, e in zip(found, expected, strict=True))
        del expected
        seconds = alternate({label: repeated(partial(step, x, head, labels, mask), calls) for label, step in steps.items()}, 3 if tiny else 7)
        medians[name] = {label: float(np.median(times)) / calls for label, times in seconds.items()}
        flops = 6.0 * size.tokens * size.words * size.width
        for label, median in medians[name].items():
            against = median / medians[name]["all at once"] if size.plain_fits else None
            row = {"head": name, "logits": label, "ms": 1e3 * median, "against all at once": against, "TFLOP/s": flops / median / 1e12}
            rows.append({**row, "temporary MB": steps[label].memory_analysis().temp_size_in_bytes / 1e6, "error": errors.get(label)})
    both = next(iter(medians.values()))
    ratio = both[TRAINING] / both["all at once"]
    return {"rows": rows, "dtype": jnp.dtype(dtype).name, "slower": ratio, "holds": ratio <= SLOWER}


def _norm(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x.astype(jnp.float32).ravel())


def main() -> None:
    """Run, print the table, write JSON."""
    given = parser(__doc__).parse_args()
    report(measure(given.tiny), given.out)


if __name__ == "__main__":
    main()
