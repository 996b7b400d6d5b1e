"""Does a ladder of four sizes predict the loss of a fifth, twice as large?

`consyn-tune --ladder` trains four sizes on the bytes of a text and fits the curve. Its prediction
for the fifth size is written down, then the same ladder goes on with that size. The text is longer
than what any size reads, so that nothing is read twice.

    python benchmarks/ladder.py --data PATH/TO/train.txt --validation PATH/TO/valid.txt \\
        --out benchmarks/results/NAME.json

With --output, the ladder stays there, and goes on if this is started again.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import jax  # noqa: F401 - its version belongs to the result

from consyn_jax.cli import tune
from consyn_jax.tuning.ladder.scaling_law import LossPoint, ScalingLaw, bootstrap, interval

LIMIT = 0.02  # of the fifth size's loss, at most
SIZES = (24e3, 54e3, 108e3, 216e3, 432e3)  # shapes of one proportion: 8 of width for a layer
EVALUATED = 200_000  # bytes of the validation text
FLAGS = (
    *("--num_kv_heads", "16", "--head_dim", "8", "--tokenizer", "bytes"),
    *("--model", "haiku", "--num_layers", "16", "--num_heads", "16"),
    *("--max_tokens", "128", "--batch_size", "8", "--parametrization", "mup"),
    *("--base_hidden_dim", "32", "--base_num_layers", "4", "--base_head_dim", "8"),
    *("--lr", "8e-3", "--lr_multipliers", "embedding=4", "--logging_backend", "none", "--quiet"),
)


def run(directory: Path, data: Path, validation: Path, sizes: Sequence[float], ratio: float) -> Any:
    """Run a ladder, or what is left of it, and return its results."""
    words = [*FLAGS, "--data", str(data), "--validation", str(validation)]
    words += ["--ladder", ",".join(f"{size:g}" for size in sizes), "--output", str(directory)]
    code = tune.main([*words, "--tokens_per_parameter", f"{ratio:g}", "--seed", "1"])
    assert code == 0, code
    return json.loads((directory / "ladder.json").read_text())


def measure(
    data: Path,
    validation: Path,
    directory: Path,
    ratio: float = 20.0,
    sizes: Sequence[float] = SIZES,
    tiny: bool = False,
) -> dict[str, Any]:
    """Fit four sizes, predict the fifth, train it, and compare."""
    began = time.perf_counter()
    sizes = sizes[1:] if tiny else sizes
    directory.mkdir(parents=True, exist_ok=True)
    held_out = directory / "validation.txt"
    held_out.write_bytes(validation.read_bytes()[: EVALUATED // (20 if tiny else 1)])
    fitted = run(directory / "ladder", data, held_out, sizes[:-1], ratio)
    law = ScalingLaw(**fitted["law"])
    laws = bootstrap([_point(found) for found in fitted["points"]])
    whole = run(directory / "ladder", data, held_out, sizes, ratio)
    rows = []
    for found in whole["points"][-4:]:
        at = found["parameters"], found["tokens"]
        predicted = law.loss(*at)
        low, high = interval([each.loss(*at) for each in laws])
        rows.append(
            {"parameters": at[0], "tokens": at[1], "measured": found["loss"]}
            | {"predicted": predicted, "from": low, "to": high}
            | {"error": predicted / found["loss"] - 1}
        )
    return {
        "question": "the fifth size's loss, predicted by four",
        "flags": " ".join(FLAGS),
        "tokens_per_parameter": ratio,
        "seconds": round(time.perf_counter() - began),
        "rows": rows,
        "holds": abs(rows[-1]["error"]) <= LIMIT,
        "four": {name: fitted[name] for name in ("law", "law_intervals", "median_error", "points")},
        "noise_scales": whole["noise_scales"],
        "critical_batch": whole["critical_batch"],
    }


def _point(found: dict[str, float]) -> LossPoint:
    return LossPoint(found["parameters"], found["tokens"], found["loss"])


def main() -> None:
    """Run, print the table, write JSON."""
    parser = harness.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a text, such as WikiText-2's")
    parser.add_argument("--validation", type=Path, required=True, help="another one")
    parser.add_argument("--output", type=Path, help="directory for the runs (a temporary one)")
    parser.add_argument("--tokens_per_parameter", type=float, default=20.0)
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=SIZES, help="the last is predicted"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.output or Path(temporary)
        ratio = 4.0 if options.tiny else options.tokens_per_parameter
        texts = options.data, options.validation
        found = measure(*texts, directory, ratio, options.sizes, options.tiny)
    harness.report(found, options.out)
    print(f"The fifth size's loss within {LIMIT:.0%}: {found['holds']}.")


if __name__ == "__main__":
    main()
