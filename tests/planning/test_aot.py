"""The shipped recipes, compiled for H200 GPUs that are not there: which kernels, which arrays, how much memory, what is sent."""

import math
import os
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.config import ModelConfig, RunConfig, UserError, architecture, resolve
from consyn_jax.distributed.auto_mesh import FITS
from consyn_jax.distributed.mesh import parse_mesh
from consyn_jax.model.parameters import layout
from consyn_jax.planning import aot
from consyn_jax.planning.aot import CompiledProgram, compile_train_step
from consyn_jax.planning.page import page
from consyn_jax.planning.plan import compiled as compiled_plan
from consyn_jax.planning.plan import estimate, fit
from consyn_jax.planning.topology import GPUS, parse_topology
from consyn_jax.training.run_directory import read_config_file

CONFIGS = Path(__file__).parents[2] / "configs"

# recipe, topology, what differs from the recipe. On one host epic takes the same tokens a step in eight micro-batches.
CASES = [
    ("verse-1xh200", "h200:1x1", {}),
    ("verse-1xh200", "h200:1x8", {}),
    ("stanza-8xh200", "h200:1x1", {"batch_size": 4, "gradient_accumulation_steps": 64}),
    ("stanza-8xh200", "h200:1x8", {}),
    ("epic-64xh200", "h200:1x8", {"batch_size": 64, "gradient_accumulation_steps": 8}),
    ("epic-64xh200", "h200:8x8", {}),
]
EPIC_ON_ONE = ("epic-64xh200", "h200:1x1", {"batch_size": 1, "gradient_accumulation_steps": 1, "gradient_checkpointing": "full"})


@pytest.fixture(autouse=True)
def cuda_packages() -> None:
    """The CUDA packages, without a GPU; where CI says that they must be there, they must."""
    try:
        aot.check_packages()
    except UserError as missing:
        if os.environ.get("CONSYN_TEST_CUDA_PACKAGES") == "required":
            pytest.fail(str(missing))
        pytest.skip(str(missing))


def recipe(name: str, changes: dict[str, Any]) -> tuple[ModelConfig, RunConfig]:
    run, _ = resolve(changes, read_config_file(CONFIGS / f"{name}.yaml"), file_name=name)
    return architecture(run.model, vocab_size=49_152, bos_token_id=1, eos_token_id=2, pad_token_id=0), run


@cache
def _compiled(name: str, topology: str, changes: tuple[tuple[str, Any], ...]) -> CompiledProgram:
    return compile_train_step(*recipe(name, dict(changes)), topology)


def compiled(name: str, topology: str, changes: dict[str, Any]) -> CompiledProgram:
    return _compiled(name, topology, tuple(changes.items()))


def logits_elements(model: ModelConfig, run: RunConfig, topology: str) -> Iterator[int]:
    """Elements of [B, T, V] on one device, with and without the vocabulary's padding."""
    assert run.data.max_tokens is not None
    sizes = parse_mesh(run.hardware.mesh, parse_topology(topology).num_devices)
    tokens = run.budget.batch_size * run.data.max_tokens // (sizes["data"] * sizes["fsdp"])
    yield from {tokens * model.vocab_size, tokens * model.padded_vocab_size}


def memory_share(program: CompiledProgram) -> float:
    return program.total_bytes / GPUS["h200"].memory_bytes


@pytest.mark.parametrize(("name", "topology", "changes"), [*CASES, EPIC_ON_ONE])
def test_attention_is_cudnn_in_both_directions_and_logits_are_never_whole(name: str, topology: str, changes: dict[str, Any]) -> None:
    program, (model, run) = compiled(name, topology, changes), recipe(name, changes)
    runs = model.num_layers * run.budget.gradient_accumulation_steps
    forward = sum(count for kernel, count in program.kernels.items() if kernel.startswith("__cudnn$fmha") and not kernel.endswith("Backward"))
    backward = sum(count for kernel, count in program.kernels.items() if kernel.startswith("__cudnn$fmha") and kernel.endswith("Backward"))
    assert backward == runs
    assert forward == (runs if run.hardware.gradient_checkpointing == "none" else 2 * runs)
    whole = set(logits_elements(model, run, topology))
    rows = {model.vocab_size, model.padded_vocab_size}
    assert not [shape for shape in program.float32_shapes if math.prod(shape) in whole and (rows & set(shape) or len(shape) == 1)]


@pytest.mark.parametrize(("name", "topology", "changes"), CASES)
def test_the_step_fits(name: str, topology: str, changes: dict[str, Any]) -> None:
    assert memory_share(compiled(name, topology, changes)) <= FITS


