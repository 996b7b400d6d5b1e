"""Detect this process's number in the run and process 0's address, from flags or the scheduler."""

from __future__ import annotations

import os
import warnings
from typing import Any, NamedTuple

from consyn_jax.config import HardwareOptions
from consyn_jax.errors import UserError, brief

FIRST_PORT, PORTS = 61440, 4096  # the range that JAX uses under Slurm
PORTS_APART = 257  # a prime, so that steps of jobs with close numbers seldom get the same port


class Place(NamedTuple):
    """This process's number in the run, and the address of process 0.

    Attributes:
        address: Host and port of process 0.
        num_processes: Number of processes of the run.
        process_id: Number of this process, counted from 0.
        start: Identity of this launch from the scheduler, the same in all processes; "" if unknown.
    """

    address: tuple[str, int]
    num_processes: int
    process_id: int
    start: str = ""


def find_cluster(options: HardwareOptions) -> Place:
    """Determine this process's `Place` from flags, Slurm, Open MPI or Kubernetes.

    The flags --coordinator_address, --num_processes and --process_id are used if all three are
    given.

    Raises:
        UserError: There are neither flags nor a known scheduler, or a value is missing.
    """
    address: Any = options.coordinator_address
    count: Any = options.num_processes
    number: Any = options.process_id
    if address is not None and count is not None and number is not None:
        return Place(_parsed(address), count, number)
    address, count, number = _detected()
    host, port = _parsed(address)
    if _is_of_open_mpi() or "SLURM_STEP_ID" not in os.environ:
        return Place((host, port), count, number)
    return Place((host, _port_of_step()), count, number, _start_of_step())


def _parsed(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _is_of_open_mpi() -> bool:
    return "OMPI_COMM_WORLD_SIZE" in os.environ


def _port_of_step() -> int:
    """Choose the port of process 0 for a step of a Slurm job.

    Steps on one host need different ports, so the port depends on the job id and the step number.
    Step 0 gets the port that JAX would choose.
    """
    job, step = (int(os.environ[f"SLURM_{name}_ID"]) for name in ("JOB", "STEP"))
    return FIRST_PORT + (job + PORTS_APART * step) % PORTS


def _start_of_step() -> str:
    job, step = os.environ["SLURM_JOB_ID"], os.environ["SLURM_STEP_ID"]
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return f"step {step} of Slurm job {job}, restart {restarts}"


def _detected() -> tuple[Any, Any, Any]:
    from jax._src.clusters import ClusterEnv

    flags = "--coordinator_address HOST:PORT --num_processes N --process_id I"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, None, None, None
            )
        except Exception as error:  # whatever a cluster's library raises
            raise UserError(
                "--distributed cannot learn from the cluster which process this is: "
                f"{brief(error)}. Give {flags}."
            ) from error
    address, count, number, _ = found
    if None not in (address, count, number):
        return address, count, number
    if _is_of_open_mpi():
        raise UserError(
            "--distributed: this version of Open MPI does not provide the address of process 0. "
            "Inside mpirun, give --coordinator_address HOST:PORT --num_processes "
            "$OMPI_COMM_WORLD_SIZE --process_id $OMPI_COMM_WORLD_RANK."
        )
    if any("kubernetes" in str(warning.message).lower() for warning in caught):
        raise UserError(
            f"--distributed needs the package kubernetes to ask the cluster. Install it with "
            f"pip install kubernetes, or give {flags}."
        )
    raise UserError(f"--distributed does not find Slurm, Open MPI or Kubernetes. Give {flags}.")
