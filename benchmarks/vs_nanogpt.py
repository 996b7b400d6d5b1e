"""How long do we take to reach nanoGPT's final loss, compared with nanoGPT on the same CPU?

Both train on tiny Shakespeare with nanoGPT's CPU budget: 4 layers, 128 wide, batch 12 x 64, 2,000
steps, first 90 % / last 10 %. nanoGPT runs on characters with the flags of its README's CPU recipe,
from the checkout that `--nanogpt` names; ours is configs/shakespeare-bytes.yaml. Blocks of steps
take turns, so that noise affects both. Only training steps are timed, with batch preparation and
without evaluation. At the end each is judged on the WHOLE validation part.

    python benchmarks/vs_nanogpt.py --nanogpt PATH/TO/nanoGPT --data PATH/TO/input.txt \
        --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import harness
import jax
import numpy as np
import torch
from harness import facts, write
from programs import RecipeRun

from consyn_jax.config_file import read_config_file
from consyn_jax.data.loader import prefetch

STEPS, BLOCK, EVALUATE_EVERY = 2000, 50, 50
RECIPE = Path(__file__).parents[1] / "configs" / "shakespeare-bytes.yaml"


class NanoGPT:
    """nanoGPT with the flags of its README, "I only have a macbook"."""

    def __init__(self, checkout: Path, text: str) -> None:
        sys.path.insert(0, str(checkout))
        from model import GPT, GPTConfig  # the checkout's

        torch.manual_seed(1337)
        ids_of = {c: i for i, c in enumerate(sorted(set(text)))}
        ids = torch.tensor([ids_of[c] for c in text])
        split = int(0.9 * len(ids))
        self.train, self.validation = ids[:split], ids[split:]
        sizes = {"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}
        self.model = GPT(GPTConfig(vocab_size=len(ids_of), dropout=0.0, bias=False, **sizes))
        self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

    def step(self, number: int) -> float:
        """Train one step and return its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(number)
        at = torch.randint(len(self.train) - 64, (12,))
        x = torch.stack([self.train[i : i + 64] for i in at])
        y = torch.stack([self.train[i + 1 : i + 65] for i in at])
        _, loss = self.model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @staticmethod
    def rate(step: int) -> float:
        if step < 100:
            return 1e-3 * (step + 1) / 101
        return 1e-4 + 0.5 * (1 + np.cos(np.pi * (step - 100) / (STEPS - 100))) * (1e-3 - 1e-4)

    @torch.no_grad()
    def evaluate(self) -> float:
        """The loss over the whole validation part."""
        usable = (len(self.validation) - 1) // 64 * 64
        x = self.validation[:usable].view(-1, 64)
        y = self.validation[1 : usable + 1].view(-1, 64)
        losses = [
            self.model(x[i : i + 64], y[i : i + 64])[1].item() * len(x[i : i + 64])
            for i in range(0, len(x), 64)
        ]
        return sum(losses) / len(x)


class Ours:
    """consyn_jax with the shipped recipe."""

    def __init__(self, data: Path) -> None:
        self.run = RecipeRun(data, read_config_file(RECIPE))
        self.batches = iter(prefetch(self.run.batches(), transform=_to_device))

    def step(self, number: int) -> float:
        """Train one step and return its loss."""
        self.run.state, metrics = self.run.step(self.run.state, next(self.batches))
        return float(metrics["loss"])

    def evaluate(self) -> float:
        """The loss over the whole validation part."""
        return self.run.evaluation(self.run.state.params)["eval/loss"]


def _to_device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jax.device_put(values) for name, values in batch.items()}


def race(contestants: dict[str, NanoGPT | Ours]) -> dict[str, Any]:
    """Blocks of steps in turn: seconds of training, and validation loss at each evaluation."""
    results: dict[str, Any] = {
        name: {"train_s": 0.0, "block_s": [], "curve": []} for name in contestants
    }
    for first in range(0, STEPS, BLOCK):
        for name, contestant in contestants.items():
            began, done = time.perf_counter(), first + BLOCK
            for number in range(first, done):
                contestant.step(number)
            elapsed = time.perf_counter() - began
            result = results[name]
            result["train_s"] += elapsed
            result["block_s"].append(elapsed)
            if done % EVALUATE_EVERY == 0 and (name == "consyn_jax" or done == STEPS):
                loss, seconds = contestant.evaluate(), result["train_s"]
                result["curve"].append({"step": done, "train_s": seconds, "loss": loss})
                print(
                    f"{name:10} step {done:5}  {seconds:6.1f} s  validation {loss:.4f}", flush=True
                )
    return results


def main() -> None:
    """Run, print the verdict, write JSON."""
    parser = harness.parser(__doc__, tiny=False)
    parser.add_argument(
        "--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT"
    )
    parser.add_argument("--data", type=Path, required=True, help="tiny Shakespeare, input.txt")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    ours = Ours(arguments.data)
    nanogpt = NanoGPT(arguments.nanogpt, arguments.data.read_text())
    results = race({"nanoGPT": nanogpt, "consyn_jax": ours})
    theirs, own = results["nanoGPT"], results["consyn_jax"]
    goal = theirs["curve"][-1]["loss"]
    reached = next((point for point in own["curve"] if point["loss"] <= goal), None)
    summary = {
        "nanogpt_final_loss": goal,
        "nanogpt_train_s": theirs["train_s"],
        "consyn_final_loss": own["curve"][-1]["loss"],
        "consyn_train_s": own["train_s"],
        "consyn_parameters": ours.run.program.layout.num_parameters,
        "consyn_reached_goal": reached,
        "time_ratio_to_goal": reached and reached["train_s"] / theirs["train_s"],
        "median_step_ms": {
            name: 1e3 * float(np.median(r["block_s"])) / BLOCK for name, r in results.items()
        },
    }
    print(json.dumps(summary, indent=2))
    if arguments.out:
        write(arguments.out, {**facts(), **summary, "runs": results})


if __name__ == "__main__":
    main()