@pytest.mark.parametrize(("name", "topology", "changes"), CASES)
def test_the_arithmetic_says_what_the_compiler_says(name: str, topology: str, changes: dict[str, Any]) -> None:
    """Of memory: in all, and of the state."""
    program, plan = compiled(name, topology, changes), estimate(*recipe(name, changes), parse_topology(topology))
    assert plan.work.memory.total == pytest.approx(program.total_bytes, rel=0.1)
    state = plan.work.memory.parameters + plan.work.memory.moments
    # norms are copied to all devices, and the arithmetic splits them
    assert state == pytest.approx(program.parameter_bytes + program.optimizer_bytes, rel=5e-3)
    assert program.state_bytes == pytest.approx(12 * program.num_parameters, rel=1e-6)


def test_epic_does_not_fit_one_gpu_yet() -> None:
    """Float32 weights and both moments take 12 bytes a parameter, 157 GB of 151. When this fails, the README has to change."""
    program = compiled(*EPIC_ON_ONE)
    assert program.argument_bytes >= 12 * layout(recipe(EPIC_ON_ONE[0], EPIC_ON_ONE[2])[0]).num_parameters
    assert memory_share(program) > 1


@pytest.mark.parametrize(("name", "topology", "changes"), [case for case in CASES if not case[1].endswith("1x1")])
def test_weights_travel_in_bfloat16_and_gradients_are_scattered(name: str, topology: str, changes: dict[str, Any]) -> None:
    """A micro-batch gathers every weight twice at most, in two bytes, and scatters every gradient once, in four at most."""
    program, (model, run) = compiled(name, topology, changes), recipe(name, changes)
    payload = {(c.kind, c.dtype): c.payload_bytes for c in program.collectives}
    assert {c.axes for c in program.collectives} == {("fsdp",)}
    tied = model.padded_vocab_size * model.hidden_dim if model.tie_embeddings else 0  # as table and as head, a journey each
    weights = (layout(model).num_parameters + tied) * run.budget.gradient_accumulation_steps
    assert {dtype for kind, dtype in payload if kind == "all-gather"} == {"bf16"}
    assert payload["all-gather", "bf16"] <= 1.05 * 2 * weights * 2
    assert sum(size for (kind, _), size in payload.items() if kind == "reduce-scatter") <= 1.05 * weights * 4
    # norms, and sums of scalars
    assert sum(size for (kind, _), size in payload.items() if kind == "all-reduce") <= 0.001 * weights * 4
    assert {kind for kind, _ in payload} <= {"all-gather", "reduce-scatter", "all-reduce"}


def test_a_batch_that_the_mesh_does_not_divide_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="--batch_size 9"):
        compile_train_step(*recipe("verse-1xh200", {"batch_size": 9}), "h200:1x8")


@pytest.mark.parametrize("gpu", sorted(set(GPUS) - {"h200"}))
def test_every_gpu_of_the_table_can_be_compiled_for(gpu: str) -> None:
    """Two hosts, so that there are exchanges along two axes, which the page tells apart."""
    run, _ = resolve({"model": "haiku", "max_tokens": 128, "batch_size": 4})
    model = architecture(run.model, vocab_size=512)
    text = page(compiled_plan(estimate(model, run, parse_topology(f"{gpu}:2x2")), f"{gpu}:2x2"))
    assert "cudnn: fused kernel of an NVIDIA GPU; 4 calls forward and 4 backward in a step" in text
    assert "data=2, fsdp=2" in text
    assert "all-gather         bf16  over fsdp" in text
    assert "all-reduce         f32   over data" in text


def test_a_thousand_gpus_are_planned_for_within_a_minute() -> None:
    """Epic on 128 hosts: weights split over eight hosts; copies exchange one part in 64 of the gradients in float32, and norms."""
    began = time.monotonic()
    model, run = recipe("epic-64xh200", {"batch_size": 1024})
    plan = compiled_plan(estimate(model, run, parse_topology("h200:128x8")), "h200:128x8")
    assert time.monotonic() - began < 60
    assert plan.fits
    assert (plan.mesh.sizes["data"], plan.mesh.sizes["fsdp"]) == (16, 64)
    assert plan.compiled is not None
    over_copies = sum(c.payload_bytes for c in plan.compiled.collectives if c.axes == ("data",))
    assert over_copies == pytest.approx(4 * plan.compiled.num_parameters / 64, rel=0.01)


def test_a_recipe_that_fit_finds_fits_as_compiled() -> None:
    """Stanza trains on one card of 24 GB with its moments in bfloat16."""
    changes = {"batch_size": 4, "gradient_accumulation_steps": 1}
    plan = estimate(*recipe("stanza-8xh200", changes), parse_topology("rtx4090:1x1"))
    best = fit(plan, "rtx4090:1x1", compile=True)
    assert best.plan.compiled is not None
    assert best.plan.compiled.total_bytes <= FITS * GPUS["rtx4090"].memory_bytes
    assert best.changes["moment_dtype"] == "bfloat16"
