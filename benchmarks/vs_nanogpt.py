"""How long until nanoGPT's final loss? Our step and nanoGPT's, alternating in one run on the same CPU.

Both train on tiny Shakespeare with nanoGPT's CPU budget: 4 layers, 128 wide, batch 12 x 64, 2,000 steps, first 90 % / last 10 %.
nanoGPT runs by characters with the flags of its README's CPU recipe, from a checkout that `--nanogpt` names; ours is
configs/shakespeare-bytes.yaml. The two take turns, a block of steps each, so that noise of the machine meets both. Only training
steps are timed, batch preparation included, evaluation not. At the end each is judged on the WHOLE validation part.

    python benchmarks/vs_nanogpt.py --nanogpt PATH/TO/nanoGPT --data PATH/TO/input.txt --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import torch
from harness import facts, write
from programs import RecipeRun

from consyn_jax.data.loader import prefetch
from consyn_jax.training.config_file import read_config_file

STEPS, BLOCK, EVALUATE_EVERY = 2000, 50, 50
RECIPE = Path(__file__).parents[1] / "configs" / "shakespeare-bytes.yaml"


def nanogpt(checkout: Path, text: str) -> tuple[Callable[[int], float], Callable[[], float]]:
    """nanoGPT: (train one step and return its loss, loss over the whole validation part). Flags: its README, "I only have a macbook"."""
    sys.path.insert(0, str(checkout))
    from model import GPT, GPTConfig  # the checkout's

    torch.manual_seed(1337)
    ids_of = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([ids_of[c] for c in text])
    train, validation = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]
    model = GPT(GPTConfig(block_size=64, vocab_size=len(ids_of), n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

    def rate(step: int) -> float:
        if step < 100:
            return 1e-3 * (step + 1) / 101
        return 1e-4 + 0.5 * (1 + np.cos(np.pi * (step - 100) / (STEPS - 100))) * (1e-3 - 1e-4)

    def step(number: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate(number)
        at = torch.randint(len(train) - 64, (12,))
        x = torch.stack([train[i : i + 64] for i in at])
        y = torch.stack([train[i + 1 : i + 65] for i in at])
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @torch.no_grad()
    def evaluate() -> float:
        usable = (len(validation) - 1) // 64 * 64
        x, y = validation[:usable].view(-1, 64), validation[1 : usable + 1].view(-1, 64)
        losses = [model(x[i : i + 64], y[i : i + 64])[1].item() * len(x[i : i + 64]) for i in range(0, len(x), 64)]
        return sum(losses) / len(x)

    return step, evaluate


def ours(data: Path) -> tuple[Callable[[int], float], Callable[[], float], int]:
    """consyn_jax with the shipped recipe: the same two functions, and the number of parameters."""
    run = RecipeRun(data, read_config_file(RECIPE))
    batches = iter(prefetch(run.batches(), transform=_to_device))

    def step(number: int) -> float:
        run.state, metrics = run.step(run.state, next(batches))
        return float(metrics["loss"])

    return step, lambda: run.evaluation(run.state.params)["eval/loss"], run.program.layout.num_parameters


def _to_device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jax.device_put(values) for name, values in batch.items()}


def race(contestants: dict[str, tuple[Callable[[int], float], Callable[[], float]]]) -> dict[str, Any]:
    """Blocks of steps in turn: seconds of training and validation loss at each evaluation."""
    results: dict[str, Any] = {name: {"train_s": 0.0, "block_s": [], "curve": []} for name in contestants}
    for first in range(0, STEPS, BLOCK):
        for name, (step, evaluate) in contestants.items():
            began = time.perf_counter()
            for number in range(first, first + BLOCK):
                step(number)
            elapsed = time.perf_counter() - began
            result = results[name]
            result["train_s"] += elapsed
            result["block_s"].append(elapsed)
            if (first + BLOCK) % EVALUATE_EVERY == 0 and (name == "consyn_jax" or first + BLOCK == STEPS):
                result["curve"].append({"step": first + BLOCK, "train_s": result["train_s"], "loss": evaluate()})
                print(f"{name:10} step {first + BLOCK:5}  {result['train_s']:6.1f} s  validation {result['curve'][-1]['loss']:.4f}", flush=True)
    return results


def first_below(curve: list[dict[str, float]], loss: float) -> Iterator[dict[str, float]]:
    """Evaluations at which the loss is at most `loss`."""
    return (point for point in curve if point["loss"] <= loss)


def main() -> None:
    """Run, print the verdict, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--data", type=Path, required=True, help="tiny Shakespeare, input.txt")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    our_step, our_evaluate, num_parameters = ours(arguments.data)
    their_step, their_evaluate = nanogpt(arguments.nanogpt, arguments.data.read_text())
    results = race({"nanoGPT": (their_step, their_evaluate), "consyn_jax": (our_step, our_evaluate)})
    goal = results["nanoGPT"]["curve"][-1]["loss"]
    reached = next(first_below(results["consyn_jax"]["curve"], goal), None)
    summary = {
        "nanogpt_final_loss": goal,
        "nanogpt_train_s": results["nanoGPT"]["train_s"],
        "consyn_final_loss": results["consyn_jax"]["curve"][-1]["loss"],
        "consyn_train_s": results["consyn_jax"]["train_s"],
        "consyn_parameters": num_parameters,
        "consyn_reached_goal": reached,
        "time_ratio_to_goal": None if reached is None else reached["train_s"] / results["nanoGPT"]["train_s"],
        "median_step_ms": {name: 1e3 * float(np.median(r["block_s"])) / BLOCK for name, r in results.items()},
    }
    print(json.dumps(summary, indent=2))
    if arguments.out:
        write(arguments.out, {**facts(), **summary, "runs": results})


if __name__ == "__main__":
    main()
