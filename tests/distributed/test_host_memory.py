import os
import subprocess
import sys

import pytest

from consyn_jax.distributed.host_memory import GPU_DRIVERS

# Temporaries of 128 MiB: more than the arena of a thread can hold.
STEPS = """
import resource
from consyn_jax.distributed.host_memory import keep_freed_memory

keep_freed_memory()
import jax, jax.numpy as jnp

def step(x):
    a = x + jax.lax.broadcasted_iota(jnp.float32, (4096, 8192), 0)
    return a @ (a[:4].T @ jnp.ones((4, 4)))

compiled = jax.jit(step).lower(1.0).compile()
faults = []
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    compiled(1.0).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(compiled.memory_analysis().temp_size_in_bytes, min(faults[1:]))  # a block that does not fit what was kept can come in between
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or any(driver.exists() for driver in GPU_DRIVERS), reason="settings of glibc, without a GPU")
def test_a_steps_temporary_memory_is_kept_for_the_next_step() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})
    temporary, faults = map(int, done.stdout.split())
    assert temporary >= 2**27
    assert faults * os.sysconf("SC_PAGE_SIZE") < temporary / 10
