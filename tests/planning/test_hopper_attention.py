"""The step with attention in Mosaic GPU, compiled for an H200: its kernels and their resources."""

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from analyses import RESOURCES
from recipes import ONE_LAYER, STANZA, VERSE, dumped, recipe, run_apart

KERNELS = ("forward", "queries", "keys")
ON_ONE = [(VERSE, "h200:1x1", "auto"), (STANZA, "h200:1x1", "auto")]  # heads of 64 and of 128
# A device has half of the rows, heads and queries, and reads all keys of its rows.
ON_A_MESH = (STANZA, "h200:1x8", "fsdp=2,context=2,tensor=2")
COMPILE = """
import json, sys
from dataclasses import asdict

sys.path.insert(0, {tests!r})
from consyn_jax.model import attention
from consyn_jax.planning.aot import build, lower, summary
from consyn_jax.planning.topology import parse_topology
from analyses import RESOURCES
from recipes import recipe

attention.CHOSEN = ("hopper",)
model, run = recipe({name!r}, {changes!r})
topology = parse_topology({topology!r})
built = build(model, run, topology)
done = lower(built, run).compile()
print(json.dumps(asdict(summary(built, done, topology))))
"""


class Step(NamedTuple):
    """A compiled step: its recipe, its summary, each kernel's code and the assembler's report."""

    name: str
    summary: dict[str, Any]
    code: dict[str, str]
    report: dict[str, str]


@pytest.fixture(scope="module", params=[*ON_ONE, ON_A_MESH])
def step(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cuda_packages: None
) -> Step:
    """One layer of a recipe's step on one device or on a mesh."""
    name, topology, mesh = request.param
    place = tmp_path_factory.mktemp("step")
    request_dumps = {"MOSAIC_GPU_DUMP_TO": str(place)} | dict.fromkeys(
        ("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS"), "1"
    )
    tests, changes = str(Path(__file__).parent), ONE_LAYER | {"mesh": mesh}
    code = COMPILE.format(tests=tests, name=name, topology=topology, changes=changes)
    with mock.patch.dict(os.environ, request_dumps):
        summary = json.loads(run_apart(code).stdout.splitlines()[-1])
    ptx, report = (
        {kernel: next(place.glob(f"hopper_attention_{kernel}_*.{kind}")) for kernel in KERNELS}
        for kind in ("ptx", "ptxas")
    )
    return Step(
        name,
        summary,
        {kernel: path.read_text() for kernel, path in ptx.items()},
        {kernel: path.read_text(errors="replace") for kernel, path in report.items()},
    )


def test_each_kernel_runs_once_a_layer_and_no_other_attention(step: Step) -> None:
    found = {name: n for name, n in step.summary["kernels"].items() if "attention" in name}
    assert found == {f"hopper_attention_{kernel}": 1 for kernel in KERNELS}
    assert step.summary["attention"] == "hopper: this package's kernel for Hopper"


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_spills_nothing_and_adds_nothing_atomically(step: Step, kernel: str) -> None:
    resources = RESOURCES.search(step.report[kernel])
    assert resources is not None, step.report[kernel]
    stack, spilled, registers = map(int, resources.groups())
    assert (stack, spilled) == (0, 0)
    # A multiprocessor has 65,536 registers, for three warpgroups or two programs that hold keys.
    assert registers <= (255 if kernel == "keys" else 168)
    code = step.code[kernel]
    assert "wgmma.mma_async" in code
    assert "cp.async.bulk.tensor" in code  # copies by TMA
    assert "serialized" not in step.report[kernel]  # else each product is waited for at once
    assert re.findall(r"\b(?:atom|red)\.(?!async)\S+", code) == []


@pytest.mark.parametrize("step", [ON_A_MESH], indirect=True)
def test_keys_and_values_are_gathered_once_over_context_and_their_gradients_scattered(
    step: Step,
) -> None:
    model, run = recipe(step.name, ONE_LAYER)
    rows, heads = run.budget.batch_size // 2, model.num_kv_heads // 2  # of a device
    size = 2 * rows * run.length * heads * model.head_dim * 2  # keys and values, in bfloat16
    over_context = {
        (found["kind"], found["payload_bytes"])
        for found in step.summary["collectives"]
        if found["axes"] == ["context"] and found["dtype"] == "bf16"
    }
    assert over_context == {("all-gather", size), ("reduce-scatter", size)}


@pytest.mark.parametrize("step", ON_ONE, indirect=True)
def test_the_step_needs_no_more_memory_than_with_the_kernels_in_triton(step: Step) -> None:
    triton = dumped(step.name, "h200").program
    assert step.summary["temporary_bytes"] <= triton.temporary_bytes * 1.001
