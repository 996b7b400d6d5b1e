from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from consyn_jax.distributed.mesh import build_mesh
from consyn_jax.errors import UserError
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.checkpointing.saved_weights import read_arrays, read_weights
from consyn_jax.training.step import TrainState


@pytest.mark.parametrize("outer", [(), ("optimizer",), ("optimizer", "inner")])
def test_the_average_of_schedule_free_training_is_found_at_any_depth(
    outer: tuple[str, ...], tmp_path: Path
) -> None:
    """A float16 run keeps the state of the optimizer within that of the loss scale."""
    fast, slow = np.arange(6.0, dtype=np.float32), np.full(6, 2.0, np.float32)
    weight = jax.device_put(jnp.float32(0.8), jax.devices()[5])  # not where it is read
    inside: Any = {"b1": weight, "z": {"w": jnp.asarray(fast)}}
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


def test_weights_are_read_in_the_type_that_is_wanted(tmp_path: Path) -> None:
    weights = {"w": jnp.arange(6.0)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, TrainState(jnp.int32(3), weights, {}, jnp.int32(0)), {"step": 3})
    checkpoints.close()
    there = SingleDeviceSharding(jax.devices()[3])
    like = {"w": jax.ShapeDtypeStruct((6,), jnp.bfloat16, sharding=there)}
    found = read_weights(tmp_path / "3", like)["w"]
    assert (found.dtype, found.sharding) == (jnp.bfloat16, there)
    np.testing.assert_array_equal(found, weights["w"])
    (tmp_path / "3").rename(tmp_path / "4")
    with pytest.raises(UserError, match="the name of step 4, but contains the state of step 3"):
        read_weights(tmp_path / "4", like)


def test_arrays_are_read_onto_their_devices_if_they_fit(tmp_path: Path) -> None:
    handler = ocp.PyTreeCheckpointHandler()
    arrays = {"w": jnp.arange(12.0).reshape(6, 2)}
    handler.save(epath.Path(tmp_path / "arrays"), args=ocp.args.PyTreeSave(arrays))
    handler.finalize(epath.Path(tmp_path / "arrays"))
    handler.close()
    mesh = build_mesh({"data": 1, "fsdp": 2, "context": 1, "tensor": 1}, jax.devices()[2:4])
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    like = {"w": jax.ShapeDtypeStruct((6, 2), jnp.bfloat16, sharding=rows)}
    found = read_arrays(tmp_path / "arrays", like)["w"]
    assert (found.dtype, found.sharding.is_equivalent_to(rows, 2)) == (jnp.bfloat16, True)
    np.testing.assert_array_equal(found, arrays["w"])
    like = {"w": jax.ShapeDtypeStruct((4, 2), jnp.bfloat16, sharding=rows)}
    with pytest.raises(UserError, match=r"w is \[6, 2\] in the checkpoint and \[4, 2\] in the m"):
        read_arrays(tmp_path / "arrays", like)
