"""Speeds against the table, and a measurement that is real."""

import jax
import pytest

from consyn_jax.distributed.gpu_clocks import ClockState
from consyn_jax.doctor.examination import under_load
from consyn_jax.doctor.machine_findings import FAIL, INFO, PASS, WARN
from consyn_jax.doctor.speed_checks import check_speeds
from consyn_jax.doctor.speed_facts import Speed, Work, measure_speed

H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("flops", "bandwidth", "statuses"),
    [
        (700e12, 3.0e12, [PASS, PASS]),
        (500e12, 3.0e12, [WARN, PASS]),
        (300e12, 1.0e12, [FAIL, FAIL]),
    ],
)
def test_the_slowest_device_decides(flops: float, bandwidth: float, statuses: list[str]) -> None:
    good = Speed(H100, "bfloat16", 720e12, 3.1e12)
    found = check_speeds([good, Speed(H100, "bfloat16", flops, bandwidth)])
    assert [each.status for each in found] == statuses
    assert f"{flops / 794e12:.0%} of the table's 794.0 TFLOP/s" in found[0].found
    assert "of the table's 3.4 TB/s" in found[1].found


def test_a_device_that_is_not_in_the_table_has_no_verdict() -> None:
    found = check_speeds([Speed("cpu", "float32", 80e9, 9e9)])
    assert [(each.status, each.found) for each in found] == [
        (INFO, "80 GFLOP/s in float32"),
        (INFO, "9.0 GB/s in the device's memory"),
    ]
    assert check_speeds([]) == []


def test_a_device_without_memory_is_named() -> None:
    (found,) = check_speeds([Speed(H100, problem="RESOURCE_EXHAUSTED: out of memory")])
    assert (found.status, found.found[:28]) == (FAIL, "device 0: RESOURCE_EXHAUSTED")


def test_a_matmul_and_a_copy_are_timed() -> None:
    called = []
    found = measure_speed(
        jax.local_devices()[1], Work(64, "float32", 1 << 16), lambda: called.append(1)
    )
    assert (found.kind, found.dtype, found.problem) == ("cpu", "float32", "")
    assert 1e4 < found.matmul_flops < 1e13
    assert 1e4 < found.copy_bandwidth < 1e13


def test_the_clock_of_a_gpu_is_that_of_its_own_turn() -> None:
    first = (ClockState(1980, 0x4), ClockState(345, 0x1))
    second = (ClockState(345, 0x1), ClockState(1500, 0x40))
    assert under_load([first, second]) == (ClockState(1980, 0x5), ClockState(1500, 0x41))
    assert under_load([]) == ()
