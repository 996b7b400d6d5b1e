"""Does the device compute correctly? Checks of model, attention, optimizers and a short run.

Each check is a row with its error and its bound. The reference is float32 on the CPU of the same
machine. An error is ||x - reference|| / ||reference|| over all values together.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from programs import make_batch, program_of

from consyn_jax.cli.train import main as consyn_train
from consyn_jax.config import architecture
from consyn_jax.model.attention import BACKENDS, causal_attention
from consyn_jax.model.kernels.reference_attention import documents
from consyn_jax.model.parameters import initial_parameters
from consyn_jax.resolve import resolve
from consyn_jax.training.logging.metrics import read_metrics
from consyn_jax.training.runtime.kernel_choices import KERNELS

RECIPE = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
FLOAT32, BF16 = 1e-4, 3e-2  # largest allowed errors
SHAPE = {
    "model": "verse",
    "num_layers": 4,
    "hidden_dim": 256,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "mlp_dim": 512,
}
VOCABULARY = 1024
SMALLEST = (
    "--tokenizer bytes --num_layers 1 --hidden_dim 32 --num_heads 2 --mlp_dim 64 "
    "--max_tokens 32 --batch_size 4 --validation_fraction 0.001"
)


def row(check: str, error: float, allowed: float) -> dict[str, Any]:
    """A row of the table."""
    return {"check": check, "error": error, "allowed": allowed, "ok": bool(error <= allowed)}


def distance(tree: Any, reference: Any) -> float:
    """The relative error over all leaves."""
    pairs = list(
        zip(
            jax.tree.leaves(jax.device_get(tree)),
            jax.tree.leaves(jax.device_get(reference)),
            strict=True,
        )
    )
    square = sum(float(((a.astype("float64") - b.astype("float64")) ** 2).sum()) for a, b in pairs)
    return (square / sum(float((b.astype("float64") ** 2).sum()) for _, b in pairs)) ** 0.5


def on(device: Any, tree: Any) -> Any:
    """The tree, copied to a device."""
    return jax.tree.map(partial(jax.device_put, device=device), jax.device_get(tree))


def model(tiny: bool = False) -> dict[str, Any]:
    """Loss and gradients of a small model with grouped heads and several documents per row."""
    shape = SHAPE | ({"num_layers": 2, "max_tokens": 64} if tiny else {"max_tokens": 512})
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    found, parameters = {}, None
    for name, where, precision in (
        ("reference", cpu, "no"),
        ("float32", device, "no"),
        ("bf16", device, "bf16"),
        ("bf16 on the CPU", cpu, "bf16"),
    ):
        run, _ = resolve({**shape, "batch_size": 2, "mixed_precision": precision})
        config = architecture(run.model, vocab_size=VOCABULARY)
        program = program_of(config, run, [where])
        if parameters is None:
            parameters = jax.device_get(initial_parameters(config, 0))
        batch = {
            name: values[0]
            for name, values in make_batch((1, 2, run.length), VOCABULARY, 0, 3).items()
        }
        with jax.default_matmul_precision("highest"), jax.set_mesh(program.mesh):
            (_, sums), gradients = jax.jit(jax.value_and_grad(program.objective, has_aux=True))(
                on(where, parameters), on(where, batch)
            )
        found[name] = jax.device_get((sums.nll, gradients))
    reference = found["reference"]
    rows = []
    for name, loss_bound, bound in (
        ("float32", 1e-5, FLOAT32),
        ("bf16", 5e-3, BF16),
        ("bf16 on the CPU", 5e-3, BF16),
    ):
        rows.append(row(f"loss, {name}", distance(found[name][0], reference[0]), loss_bound))
        rows.append(row(f"gradients, {name}", distance(found[name][1], reference[1]), bound))
    return {"rows": rows}


def attention(tiny: bool = False) -> dict[str, Any]:
    """Output and gradients of each backend, with and without documents and a window.

    Heads are of 64, and grouped ones of 128.
    """
    T, B = (64, 1) if tiny else (1024, 2)
    several = documents(jnp.asarray(make_batch((1, B, T), VOCABULARY, 0, 5)["segment_ids"][0]))
    capability = getattr(jax.devices()[0], "compute_capability", "")
    here = jax.default_backend(), jnp.bfloat16, 128, capability, 0.0
    backends = [
        name
        for name, backend in BACKENDS.items()
        if (not backend.platforms or here[0] in backend.platforms)
        and capability.startswith(backend.capability)
        and backend.obstacle(*here) is None
    ]
    rows = []
    for backend, (head_dim, kv_heads) in product(backends, ((64, 4), (128, 2))):
        keys = jax.random.split(jax.random.key(head_dim + kv_heads), 4)
        inputs = [
            jax.random.normal(key, (B, T, heads, head_dim)).astype(jnp.bfloat16)
            for key, heads in zip(keys, (4, kv_heads, kv_heads, 4), strict=True)
        ]
        for inside, window in ((None, None), (several, None), (several, T // 4)):
            attend = partial(causal_attention, inside=inside, sliding_window=window)
            with jax.default_matmul_precision("highest"):
                reference = both_ways(partial(attend, backend="xla"))(
                    *(x.astype(jnp.float32) for x in inputs)
                )
            found = both_ways(partial(attend, backend=backend))(*inputs)
            name = f"{backend}, heads of {head_dim}, {'grouped' if kv_heads < 4 else 'all'}"
            name += f"{', documents' if inside is not None else ''}{', window' if window else ''}"
            rows.append(row(name, distance(found, reference), BF16))
    return {"rows": rows}


def both_ways(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Output and gradients of an attention."""

    def run(q: Any, k: Any, v: Any, out: Any) -> Any:
        found, pull = jax.vjp(attend, q, k, v)
        return found, pull(out)

    return jax.jit(run)


