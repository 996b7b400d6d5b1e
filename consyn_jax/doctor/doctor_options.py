"""The settings of `consyn-doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from consyn_jax.flags import flag


@dataclass(frozen=True)
class CheckOptions:
    """The checks to make, and the format of the output."""

    output: str = flag(
        "./output", "directory whose disk is checked; it need not exist, and is not created"
    )
    quick: bool = flag(False, "leave out the measurements: matmul, copy and disk speed")
    json: bool = flag(False, "print one JSON object instead of lines")


@dataclass(frozen=True)
class HostOptions:
    """Flags by which the processes of several hosts find each other, as in consyn-train."""

    distributed: bool = flag(
        False,
        "run as one of several processes, one on each host, to compare clocks and test the "
        "network. The address and the process numbers come from Slurm, Open MPI, Kubernetes, or "
        "the next three flags.",
    )
    coordinator_address: str | None = flag(
        None, "address of process 0, with a port that is free; the same for all processes"
    )
    num_processes: int | None = flag(None, "number of processes")
    process_id: int | None = flag(None, "number of this process, from 0")
    rendezvous_seconds: float = flag(40.0, "time for all processes to start and find each other")


@dataclass(frozen=True)
class DoctorConfig:
    """All settings of one `consyn-doctor` command."""

    checks: CheckOptions = CheckOptions()
    hosts: HostOptions = HostOptions()
