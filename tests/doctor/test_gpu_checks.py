"""Drivers and GPUs that are as bad as they can be: every fault is named, with what to do."""

import dataclasses
from typing import Any

import pytest

from consyn_jax.distributed.gpu_clocks import ClockState
from consyn_jax.doctor.gpu_checks import check_clocks, check_driver, check_gpus
from consyn_jax.doctor.gpu_facts import DriverState, GpuState
from consyn_jax.doctor.machine_findings import FAIL, INFO, PASS, WARN, Finding

H100 = GpuState(
    "NVIDIA H100 80GB HBM3", 84_942_979_072, 500_000_000, 1980, 35, True, 0, False, False, 18, 0
)
GOOD = DriverState("580.65.06", (13, 0), (H100,) * 8, devices=8, on_the_bus=8)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    assert len({each.name for each in findings}) == len(findings)
    return {each.name: each for each in findings}


def gpus(**changes: Any) -> dict[str, Finding]:
    """Findings about eight GPUs, the third of which is changed."""
    states = [H100] * 8
    states[2] = dataclasses.replace(H100, **changes)
    return by_name(check_gpus(states))


def test_a_good_machine_passes() -> None:
    found = [*check_driver(GOOD, 13), *check_gpus(GOOD.gpus)]
    assert [each.status for each in found] == [PASS] * 5
    assert found[0].found == "580.65.06, up to CUDA 13.0; JAX needs CUDA 13"
    assert [each.found for each in found[1:]] == [
        "8 x NVIDIA H100 80GB HBM3",
        "84.9 GB each, and free",
        "on, and no uncorrected error since the driver was loaded",
        "18 links for each GPU, all up",
    ]


@pytest.mark.parametrize(
    ("version", "supports", "cuda", "status", "advice"),
    [
        ("470.57.02", (11, 4), 13, FAIL, "Install driver 580 or newer."),
        ("470.57.02", None, 13, FAIL, "Install driver 580 or newer."),
        ("535.104.05", (12, 2), 13, FAIL, "or use CUDA 12: pip install 'jax[cuda12]'"),
        ("575.57.08", (12, 9), 13, FAIL, "or use CUDA 12"),
        ("525.60.12", (11, 8), 12, FAIL, "Install driver 525.60.13 or newer."),
        ("550.54.14", (13, 0), 13, WARN, "compat libraries"),  # libcuda of a compat package
        ("580.65.06", (13, 0), 13, PASS, ""),
        ("580.65.06", (13, 0), 12, PASS, ""),
        ("525.60.13", (12, 0), 12, PASS, ""),
        ("470.57.02", (11, 4), None, PASS, ""),  # nothing here needs it
    ],
)
def test_driver_and_cuda_go_together_or_not(
    version: str, supports: tuple[int, int] | None, cuda: int | None, status: str, advice: str
) -> None:
    state = dataclasses.replace(GOOD, version=version, cuda=supports)
    (found,) = check_driver(state, cuda)
    assert (found.name, found.status) == ("driver", status)
    assert found.found.startswith(version)
    assert advice in found.advice
    assert ("too old for JAX's CUDA" in found.found) == (status == FAIL)


def test_no_gpu_is_one_line() -> None:
    (found,) = check_driver(DriverState(problem="NVML Shared Library Not Found"), None)
    assert (found.name, found.status) == ("GPU", WARN)
    assert check_gpus(()) == check_clocks((), ()) == []


@pytest.mark.parametrize(("cuda", "status"), [(None, WARN), (13, FAIL)])
def test_a_gpu_without_a_driver(cuda: int | None, status: str) -> None:
    (found,) = check_driver(DriverState(on_the_bus=4), cuda)
    assert (found.status, found.found) == (
        status,
        "4 GPUs on the PCI bus, but no driver is loaded",
    )
    assert "--gpus all" in found.advice
    (found,) = check_driver(DriverState("580.65.06"), cuda)
    assert (found.status, found.found) == (status, "580.65.06 is loaded, but shows no GPU")


def test_nvml_that_cannot_be_asked_is_said() -> None:
    missing = DriverState("580.65.06", problem="the package nvidia-ml-py is missing", devices=2)
    _, found = check_driver(missing, 13)
    assert (found.name, found.status, found.advice) == (
        "NVML",
        WARN,
        "Install it with pip install nvidia-ml-py.",
    )
    mismatch = dataclasses.replace(missing, problem="Driver/library version mismatch")
    assert "reload or reinstall the driver" in check_driver(mismatch, 13)[1].advice


@pytest.mark.parametrize(
    ("changes", "name", "status", "words"),
    [
        ({"uncorrected": 3}, "ECC", FAIL, "GPU 2: 3 uncorrected memory errors"),
        ({"remap_failed": True}, "ECC", FAIL, "GPU 2: a damaged row of memory could not be"),
        ({"remap_pending": True}, "ECC", WARN, "GPU 2: a damaged row of memory will be"),
        ({"ecc": False}, "ECC", INFO, "GPU 2: off"),
        ({"links_up": 16, "links_down": 2}, "NVLink", FAIL, "GPU 2: 2 of 18 down"),
        ({"links_up": 0}, "NVLink", FAIL, "links differ"),
        ({"memory_used": 40_000_000_000}, "GPU memory", WARN, "GPU 2: 40.0 GB"),
        ({"name": "NVIDIA H200"}, "GPUs", WARN, "several kinds"),
    ],
)
def test_each_fault_of_one_gpu_is_named_and_nothing_else(
    changes: dict[str, Any], name: str, status: str, words: str
) -> None:
    found = gpus(**changes)
    assert found[name].status == status
    assert words in found[name].found
    assert {each.status for other, each in found.items() if other != name} == {PASS}


def test_links_that_are_all_down_are_a_fault_only_where_they_are_sold() -> None:
    dead = dataclasses.replace(H100, links_up=0)
    assert by_name(check_gpus([dead] * 2))["NVLink"].status == FAIL
    card = dataclasses.replace(dead, name="NVIDIA GeForce RTX 4090")
    assert by_name(check_gpus([card] * 2))["NVLink"].status == INFO
    assert "NVLink" not in by_name(check_gpus([dead]))


@pytest.mark.parametrize(
    ("clock", "reasons", "status", "words"),
    [
        (1980, 0, PASS, "1980 of 1980 MHz"),
        (1755, 0x4, PASS, "limited by the power limit"),
        (1500, 0x20, WARN, "the GPU or its memory is too hot"),
        (900, 0x2, WARN, "application clocks"),
        (345, 0x40, FAIL, "too hot, and the hardware has halved its clock"),
        (345, 0x8, FAIL, "hardware slowdown"),
        (345, 0x80, FAIL, "power brake"),
        (None, 0, PASS, "clocks are not reported"),
    ],
)
def test_throttling(clock: int | None, reasons: int, status: str, words: str) -> None:
    (found,) = check_clocks([H100], [ClockState(clock, reasons)])
    assert (found.name, found.status) == ("throttling", status)
    assert words in found.found