def optimizer(tiny: bool = False) -> dict[str, Any]:
    """Two updates of each rule from the same gradients, on the device and on the CPU."""
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    rows = []
    for name in ("adamw", "muon") if tiny else ("adamw", "muon", "lion", "adafactor"):
        # A GPU iterates in bfloat16, which moves an update by 5 %.
        bound = 0.1 if name == "muon" else 1e-5
        error = distance(two_updates(name, device), two_updates(name, cpu))
        rows.append(row(f"two updates of {name}", error, bound))
    return {"rows": rows}


def two_updates(name: str, device: Any) -> Any:
    small = {"num_layers": 2, "max_tokens": 64, "optimizer": name, "warmup_steps": 0}
    run, _ = resolve(SHAPE | small)
    config = architecture(run.model, vocab_size=VOCABULARY)
    program = program_of(config, run, [device])
    params, draws = initial_parameters(config, 0), iter(jax.random.split(jax.random.key(1), 64))
    gradients = jax.tree.map(lambda p: jax.random.normal(next(draws), p.shape), params)

    def updates(params: Any, gradients: Any) -> Any:
        first, state = program.rule.update(gradients, program.rule.init(params), params)
        second, _ = program.rule.update(gradients, state, params)
        return first, second

    with jax.default_matmul_precision("highest"), jax.set_mesh(program.mesh):
        return jax.device_get(jax.jit(updates)(on(device, params), on(device, gradients)))


