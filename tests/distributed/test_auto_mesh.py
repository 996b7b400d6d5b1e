"""The rules of `--mesh auto`; tests/planning/test_plan.py has how near the best its choices are."""

import pytest

from consyn_jax.distributed.auto_mesh import Machine, choose_mesh

SPLITS = {"context": 2048, "tensor": 12}


def held(sizes: dict[str, int]) -> int:
    """Bytes per device of a state of 640 bytes."""
    return 640 // sizes["fsdp"]


@pytest.mark.parametrize(
    ("hosts", "per_host", "memory", "data", "fsdp"),
    [
        (1, 1, 100, 1, 1),
        (1, 8, 100, 1, 8),
        (16, 8, 1000, 16, 8),  # one device can hold it
        (16, 8, 100, 2, 64),  # one device cannot
        (16, 8, 10, 1, 128),  # 64 devices cannot
        (16, 8, 1, 1, 128),  # nothing can hold it: the compiler will report it
        (6, 4, 100, 1, 24),
    ],
)
def test_weights_are_split_over_hosts_as_the_memory_requires(
    hosts: int, per_host: int, memory: int, data: int, fsdp: int
) -> None:
    choice = choose_mesh(Machine(hosts, per_host, memory), 768, held, hosts * per_host, SPLITS)
    assert choice.sizes == {"data": data, "fsdp": fsdp, "context": 1, "tensor": 1}
    if hosts * per_host == 1:
        begins = "one device"
    elif hosts > 1 and data == hosts:
        begins = f"each of {hosts} hosts has a copy of the weights, split "
    else:
        begins = "weights split "
    assert choice.reason.startswith(begins)


def test_fsdp_divides_the_model() -> None:
    """768 does not divide over 512 devices; where nothing divides, the mesh is refused later."""
    assert choose_mesh(Machine(64, 8, 1), 768, held, 512, SPLITS).sizes == {
        "data": 2,
        "fsdp": 256,
        "context": 1,
        "tensor": 1,
    }
    assert choose_mesh(Machine(1, 5, 1), 768, held, 5, SPLITS).sizes["fsdp"] == 5


@pytest.mark.parametrize(
    ("hosts", "batch", "memory", "expected"),
    [
        (1, 4, 1000, (1, 4, 2, 1)),
        (1, 2, 1000, (1, 2, 4, 1)),
        (1, 12, 1000, (1, 8, 1, 1)),  # not fewer than devices: the batch is refused later
        (4, 16, 1000, (4, 4, 2, 1)),
        (1, 2, 200, (1, 2, 1, 4)),  # context would copy weights that no device can hold
        (1, 2, 1, (1, 2, 4, 1)),  # nothing can hold it
        (1, 1, 1000, (1, 1, 8, 1)),
        # 32 devices per sequence are more than a host has: the batch is refused later
        (4, 3, 1000, (4, 8, 1, 1)),
    ],
)
def test_devices_share_a_sequence_when_there_are_too_few(
    hosts: int, batch: int, memory: int, expected: tuple[int, ...]
) -> None:
    def needs(sizes: dict[str, int]) -> int:
        return 640 // (sizes["fsdp"] * sizes["tensor"])

    choice = choose_mesh(Machine(hosts, 8, memory), 768, needs, batch, SPLITS)
    assert tuple(choice.sizes.values()) == expected
    shared = [axis for axis in ("context", "tensor") if choice.sizes[axis] > 1]
    assert [axis for axis in ("context", "tensor") if choice.reason.endswith(f"({axis})")] == shared
