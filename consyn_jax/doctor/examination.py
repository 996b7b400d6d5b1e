"""Run the checks of `consyn-doctor` on this machine, or on all hosts of a group."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from pathlib import Path
from typing import Any

from consyn_jax.config import HardwareOptions
from consyn_jax.distributed.gpu_clocks import ClockState, read_clocks
from consyn_jax.doctor.doctor_options import DoctorConfig, HostOptions
from consyn_jax.doctor.gpu_checks import check_clocks, check_driver, check_gpus
from consyn_jax.doctor.gpu_facts import DriverState, read_driver
from consyn_jax.doctor.host_checks import check_hosts
from consyn_jax.doctor.machine_findings import FAIL, INFO, Finding
from consyn_jax.doctor.software_checks import check_attention, check_software
from consyn_jax.doctor.software_facts import read_software
from consyn_jax.doctor.speed_checks import check_speeds
from consyn_jax.doctor.speed_facts import Speed, measure_speed
from consyn_jax.doctor.system_checks import check_limits, check_storage
from consyn_jax.doctor.system_facts import read_limits, read_storage
from consyn_jax.errors import ProcessMissing

PROG = "consyn-doctor"


def examine(config: DoctorConfig) -> list[Finding]:
    """Check this machine or, with `--distributed`, all hosts.

    Returns:
        All findings in process 0, which reports them; an empty list in every other process.

    Raises:
        UserError: the processes of `--distributed` were started wrongly.
    """
    if config.hosts.distributed:
        return _examine_hosts(config)
    alone = Finding(
        "hosts",
        INFO,
        "n/a with one process; --distributed compares the clocks and tests the network of hosts",
    )
    return [*examine_machine(config), alone]


def examine_machine(config: DoctorConfig) -> list[Finding]:
    """Check the machine on which this process runs."""
    measures = not config.checks.quick
    driver = read_driver()  # before JAX uses memory of the GPUs
    limits = read_limits()
    storage = read_storage(Path(config.checks.output), measure=measures)
    # Otherwise JAX would reserve GPU memory that another run on this machine needs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    software = read_software()
    speeds, clocks = _measured(driver) if measures and not software.problem else ([], ())
    return [
        *check_driver(driver, software.cuda),
        *check_gpus(driver.gpus),
        *check_clocks(driver.gpus, clocks),
        *check_software(software, driver.count),
        *check_attention(software),
        *check_speeds(speeds),
        *check_limits(limits, driver.count),
        *check_storage(storage),
    ]


def _measured(driver: DriverState) -> tuple[list[Speed], tuple[ClockState, ...]]:
    """Measure the speed of every device and, at the same time, the clocks of all GPUs."""
    import jax

    seen: list[tuple[ClockState, ...]] = []
    devices = jax.local_devices()
    if devices[0].platform == "cpu":  # all of them are the same cores
        return [measure_speed(devices[0])], ()
    speeds = [
        measure_speed(device, while_busy=lambda: seen.append(read_clocks())) for device in devices
    ]
    return speeds, under_load(seen)


def under_load(samples: list[tuple[ClockState, ...]]) -> tuple[ClockState, ...]:
    """Merge the samples of each GPU: its highest clock, and all reasons for throttling.

    GPUs are measured one at a time, and an idle GPU has a low clock. A sample that NVML could not
    take is empty.
    """
    together = []
    for each in zip(*filter(None, samples), strict=True):
        reasons = 0
        for sample in each:
            reasons |= sample.reasons
        clocks = [sample.clock_mhz for sample in each if sample.clock_mhz is not None]
        together.append(ClockState(max(clocks, default=None), reasons))
    return tuple(together)


# ------------------------------------------------------------------------------------ several hosts


def _examine_hosts(config: DoctorConfig) -> list[Finding]:
    from consyn_jax.distributed.cluster import find_cluster
    from consyn_jax.distributed.rendezvous import meet
    from consyn_jax.doctor.host_facts import read_hosts

    hardware, own_host = _hardware(config.hosts), socket.gethostname()
    place = find_cluster(hardware)
    try:
        group, hosts = meet(
            place, hardware.rendezvous_seconds, own_host, lambda abouts: abouts, PROG
        )
    except ProcessMissing as missing:
        advice = (
            "Correct this fault, and start all processes again. The lines above are about this "
            "host only."
        )
        return [*examine_machine(config), Finding("network", FAIL, str(missing), advice)]
    between = check_hosts(read_hosts(group))
    # One process per host: two would disturb each other's measurements of the same devices.
    is_first_here = hosts.index(own_host) == place.process_id
    own = examine_machine(config) if is_first_here else []
    everyone = group.gather(json.dumps([dataclasses.asdict(each) for each in own]))
    group.leave()
    group.close()
    if place.process_id:
        return []
    return [*between, *_by_host(hosts, [json.loads(text) for text in everyone])]


def _hardware(options: HostOptions) -> HardwareOptions:
    return HardwareOptions(**dataclasses.asdict(options))


def _by_host(hosts: list[str], everyone: list[list[dict[str, Any]]]) -> list[Finding]:
    """Add the names of hosts to their findings; merge equal findings of several hosts."""
    places: dict[Finding, list[str]] = {}
    for host, findings in zip(hosts, everyone, strict=True):
        for each in findings:
            places.setdefault(Finding(**each), []).append(host)
    return [
        dataclasses.replace(each, host=_hosts_in_words(where, len(set(hosts))))
        for each, where in places.items()
    ]


def _hosts_in_words(where: list[str], count: int) -> str:
    return "all hosts" if len(where) == count > 1 else ", ".join(where)
