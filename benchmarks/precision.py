"""Does a narrow type cost anything? float32, bfloat16 and float16 on tiny Shakespeare, three seeds.

Each trains configs/shakespeare-bytes.yaml for 1,000 steps from the same weights on the same batches, and is judged on the whole
validation part. A fourth contestant is float16 whose scale begins 2^16 times too high: it must recover. Where the device has no
arithmetic of a type it is simulated: rounded to the type after each operation, so the losses count and the times do not.

    python benchmarks/precision.py --data PATH/TO/input.txt --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from consyn_jax.config import architecture, resolve
from consyn_jax.model.parameters import initial_parameters
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.dataset import get_dataset
from consyn_jax.training.run_directory import read_config_file
from consyn_jax.training.trainer import ConsynTrainer, ModelSource

RECIPE = Path(__file__).parents[1] / "configs" / "shakespeare-bytes.yaml"
CONTESTANTS = {"float32": ("no", None), "bfloat16": ("bf16", None), "float16": ("fp16", None), "float16, overflowing": ("fp16", 2.0**32)}


def train(data: Path, precision: str, first_scale: float | None, seed: int, steps: int) -> dict[str, float]:
    """Validation loss after `steps`, and for float16 what became of the scale."""
    given = {"data": [str(data)], "mixed_precision": precision, "seed": seed, "max_steps": steps}
    run = resolve(given, read_config_file(RECIPE), file_name=RECIPE.name)
    config = run[0]
    tokenizer = BPETokenizer.bytes()
    shape = architecture(config.model, vocab_size=tokenizer.vocab_size)
    source = ModelSource(shape, lambda mesh: initial_parameters(shape, seed, mesh))
    length, fraction = config.data.max_tokens, config.data.validation_fraction
    splits = [get_dataset(data, tokenizer, length, split=name, validation_fraction=fraction, seed=seed) for name in ("train", "validation")]
    trainer = ConsynTrainer(source, *splits, run=run)
    program = trainer.build().program
    state: Any = program.initial_state(source.make(program.mesh))
    if first_scale is not None:
        state = state._replace(opt_state=state.opt_state._replace(scale=jnp.float32(first_scale)))
    step = program.lower_train_step(1, config.budget.batch_size, length).compile()
    batches = trainer.train_source.training(0, config.budget.batch_size, 1, np.arange(config.budget.batch_size))
    began, metrics = time.perf_counter(), {}
    for _, batch in zip(range(steps), batches, strict=False):
        state, metrics = step(state, jax.tree.map(jax.device_put, batch))
    found = {name: float(metrics[name]) for name in ("loss", "loss_scale", "skipped_steps") if name in metrics}
    seconds = time.perf_counter() - began
    return {"eval_loss": trainer.evaluation(program)(state.params)["eval/loss"], "train_s": seconds, **found}


def main() -> None:
    """Run, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="tiny Shakespeare, input.txt")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in CONTESTANTS}
    for seed in arguments.seeds:
        for name, (precision, first_scale) in CONTESTANTS.items():
            result = train(arguments.data, precision, first_scale, seed, arguments.steps)
            result["against_float32"] = result["eval_loss"] / results["float32"].get(seed, result)["eval_loss"] - 1
            results[name][seed] = result
            print(f"seed {seed}  {name:21} {result}", flush=True)
    worst = {name: max(abs(r["against_float32"]) for r in by_seed.values()) for name, by_seed in results.items()}
    print("largest relative difference to float32:", {name: f"{share:.2%}" for name, share in worst.items()})
    if arguments.out:
        machine = {
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
        }
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
        facts = {**machine, "commit": commit, "date": time.strftime("%Y-%m-%d"), "steps": arguments.steps}
        arguments.out.write_text(json.dumps({**facts, "largest_difference": worst, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
