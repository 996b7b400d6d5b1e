import pytest

from consyn_jax.config import UserError
from consyn_jax.planning.topology import GPUS, parse_topology


def test_hosts_and_gpus() -> None:
    topology = parse_topology("H200:8x4")
    assert (topology.gpu, topology.hosts, topology.gpus_per_host, topology.num_devices) == (GPUS["h200"], 8, 4, 32)


@pytest.mark.parametrize("text", ["h200", "h200:8", "h200:0x8", "h200:1x8x2", "h200:1x-8", ""])
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="h200:1x8"):
        parse_topology(text)


def test_an_unknown_gpu_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean h200\?"):
        parse_topology("h20:1x8")
