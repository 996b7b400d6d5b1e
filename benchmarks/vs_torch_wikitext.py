"""Does this trainer reach the same loss as torch on the test set of WikiText-2, in bits per byte?

Ours is configs/wikitext-2.yaml, run as `consyn-train` runs it. torch's is transformers' own model,
loaded from our exported initial weights, and trained by torch.optim.AdamW with the same rates,
decay and clipping for as many steps on the very same batches. Each is judged by its own evaluation
over the whole of valid.txt and test.txt, in the same windows; a byte is a byte of the file. After
an interruption, ours continues from its last checkpoint in --output, and torch starts again.

    python benchmarks/vs_torch_wikitext.py --data PATH/TO/wikitext-2 --output runs/wikitext-2 \
        --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or torch's threads spin under other load

import harness
import numpy as np
import torch
import transformers
from harness import facts, write
from torch_optimizers import adamw

from consyn_jax.config import architecture
from consyn_jax.config_file import read_config_file
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.resolve import resolve
from consyn_jax.training import ConsynTrainer
from consyn_jax.training.dataset import ConsynDataset, get_dataset
from consyn_jax.training.logging.metrics import read_metrics

RECIPE = Path(__file__).parents[1] / "configs" / "wikitext-2.yaml"
Batch = dict[str, np.ndarray]


def datasets(data: Any) -> dict[str, ConsynDataset]:
    """The official parts, each one document, with the tokenizer of the training text."""
    raw = {"normalize": data.normalize, "control_characters": data.control_characters}
    both = {**raw, "validation": data.validation}
    found = {
        name: get_dataset(data.data, data.tokenizer, data.max_tokens, split=name, **both)
        for name in ("train", "validation")
    }
    test = Path(data.data[0]).with_name("test.txt")
    found["test"] = get_dataset(
        test, found["train"].tokenizer, data.max_tokens, validation_fraction=0.0, **raw
    )
    files = {"train": data.data[0], "validation": data.validation[0], "test": test}
    for name, file in files.items():
        assert found[name].num_bytes == Path(file).stat().st_size, name
    return found


class Clock:
    """Wall and processor seconds of this process since the clock was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {
            "wall_s": time.perf_counter() - self._began[0],
            "cpu_s": time.process_time() - self._began[1],
        }


def batches_of(trainer: ConsynTrainer) -> Iterator[Batch]:
    """Our training batches, step by step, each array [B, T]."""
    size = trainer.run.budget.batch_size
    for batch in trainer.train_source.training(0, size, 1, np.arange(size)):
        yield {name: values[0] for name, values in batch.items()}


def torch_nll(model: Any, batch: Batch) -> torch.Tensor:
    """The summed loss of the tokens of a batch [B, T].

    Every window is within one document and padded at its end, so causal attention is enough.
    """
    assert np.array_equal(batch["segment_ids"], batch["loss_mask"])
    logits = model(torch.from_numpy(batch["input_ids"]).long()).logits
    labels = torch.from_numpy(np.where(batch["loss_mask"], batch["labels"], -100)).long()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )


@torch.no_grad()
def torch_bits_per_byte(model: Any, dataset: ConsynDataset, batch_size: int) -> float:
    """Bits per byte over all windows of a part."""
    packed = dataset.packed
    chunks = np.array_split(np.arange(len(packed)), math.ceil(len(packed) / batch_size))
    nll = sum(torch_nll(model.eval(), packed.rows(rows)).item() for rows in chunks)
    return nll / math.log(2) / (dataset.num_bytes or math.nan)


def train_ours(trainer: ConsynTrainer, output: Path, test: ConsynDataset) -> dict[str, Any]:
    """Run our trainer and read the curves from its log."""
    clock = Clock()
    trainer.train()
    seconds = clock.read()
    lines = read_metrics(output / "metrics.jsonl")
    valid = {
        line["step"]: line["eval/bits_per_byte"] for line in lines if "eval/bits_per_byte" in line
    }
    tester = ConsynTrainer(trainer.model, test, test, run=(trainer.run, trainer.origins))
    bits = {
        "valid": valid[trainer.total_steps],
        "test": tester.evaluate()["eval/bits_per_byte"],
    }
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    counted = {"bits_per_byte": bits, "tokens": lines[-1]["tokens"], **seconds}
    return {**counted, "loss": losses, "valid": valid}


