"""The program of `consyn-tune --vectorize`, compiled for a GPU that is not here."""

import json
import subprocess
import sys

import pytest

from consyn_jax.planning import aot

pytestmark = [pytest.mark.usefixtures("cuda_packages"), pytest.mark.slow]

# Prints the kernels of the step of four lanes of haiku, and of one.
COMPILE = """
import json, re
import jax
from jax.sharding import NamedSharding, PartitionSpec
from consyn_jax.planning import aot
from consyn_jax.planning.topology import parse_topology
from consyn_jax.resolve import preset_architecture, resolve
from consyn_jax.tuning.lanes.lane_programs import lanes_step
from consyn_jax.tuning.shared_programs import SharedPrograms, numbers_of

STEPS, kernels = 50, {}
run = resolve({"model": "haiku", "max_tokens": 256, "batch_size": 16, "max_steps": STEPS})[0]
program = aot.build(preset_architecture("haiku", 256), run, parse_topology("h200:1x1")).program
place = NamedSharding(program.mesh, PartitionSpec())
numbers = jax.tree.map(
    lambda values: jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=place),
    numbers_of(run, STEPS),
)
for lanes in (1, 4):
    step = lanes_step(SharedPrograms(), program, run, numbers, lanes)
    kernels[lanes] = step.compiled.as_text().count("xla.gpu.triton")
print(json.dumps(kernels))
"""


def test_the_step_of_lanes_keeps_the_kernels_of_one() -> None:
    """One launch for all lanes, as the kernels have a batching rule."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=aot.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = json.loads(done.stdout.splitlines()[-1])
    assert kernels["4"] == kernels["1"] > 0
