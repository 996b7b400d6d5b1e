"""Topologies as text."""

import pytest

from consyn_jax.distributed.hardware import DESCRIBED, TPUS
from consyn_jax.errors import UserError
from consyn_jax.planning.topology import GpuTopology, TpuTopology, parse_topology


def test_hosts_and_gpus() -> None:
    topology = parse_topology("H200:8x4")
    assert topology == GpuTopology(DESCRIBED["h200"], hosts=8, gpus_per_host=4)
    assert topology.num_devices == 32


@pytest.mark.parametrize(
    ("text", "hosts", "gpus"),
    [
        ("h200", 1, 1),
        ("rtx4090:1", 1, 1),
        ("h200:8", 1, 8),
        ("RTX 4090:2x4", 2, 4),
        ("l4 : 4", 1, 4),
    ],
)
def test_what_is_left_out_is_one(text: str, hosts: int, gpus: int) -> None:
    topology = parse_topology(text)
    assert (topology.hosts, topology.gpus_per_host) == (hosts, gpus)


@pytest.mark.parametrize("text", ["h200:", "h200:0x8", "h200:1x8x2", "h200:1x-8", "", "8"])
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"h200:2x8|not in the table"):
        parse_topology(text)


def test_an_unknown_gpu_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean h20\?"):
        parse_topology("h220:1x8")


@pytest.mark.parametrize(
    ("text", "topology", "devices"),
    [
        ("v5e:2x4", TpuTopology(TPUS["v5e"], (2, 4), 1), 8),
        ("V6E : 8x8", TpuTopology(TPUS["v6e"], (8, 8), 1), 64),
        ("v5e:2x4x2", TpuTopology(TPUS["v5e"], (2, 4), 2), 16),
        ("v5e:1x1", TpuTopology(TPUS["v5e"], (1, 1), 1), 1),
        ("v5p:2x2x2", TpuTopology(TPUS["v5p"], (2, 2, 2), 1), 8),
        ("v5p:2x2x1x3", TpuTopology(TPUS["v5p"], (2, 2, 1), 3), 12),
        ("tpu7x:2x2x1", TpuTopology(TPUS["tpu7x"], (2, 2, 1), 1), 8),
    ],
)
def test_slices_of_tpus(text: str, topology: TpuTopology, devices: int) -> None:
    assert parse_topology(text) == topology
    assert topology.num_devices == devices
    assert topology.machine.hosts == topology.slices


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5e", "has 2 dimensions. Write it as v5e:2x4, or as v5e:2x4x2 for two slices."),
        ("v5e:8", "has 2 dimensions"),
        ("v5e:2x4x2x2", "has 2 dimensions"),
        ("v5p:4x4", "has 3 dimensions. Write it as v5p:2x2x2, or as v5p:2x2x2x2 for two slices."),
        ("v5e:16x32", "has 512 chips in a slice, and v5e has at most 256. Use several slices"),
        ("v6e:3x3", "cannot be made of hosts, which have 2 x 2 chips"),
        ("v5p:2x2x2x2x2", "is not of the form GPU:HOSTSxGPUS"),
        ("v7e:2x4", "names a device that is not in the table; did you mean v6e?"),
    ],
)
def test_impossible_slices_are_refused(text: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_topology(text)
    assert words in str(refused.value)


def test_no_figure_of_a_gpu_contradicts_another() -> None:
    for name, gpu in DESCRIBED.items():
        assert 0.7 < gpu.matmul_flops / gpu.bf16_flops < 0.95, name
        assert gpu.network_bandwidth <= gpu.host_bandwidth <= gpu.memory_bandwidth, name
        assert gpu.shared_memory_per_block < gpu.shared_memory_per_core, name
