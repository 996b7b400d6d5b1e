"""Show that a change of the code changes no number: short runs, bit for bit as before.

    python benchmarks/unchanged.py --output before.json            # at the old commit
    python benchmarks/unchanged.py --output after.json --against before.json

Each run is a whole `consyn-train` command. What it logs (losses, norms, rates, evaluations,
events; not clocks and memory) and the bytes of its final weights are recorded. Exit code 1 names
the runs and values that differ. Record both files on one machine: another processor or another
JAX gives other last bits. With `--gpu`, programs are instead compiled for GPUs (this needs the
`cuda13` extra and no GPU), and their kernels, memory and collectives are recorded.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from consyn_jax.config import architecture
from consyn_jax.config_file import read_config_file
from consyn_jax.planning.aot import compile_train_step
from consyn_jax.resolve import resolve

ROOT = Path(__file__).parents[1]
CHANGING = re.compile(r"time_s|time/.*|throughput/.*|memory/.*|run")  # `run` is a random identity
TINY = (
    "--model haiku --hidden_dim 32 --num_heads 2 --num_kv_heads 1 --num_layers 2 --tokenizer bytes "
    "--max_tokens 64 --batch_size 8 --logging_steps 1 --eval_steps 6 --save_steps 5 "
    "--logging_backend none --validation_fraction 0.1 --data {data}"
)
STEPS = "--max_steps 20"
RUNS = {
    "adamw, accumulation, dropout, smoothing": f"{STEPS} --gradient_accumulation_steps 2 "
    "--dropout 0.1 --label_smoothing 0.1 --z_loss 1e-4",
    "muon, wsd, untied, multipliers": f"{STEPS} --optimizer muon --scheduler wsd "
    "--tie_embeddings false --lr_multipliers embedding=2,norms=0.5",
    "adafactor, linear, bf16": f"{STEPS} --optimizer adafactor --scheduler linear "
    "--mixed_precision bf16 --gradient_checkpointing",
    "lion, plateau": f"{STEPS} --optimizer lion --scheduler plateau --plateau_patience 1 "
    "--eval_steps 2 --lr 1e-2",
    "schedule-free, bf16 moments": f"{STEPS} --optimizer schedule_free_adamw "
    "--moment_dtype bfloat16 --early_stopping_patience 2",
    "sgd, restarts, fp16": f"{STEPS} --optimizer sgd --scheduler cosine_with_restarts "
    "--mixed_precision fp16 --lr 1e-2 --on_nonfinite skip",
    "whole documents, window, best model at the end": f"{STEPS} --packing whole "
    "--sliding_window 16 --qk_norm false --load_best_model_at_end",
    "streaming, inverse square root": f"{STEPS} --streaming --scheduler inverse_sqrt",
    "mixture, polynomial": f"{STEPS} --data sample {{data}} --data_weights 0.3 0.7 "
    "--scheduler polynomial --power 2",
    "eight devices, fsdp and tensor": f"{STEPS} --mesh fsdp=4,tensor=2 --num_kv_heads 2",
    "fine-tuning rows": f"{STEPS} --data {{rows}} --packing whole",
}
QUICKSTART = "--config configs/quickstart.yaml --logging_backend none --logging_steps 1"


def train(flags: str, output: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `consyn-train` to its end."""
    command = [sys.executable, "-m", "consyn_jax.cli.train", *flags.split(), "--output"]
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", **os.environ, **env}
    environment["PYTHONPATH"] = str(ROOT)
    command.append(str(output))
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def numbers(output: Path, code: int, said: str) -> dict[str, Any]:
    """What a run must repeat: its log without clocks and memory, and its weights."""
    if code:
        return {"code": code, "said": said[-2000:]}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not CHANGING.fullmatch(k)} for line in lines]
    weights = (output / "final" / "model.safetensors").read_bytes()
    return {"code": 0, "lines": kept, "weights": hashlib.sha256(weights).hexdigest()}


def one(flags: str, output: Path, **env: str) -> dict[str, Any]:
    """Run once and read its numbers."""
    done = train(flags, output, **env)
    return numbers(output, done.returncode, done.stderr)


def resumed(flags: str, output: Path) -> dict[str, Any]:
    """Stop a run at its tenth step by a shorter budget, and continue it to the twentieth."""
    fixed = f"{flags} --scheduler constant_with_warmup --warmup_steps 4"
    train(f"{fixed} --max_steps 10", output)
    return one(f"{fixed} --max_steps 20 --overwrite_schedule", output)


