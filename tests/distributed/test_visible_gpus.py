"""GPUs have identities that processes of a host share, whatever numbers each process sees."""

from pathlib import Path

import pytest

from consyn_jax.distributed.launch import share_devices
from consyn_jax.distributed.visible_gpus import visible_gpus

# As NVIDIA's driver writes it; the minor numbers need not follow the bus ids.
INFORMATION = """Model: \t\t NVIDIA H100 80GB HBM3
IRQ:   \t\t 33
GPU UUID: \t {uuid}
Video BIOS: \t 96.00.74.00.01
Bus Type: \t PCIe
Bus Location: \t {bus}
Device Minor: \t {minor}
GPU Excluded:\t No
"""
MINORS = (1, 0, 3, 2)
BUSES = [f"0000:{bus}:00.0" for bus in ("1b", "43", "9d", "df")]


def uuid(bus: int) -> str:
    return f"GPU-{bus}0f5f8b4-0f5d-1d0b-9a3b-8d4a7c6e5f4{bus}"


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a driver with four GPUs."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for number, (bus, minor) in enumerate(zip(BUSES, MINORS, strict=True)):
        (tmp_path / "gpus" / bus).mkdir(parents=True)
        (tmp_path / "gpus" / bus / "information").write_text(
            INFORMATION.format(uuid=uuid(number), bus=bus, minor=minor)
        )
    return tmp_path


def seen(host: Path, *minors: int) -> list[str]:
    """What a process sees that may open these device files."""
    devices = host / "-".join(map(str, ("dev", *minors)))
    devices.mkdir(exist_ok=True)
    for minor in minors:
        (devices / f"nvidia{minor}").touch()
    return visible_gpus(host / "gpus", devices)


def test_each_process_sees_its_own_gpu_0(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `--gpus-per-task=1` with control groups."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    views = [seen(host, minor) for minor in (0, 1, 2, 3)]
    assert views == [[uuid(1)], [uuid(0)], [uuid(3)], [uuid(2)]]
    assert share_devices([("a", view) for view in views]) == [None] * 4
    assert share_devices([("a", seen(host, 0, 1)), ("b", seen(host, 0, 1))]) == [None, None]


def test_all_processes_see_all_gpus(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = seen(host, 0, 1, 2, 3)
    assert view == [uuid(bus) for bus in range(4)]
    assert share_devices([("a", view)] * 4) == [[0], [1], [2], [3]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 1")
    assert seen(host, 0, 1, 2, 3) == [uuid(3), uuid(1)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{uuid(2)},MIG-1,7")
    assert seen(host, 0, 1, 2, 3) == [uuid(2), "MIG-1", "7"], "what is no number is an identity"
    for value in ("", " "):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert seen(host, 0, 1, 2, 3) == []
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert seen(host, 0, 1, 2, 3) == []


def test_a_gpu_that_the_driver_has_not_read_yet_is_its_bus_id(host: Path) -> None:
    place = host / "gpus" / BUSES[0] / "information"
    place.write_text(place.read_text().replace(uuid(0), "GPU-????????-????-????"))
    assert seen(host, 1, 0) == [BUSES[0], uuid(1)]


def test_without_the_driver_s_files_names_are_identities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nvidia1", "nvidia0", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus(tmp_path / "absent", tmp_path) == ["nvidia0", "nvidia1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert visible_gpus(tmp_path / "absent", tmp_path) == ["1", "0"]
