"""`--mesh auto` as rules; that its choices are near the best is for tests/planning/test_plan.py."""

import pytest

from consyn_jax.distributed.auto_mesh import choose_mesh

SPLITS = {"context": 2048, "tensor": 12}


def held(sizes: dict[str, int]) -> int:
    """A state of 640 bytes."""
    return 640 // sizes["fsdp"]


@pytest.mark.parametrize(
    ("hosts", "per_host", "memory", "data", "fsdp"),
    [
        (1, 1, 100, 1, 1),
        (1, 8, 100, 1, 8),
        (16, 8, 1000, 16, 8),  # one device could hold it
        (16, 8, 100, 2, 64),  # one could not
        (16, 8, 10, 1, 128),  # and not 64 of them
        (16, 8, 1, 1, 128),  # nothing holds it: the compiler will say so
        (6, 4, 100, 1, 24),
    ],
)
def test_hosts_share_the_weights_as_the_memory_asks(hosts: int, per_host: int, memory: int, data: int, fsdp: int) -> None:
    choice = choose_mesh(hosts, per_host, 768, memory, held, hosts * per_host, SPLITS)
    assert choice.sizes == {"data": data, "fsdp": fsdp, "context": 1, "tensor": 1}
    assert choice.reason.startswith("one device" if hosts * per_host == 1 else "weights split ")


def test_fsdp_divides_the_model() -> None:
    """768 does not divide over 512 devices; where nothing divides, the check of the mesh speaks."""
    assert choose_mesh(64, 8, 768, 1, held, 512, SPLITS).sizes == {"data": 2, "fsdp": 256, "context": 1, "tensor": 1}
    assert choose_mesh(1, 5, 768, 1, held, 5, SPLITS).sizes["fsdp"] == 5


@pytest.mark.parametrize(
    ("hosts", "batch", "memory", "expected"),
    [
        (1, 4, 1000, (1, 4, 2, 1)),
        (1, 2, 1000, (1, 2, 4, 1)),
        (1, 12, 1000, (1, 8, 1, 1)),  # not fewer than devices: the check of the batch will say so
        (4, 16, 1000, (4, 4, 2, 1)),
        (1, 2, 200, (1, 2, 1, 4)),  # context would copy what no device holds
        (1, 2, 1, (1, 2, 4, 1)),  # nothing holds it
        (1, 1, 1000, (1, 1, 8, 1)),
        (4, 3, 1000, (4, 8, 1, 1)),  # 32 devices to a sequence are more than a host has: the check of the batch will say so
    ],
)
def test_devices_share_a_sequence_where_there_are_too_few(hosts: int, batch: int, memory: int, expected: tuple[int, ...]) -> None:
    def needs(sizes: dict[str, int]) -> int:
        return 640 // (sizes["fsdp"] * sizes["tensor"])

    choice = choose_mesh(hosts, 8, 768, memory, needs, batch, SPLITS)
    assert tuple(choice.sizes.values()) == expected
    shared = [axis for axis in ("context", "tensor") if choice.sizes[axis] > 1]
    assert [axis for axis in ("context", "tensor") if choice.reason.endswith(f"({axis})")] == shared