def two_processes(flags: str, output: Path) -> dict[str, Any]:
    """Train on two processes of one device each."""
    shared = f"{flags} {STEPS} --coordinator_address localhost:29517 --num_processes 2"
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(train, f"{shared} --distributed --process_id {i}", output) for i in range(2)
        ]
    first, second = (run.result() for run in runs)
    return numbers(output, first.returncode or second.returncode, first.stderr + second.stderr)


def record(directory: Path, only: str) -> dict[str, Any]:
    """Run below `directory` all whose names contain `only`, and give the numbers by run."""
    os.environ["CONSYN_CACHE"] = str(directory / "cache")
    texts = [f"Document {i} says {'so ' * (i % 6 + 1)}and ends." for i in range(120)]
    data = directory / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = directory / "rows.jsonl"
    asked = [{"prompt": f"What is {i} and {i}? ", "completion": str(2 * i)} for i in range(300)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    tiny, found = TINY.format(data=data), {}
    runs: dict[str, Callable[[Path], dict[str, Any]]] = {
        name: partial(
            one,
            f"{tiny} {extra.format(data=data, rows=rows)}",
            JAX_NUM_CPU_DEVICES="8" if "devices" in name else "1",
        )
        for name, extra in RUNS.items()
    }
    runs["stopped and resumed"] = partial(resumed, tiny)
    runs["two processes"] = partial(two_processes, tiny)
    runs["quickstart"] = partial(one, QUICKSTART)
    for number, (name, run) in enumerate(runs.items()):
        if only in name:
            found[name] = run(directory / f"run-{number}")
            print(f"{name}: exit code {found[name]['code']}", flush=True)
    return found


GPU_PROGRAMS = [
    ("verse-1xh200", "h200:1x1", {}),
    ("verse-1xh200", "h200:1x8", {}),
    ("verse-1xh200", "h200:1x1", {"optimizer": "muon", "dropout": 0.1}),
    ("stanza-8xh200", "h200:1x8", {"mixed_precision": "fp8"}),
    ("stanza-8xh200", "h200:1x1", {"batch_size": 4, "gradient_accumulation_steps": 64}),
    ("stanza-1xrtx4090", "rtx4090:1x1", {}),
    ("epic-64xh200", "h200:8x8", {}),
]


def record_programs() -> dict[str, Any]:
    """Compile recipes for GPUs, and give what a program is judged by."""
    found = {}
    for name, topology, changes in GPU_PROGRAMS:
        recipe = read_config_file(ROOT / "configs" / f"{name}.yaml")
        run, _ = resolve(changes, recipe, file_name=name)
        tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        model = architecture(run.model, vocab_size=49_152, **tokens)
        program = dataclasses.asdict(compile_train_step(model, run, topology))
        found[f"{name} {topology} {changes}"] = {"code": 0, **json.loads(json.dumps(program))}
        print(f"{name} for {topology} {changes}: compiled", flush=True)
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One sentence for each run that differs."""
    found = []
    for name, new in after.items():
        old = before.get(name, {})
        if old == new:
            continue
        what = [key for key in new if key != "lines" and new[key] != old.get(key)]
        pairs = zip(old.get("lines", []), new.get("lines", []), strict=False)
        at = next(((a, b) for a, b in pairs if a != b), None)
        found.append(f"{name}: {', '.join(what) or 'log'} differs; first line that does: {at}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--against", type=Path, help="JSON file of the earlier commit")
    parser.add_argument("--gpu", action="store_true", help="programs for GPUs instead of runs")
    parser.add_argument("--only", default="", help="the runs whose names contain this")
    arguments = parser.parse_args()
    if arguments.gpu:
        found = record_programs()
    else:
        with tempfile.TemporaryDirectory() as directory:
            found = record(Path(directory), arguments.only)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    failed = [name for name, run in found.items() if run["code"]]
    if failed:
        sys.exit(f"These runs failed: {', '.join(failed)}. Their errors are in {arguments.output}.")
    if arguments.against:
        different = differences(json.loads(arguments.against.read_text()), found)
        if different:
            sys.exit("\n".join(different))
        print(f"{len(found)} {'programs' if arguments.gpu else 'runs'} are identical.")


if __name__ == "__main__":
    main()
