"""Topologies as text."""

import pytest

from consyn_jax.distributed.hardware import DESCRIBED
from consyn_jax.errors import UserError
from consyn_jax.planning.topology import GpuTopology, parse_topology


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


def test_no_figure_of_a_gpu_contradicts_another() -> None:
    for name, gpu in DESCRIBED.items():
        assert 0.7 < gpu.matmul_flops / gpu.bf16_flops < 0.95, name
        assert gpu.network_bandwidth <= gpu.host_bandwidth <= gpu.memory_bandwidth, name
        assert gpu.shared_memory_per_block < gpu.shared_memory_per_core, name
