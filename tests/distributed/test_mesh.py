import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from consyn_jax.distributed.mesh import (
    AXES,
    RULES,
    build_mesh,
    check_batch,
    check_model,
    constrain,
    local_rows,
    parse_mesh,
    partition_spec,
    sharding,
)
from consyn_jax.errors import UserError


def sizes(**given: int) -> dict[str, int]:
    return dict.fromkeys(AXES, 1) | given


@settings(deadline=None)
@given(st.permutations(AXES), st.lists(st.integers(1, 16), min_size=4, max_size=4))
def test_axes_may_come_in_any_order(order: list[str], numbers: list[int]) -> None:
    given_sizes = dict(zip(order, numbers, strict=True))
    assert (
        parse_mesh(", ".join(f"{axis}={n}" for axis, n in given_sizes.items()), math.prod(numbers))
        == given_sizes
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fdsp=8", "no axis 'fdsp'; did you mean fsdp?"),
        ("data=0,fsdp=8", "data must be a whole number of devices, not '0'"),
        ("data=two", "not 'two'"),
        ("data=²", "not '²'"),
        ("data=" + 5000 * "1", "must be a whole number of devices"),
        ("data", "not ''"),
        ("data=2,tensor=2", "for 4 devices, and there are 8"),
        ("", "no axis ''"),
    ],
)
def test_impossible_meshes_are_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=r"^--mesh") as caught:
        parse_mesh(text, 8)
    assert words in str(caught.value)


def test_the_table_gives_the_partition_spec() -> None:
    assert partition_spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(
        None, "fsdp", "tensor", None
    )
    assert partition_spec(("batch", "sequence", "vocab")) == PartitionSpec(
        ("data", "fsdp"), "context", "tensor"
    )
    assert {axis for axes in RULES.values() for axis in axes} == set(AXES)


def test_two_dimensions_over_one_mesh_axis_collide() -> None:
    with pytest.raises(ValueError, match=r"collide.*'tensor'"):
        partition_spec(("heads", "mlp"))
    with pytest.raises(ValueError, match=r"collide.*'fsdp'"):
        partition_spec(("batch", "embed"))
    with pytest.raises(ValueError, match="'width' is not in the sharding table"):
        partition_spec(("width",))


def test_arrays_are_placed_by_the_table() -> None:
    mesh = build_mesh(sizes(fsdp=2, tensor=4))
    x = jax.device_put(np.arange(32.0).reshape(8, 4), sharding(mesh, ("mlp", "embed")))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 2)}
    with jax.set_mesh(mesh):
        y = jax.jit(lambda a: constrain(a, "embed", None))(x)
    assert y.sharding.is_equivalent_to(sharding(mesh, ("embed", None)), 2)
    assert constrain(x, "mlp", "embed") is x, "a no-op without a mesh in context"


def test_a_mesh_uses_the_given_devices() -> None:
    mesh = build_mesh(sizes(data=2, tensor=2), jax.devices()[4:])
    assert dict(mesh.shape) == sizes(data=2, tensor=2)
    assert set(mesh.devices.flat) == set(jax.devices()[4:])


def test_a_batch_that_does_not_divide_gets_the_nearest_sizes() -> None:
    mesh = sizes(data=2, fsdp=4, context=4)
    check_batch(mesh, 16, 1024)
    with pytest.raises(
        UserError, match=r"--batch_size 12 does not divide over 8 devices.*Use 8 or 16\."
    ):
        check_batch(mesh, 12, 1024)
    with pytest.raises(UserError, match=r"--batch_size 3 .*Use 8\."):
        check_batch(mesh, 3, 1024)
    with pytest.raises(UserError, match=r"--max_tokens 1023 .*context=4.*Use 1020 or 1024\."):
        check_batch(mesh, 16, 1023)


def test_a_model_that_does_not_divide_gets_the_sizes_that_do() -> None:
    check_model(
        sizes(fsdp=8, tensor=4),
        {"hidden_dim": 64, "num_heads": 8, "num_kv_heads": 4, "mlp_dim": 128},
    )
    with pytest.raises(
        UserError,
        match=r"--mesh tensor=4 does not divide --num_kv_heads 6. Use tensor of 1, 2, 3, 6\.",
    ):
        check_model(sizes(tensor=4), {"num_kv_heads": 6})
    with pytest.raises(UserError, match=r"--mesh fsdp=8 does not divide --hidden_dim 36"):
        check_model(sizes(fsdp=8, tensor=4), {"hidden_dim": 36})


def test_one_process_holds_all_rows() -> None:
    np.testing.assert_array_equal(
        local_rows(build_mesh(sizes(data=2, fsdp=2, context=2)), 12), np.arange(12)
    )