def train_theirs(
    model: Any,
    trainer: ConsynTrainer,
    parts: dict[str, ConsynDataset],
    logged: dict[int, float],
    valid: dict[int, float],
) -> dict[str, Any]:
    """Take the same steps in torch, and log and evaluate at the same steps as ours."""
    options, batch_size = trainer.run.optimizer, trainer.run.budget.batch_size
    assert options.beta2 is not None
    assert options.weight_decay is not None
    optimizer = adamw(
        list(model.parameters()), options.beta1, options.beta2, options.eps, options.weight_decay
    )
    rates = np.asarray(trainer.schedule(np.arange(trainer.total_steps)))
    found: dict[str, dict[int, float]] = {"loss": {}, "valid": {}}
    clock, tokens = Clock(), 0
    for number, batch in enumerate(islice(batches_of(trainer), trainer.total_steps), start=1):
        for group in optimizer.param_groups:
            group["lr"] = float(rates[number - 1])
        loss = torch_nll(model.train(), batch) / batch["loss_mask"].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int(batch["loss_mask"].sum())
        if number in logged:
            found["loss"][number] = loss.item()
        if number in valid:
            found["valid"][number] = torch_bits_per_byte(model, parts["validation"], batch_size)
            print(
                f"torch step {number:5}  {clock.read()}  valid {found['valid'][number]:.4f} bits "
                f"per byte, ours {valid[number]:.4f}",
                flush=True,
            )
    seconds = clock.read()
    bits = {
        "valid": found["valid"][trainer.total_steps],
        "test": torch_bits_per_byte(model, parts["test"], batch_size),
    }
    return {"bits_per_byte": bits, "tokens": tokens, **seconds, **found}


def parse_arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__, tiny=False)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="a directory with train.txt, valid.txt and test.txt",
    )
    parser.add_argument("--output", type=Path, required=True, help="our run directory")
    parser.add_argument("--max_steps", type=int, help="fewer than the recipe's, to try this script")
    return parser.parse_args()


def prepare(
    data: Path, output: Path, max_steps: int | None
) -> tuple[ConsynTrainer, Any, dict[str, ConsynDataset]]:
    """Our trainer, torch's model with the same weights, and the data."""
    given = {
        "data": [str(data / "train.txt")],
        "validation": [str(data / "valid.txt")],
        "output": str(output),
    }
    given |= {"max_steps": max_steps} if max_steps else {}
    run = resolve(given, read_config_file(RECIPE), file_name=RECIPE.name)
    parts = datasets(run[0].data)
    ids = parts["train"].tokenizer
    names = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    shape = architecture(run[0].model, **{name: getattr(ids, name) for name in names})
    initial = ConsynLMHeadModel.from_config(shape, run[0].budget.seed)
    with tempfile.TemporaryDirectory() as exported:
        initial.save_pretrained(exported)
        model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    return ConsynTrainer(initial, parts["train"], parts["validation"], run=run), model, parts


def compare_first_batch(
    trainer: ConsynTrainer, model: Any, parts: dict[str, ConsynDataset]
) -> dict[str, float]:
    """The losses of both before training, which must agree."""
    first, run = next(batches_of(trainer)), (trainer.run, trainer.origins)
    ours = ConsynTrainer(trainer.model, parts["train"], [first], run=run).evaluate()["eval/loss"]
    with torch.no_grad():
        theirs = torch_nll(model, first).item() / int(first["loss_mask"].sum())
    found = {"consyn_jax": ours, "torch": theirs}
    print("loss of the first batch before training:", found, flush=True)
    assert abs(ours / theirs - 1) < 1e-5
    return found


def main() -> None:
    """Run, print the verdict, write JSON."""
    arguments = parse_arguments()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # JAX does so itself
    trainer, model, parts = prepare(arguments.data, arguments.output, arguments.max_steps)
    at_start = compare_first_batch(trainer, model, parts)
    ours = train_ours(trainer, arguments.output, parts["test"])
    theirs = train_theirs(model, trainer, parts, ours["loss"], ours["valid"])
    assert ours["tokens"] == theirs["tokens"]
    both = {"consyn_jax": ours, "torch": theirs}
    bits = {name: one["bits_per_byte"] for name, one in both.items()}
    summary = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": trainer.total_steps,
        "tokens": ours["tokens"],
        "epochs": ours["tokens"] / parts["train"].num_tokens,
        "bits_per_byte": bits,
        "relative_difference": {
            part: bits["consyn_jax"][part] / bits["torch"][part] - 1 for part in ("valid", "test")
        },
        "loss_before_training": at_start,
        "seconds": {
            name: {clock: one[clock] for clock in ("wall_s", "cpu_s")} for name, one in both.items()
        },
    }
    print(json.dumps(summary, indent=2))
    if arguments.out:
        curves = {
            name: {curve: one[curve] for curve in ("loss", "valid")} for name, one in both.items()
        }
        about = {**facts(), "torch_model": type(model).__name__}
        write(arguments.out, {**about, **summary, "curves": curves})


if __name__ == "__main__":
    main()
