from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from consyn_jax.distributed.mesh import build_mesh
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.checkpointing.saved_weights import read_weights
from consyn_jax.training.step import TrainState


@pytest.mark.parametrize("outer", [(), ("optimizer",), ("optimizer", "inner")])
def test_the_average_of_schedule_free_training_is_found_at_any_depth(
    outer: tuple[str, ...], tmp_path: Path
) -> None:
    """A float16 run keeps the state of the optimizer within that of the loss scale."""
    fast, slow = np.arange(6.0, dtype=np.float32), np.full(6, 2.0, np.float32)
    inside: Any = {"b1": jnp.float32(0.8), "z": {"w": jnp.asarray(fast)}}
    for name in reversed(outer):
        inside = {name: inside, "scale": jnp.float32(1024)}
    state = TrainState(jnp.int32(3), {"w": jnp.asarray(slow)}, inside, jnp.int32(0))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, {"step": 3})
    checkpoints.close()
    here = SingleDeviceSharding(jax.devices()[0])
    found = read_weights(
        tmp_path / "3", {"w": jax.ShapeDtypeStruct((6,), jnp.bfloat16, sharding=here)}
    )
    assert found["w"].dtype == jnp.bfloat16
    mesh = build_mesh({"data": 1, "fsdp": 2, "context": 1, "tensor": 1}, jax.devices()[2:4])
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    there = read_weights(
        tmp_path / "3", {"w": jax.ShapeDtypeStruct((6,), jnp.float32, sharding=rows)}
    )
    assert there["w"].sharding.is_equivalent_to(rows, 1)
    np.testing.assert_allclose(there["w"], (slow - 0.2 * fast) / 0.8, rtol=1e-6)
    # The weights are 0.2 z + 0.8 x, of which the average is x (Defazio et al., 2024).
    np.testing.assert_allclose(found["w"], (slow - 0.2 * fast) / 0.8, rtol=1e-2)
