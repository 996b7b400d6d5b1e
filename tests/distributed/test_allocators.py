import os
import subprocess
import sys

import pytest

from consyn_jax.distributed.allocators import GPU_DRIVERS, GPU_SHARE_NAMES, use_gpu_memory
from consyn_jax.distributed.auto_mesh import FITS

# Temporaries of 128 MiB: more than a thread's arena can hold.
STEPS = """
import resource
from consyn_jax.distributed.allocators import keep_freed_memory

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
# Not every step: now and then a block comes in that does not fit what was kept.
print(compiled.memory_analysis().temp_size_in_bytes, min(faults[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux") or any(driver.exists() for driver in GPU_DRIVERS),
    reason="glibc settings for machines without a GPU",
)
def test_a_steps_temporary_memory_is_kept_for_the_next_step() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STEPS],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    )
    temporary, faults = map(int, done.stdout.split())
    assert temporary >= 2**27
    assert faults * os.sysconf("SC_PAGE_SIZE") < temporary / 10


def test_jax_may_use_what_a_plan_that_fits_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in GPU_SHARE_NAMES:
        monkeypatch.delenv(name, raising=False)
    use_gpu_memory()
    assert float(os.environ["XLA_CLIENT_MEM_FRACTION"]) >= FITS


@pytest.mark.parametrize("name", GPU_SHARE_NAMES)
def test_a_share_that_the_user_set_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in GPU_SHARE_NAMES:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "0.5")
    use_gpu_memory()
    assert [os.environ.get(each) for each in GPU_SHARE_NAMES if each in os.environ] == ["0.5"]
