"""Does a narrow type cost accuracy? float32, bfloat16, float16, fp8 and logits in bfloat16.

On tiny Shakespeare, each trains configs/shakespeare-bytes.yaml for 1,000 steps from the same
weights on the same batches, on three seeds, and is judged on the whole validation part. One more
contestant is float16 whose loss scale begins 2^16 times too high: it must recover. Where the device
has no arithmetic of a type, it is simulated by rounding after each operation, so the losses count
and the times do not.

    python benchmarks/precision.py --shakespeare input.txt --out benchmarks/results/NAME.json

Logits in bfloat16 against float32, on three texts:

    python benchmarks/precision.py --shakespeare input.txt --wikitext wikitext-2/ \\
        --enwik8 enwik8.gz --steps 200 --out benchmarks/results/NAME.json \\
        --types "bfloat16" "bfloat16 logits"
"""

from __future__ import annotations

import gzip
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
from programs import RecipeRun

from consyn_jax.config_file import read_config_file
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.tuning.shared_programs import SharedPrograms

RECIPE = Path(__file__).parents[1] / "configs" / "shakespeare-bytes.yaml"
WORDS = 4096  # of WikiText-2's vocabulary, which is learned from its training part
HELD_OUT = 100_000  # bytes of the validation parts of WikiText-2 and enwik8
ENWIK8_BYTES, ENWIK8_VALIDATION = 5_000_000, 90_000_000  # trained on; where its usual part begins
CONTESTANTS: dict[str, dict[str, Any]] = {
    "float32": {"mixed_precision": "no"},
    "bfloat16": {"mixed_precision": "bf16"},
    "fp8": {"mixed_precision": "fp8"},
    "float16": {"mixed_precision": "fp16"},
    "float16, overflowing": {"mixed_precision": "fp16"},
    "bfloat16 logits": {"mixed_precision": "bf16", "logits_dtype": "bfloat16"},
}
FIRST_SCALES = {"float16, overflowing": 2.0**32}


@dataclass(frozen=True)
class Text:
    """A text to train on.

    Attributes:
        validation: File to evaluate on; None to hold out the recipe's share of `data`.
        flags: Flags that differ from the recipe.
    """

    name: str
    data: Path
    validation: Path | None
    tokenizer: BPETokenizer
    flags: dict[str, Any]


def texts(arguments: Any, directory: Path) -> Iterator[Text]:
    """Find or write the texts that `arguments` name; the parts of texts go to `directory`."""
    if arguments.shakespeare is not None:
        yield Text("tiny Shakespeare", arguments.shakespeare, None, BPETokenizer.bytes(), {})
    if arguments.wikitext is not None:
        data, valid = arguments.wikitext / "train.txt", directory / "wikitext.txt"
        valid.write_bytes((arguments.wikitext / "valid.txt").read_bytes()[:HELD_OUT])
        yield Text("WikiText-2", data, valid, BPETokenizer.train([data], WORDS), {})
    if arguments.enwik8 is not None:
        data, valid = directory / "enwik8.txt", directory / "enwik8-validation.txt"
        with gzip.open(arguments.enwik8) as file:
            data.write_bytes(file.read(ENWIK8_BYTES))
            file.seek(ENWIK8_VALIDATION)
            valid.write_bytes(file.read(HELD_OUT))
        raw = {"normalize": "none", "control_characters": "keep", "invalid_utf8": "replace"}
        yield Text("enwik8", data, valid, BPETokenizer.bytes(), raw)


def trained(text: Text, name: str, seeds: list[int], steps: int) -> Iterator[dict[str, Any]]:
    """Validation loss of each seed after `steps`, and for float16 the final loss scale."""
    recipe, shared, evaluation = read_config_file(RECIPE), SharedPrograms(), None
    for seed in seeds:
        flags = text.flags | CONTESTANTS[name] | {"seed": seed, "max_steps": steps}
        run = RecipeRun(text.data, recipe, flags, shared, text.tokenizer, text.validation)
        evaluation = evaluation or run.evaluation
        state = run.state
        if name in FIRST_SCALES:
            scale = jnp.float32(FIRST_SCALES[name])
            state = state._replace(opt_state=state.opt_state._replace(scale=scale))
        began, metrics = time.process_time(), {}
        for _, batch in zip(range(steps), run.batches(), strict=False):
            state, metrics = run.step(state, jax.tree.map(jax.device_put, batch))
        found = {
            key: float(metrics[key])
            for key in ("loss", "loss_scale", "skipped_steps")
            if key in metrics
        }
        seconds = time.process_time() - began
        loss = evaluation(state.params)["eval/loss"]
        row = {"text": text.name, "type": name, "seed": seed, "eval_loss": loss}
        yield row | {"train_cpu_s": seconds} | found


def measure(
    found: Iterator[Text], contestants: list[str], seeds: list[int], steps: int
) -> dict[str, Any]:
    """One row per text, contestant and seed, with the distance to the first contestant.

    Their means over the seeds, and the largest, are under "distances".
    """
    rows: list[dict[str, Any]] = []
    distances: list[dict[str, Any]] = []
    against = f"against {contestants[0]}"
    for text in found:
        first: dict[int, float] = {}
        for name in contestants:
            own: list[float] = []
            for row in trained(text, name, seeds, steps):
                own.append(row["eval_loss"] / first.setdefault(row["seed"], row["eval_loss"]) - 1)
                rows.append(row | {against: own[-1]})
                print(rows[-1], flush=True)
            of_type = {"mean": statistics.fmean(own), "largest": max(own, key=abs)}
            distances.append({"text": text.name, "type": name, **of_type})
    return {"steps": steps, "rows": rows, "distances": distances}


def main() -> None:
    """Run, print the table, write JSON."""
    parser = harness.parser(__doc__)
    parser.add_argument("--shakespeare", type=Path, help="tiny Shakespeare, input.txt")
    parser.add_argument("--wikitext", type=Path, help="directory of WikiText-2, with train.txt")
    parser.add_argument("--enwik8", type=Path, help="enwik8.gz")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--types",
        nargs="+",
        choices=CONTESTANTS,
        default=list(CONTESTANTS)[:5],
        help="the others are compared with the first",
    )
    arguments = parser.parse_args()
    seeds, steps = arguments.seeds, arguments.steps
    if arguments.tiny:
        seeds, steps = seeds[:1], 25
    with tempfile.TemporaryDirectory() as directory:
        found = texts(arguments, Path(directory))
        harness.report(measure(found, arguments.types, seeds, steps), arguments.out)


if __name__ == "__main__":
    main()