def exactness(
    tiny: bool = False, text: str = "sample", budget_s: float = math.inf
) -> dict[str, Any]:
    """Verse on packed documents: the same bits in two runs, and after a stop and a resume.

    The command resumes in a new process with an empty cache, as on another machine. It is left out
    if the budget has less time left than a run takes.
    """
    steps = 8 if tiny else 200
    flags = ["--model", "verse", "--data", text, "--max_steps", str(steps), "--lr", "6e-4"]
    flags += f"--batch_size 32 --save_steps {steps // 2} --eval_steps {steps}".split()
    flags += ["--keep_last", "5", "--logging_steps", "1", "--logging_backend", "none", "--quiet"]
    if tiny:
        flags += SMALLEST.split()
    own = {name: os.environ[name] for name in os.environ if name != "JAX_COMPILATION_CACHE_DIR"}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        first, again, resumed = place / "first", place / "again", place / "resumed"
        caches = [own | {"CONSYN_CACHE": str(place / name)} for name in ("here", "elsewhere")]
        began = time.perf_counter()
        _train_elsewhere(flags, first, caches[0])
        seconds = time.perf_counter() - began
        _train_elsewhere(flags, again, caches[0])
        rows = _differences("repeated", first, again)
        if time.perf_counter() - began + seconds < budget_s:
            shutil.copytree(first, resumed)
            _go_back(resumed, steps // 2)
            _train_elsewhere(flags, resumed, caches[1])
            rows += _differences("resumed elsewhere", first, resumed)
        else:
            rows.append({"check": "resumed elsewhere: no time was left"})
        log = read_metrics(first / "metrics.jsonl")
        kept = json.loads((first / KERNELS).read_text()) if (first / KERNELS).exists() else {}
        return {
            "rows": rows,
            "choices_kept": len(kept.get("choices", ())),
            "seconds_of_a_run": seconds,
            "step_time_s": _last(log, "throughput/step_time_s"),
        }


def _differences(name: str, first: Path, other: Path) -> list[dict[str, Any]]:
    """The rows that compare two runs."""
    reference, found = _bits(first), _bits(other)
    differ = [step for step in reference if found.get(step) != reference[step]]
    rows = [row(f"{name}: steps that differ", len(differ), 0)]
    rows[-1]["first"] = min(differ, default=None)
    return [*rows, row(f"{name}: weights differ", _weights(other) != _weights(first), 0)]


def _train_elsewhere(flags: list[str], output: Path, environment: dict[str, str]) -> None:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "consyn_jax.cli.train", *flags, "--output", str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def _go_back(run: Path, step: int) -> None:
    """Leave a run as it was when it was stopped after `step`."""
    shutil.rmtree(run / "final", ignore_errors=True)
    for checkpoint in (run / "checkpoints").iterdir():
        if checkpoint.name.isdigit() and int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)


def _bits(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and norm of each step."""
    return {
        line["step"]: (line["train/loss"], line["train/grad_norm"])
        for line in read_metrics(run / "metrics.jsonl")
        if "train/loss" in line
    }


def _weights(run: Path) -> str:
    """Identify the weights at the end."""
    found = hashlib.sha256()
    for path in sorted((run / "final").glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()


def training(tiny: bool = False, text: str = "sample") -> dict[str, Any]:
    """The command on real text: the loss falls, and a run resumed from its middle repeats it."""
    steps = 8 if tiny else 120
    saved = f"--save_steps {steps // 2} --keep_last 5 --eval_steps {steps} --logging_steps 1"
    flags = ["--config", str(RECIPE), "--data", text, "--max_steps", str(steps), *saved.split()]
    flags += ["--logging_backend", "none", "--quiet"]
    if tiny:
        flags += SMALLEST.split()
    with tempfile.TemporaryDirectory() as directory:
        whole, again = Path(directory) / "whole", Path(directory) / "again"
        lines = _train(flags, whole)
        shutil.copytree(whole, again)
        _go_back(again, steps // 2)
        resumed = _train(flags, again)
    assert any(line.get("event") == "resume" for line in resumed)
    losses, later = _losses(lines), _losses(resumed)
    assert losses.keys() == later.keys()
    apart = max(abs(losses[step] - later[step]) for step in losses)
    rows = [
        row("loss after the steps, of the first", losses[steps] / losses[1], 1.0 if tiny else 0.8),
        row("loss after going on, difference", apart, 0.0),
    ]
    return {
        "rows": rows,
        "first_loss": losses[1],
        "last_loss": losses[steps],
        "gained": losses[1] - losses[steps],
        "evaluation": _last(lines, "eval/loss"),
    }


def _train(flags: list[str], output: Path) -> list[dict[str, Any]]:
    """Run the command; the lines of its metrics."""
    code = consyn_train([*flags, "--output", str(output)])
    assert code == 0, f"consyn-train ended with {code}"
    return read_metrics(output / "metrics.jsonl")


def _losses(lines: list[dict[str, Any]]) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def _last(lines: list[dict[str, Any]], name: str) -> float | None:
    return next((line[name] for line in reversed(lines) if name in line), None)
