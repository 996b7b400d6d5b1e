"""Connect to a Ray cluster or start a local Ray instance, and explain Ray's errors to the user."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from consyn_jax.data.preparation.workers.ray_address import START, check_address, named_address
from consyn_jax.data.preparation.workers.ray_signals import holding_signals
from consyn_jax.errors import AGAIN, UserError, brief, listed

_MARK = "CONSYN_RAY_OF"  # in the environment of a Ray instance started here
LOOK_SECONDS = 10.0  # time between two counts of the cluster's processors
# Errors that `ray.init` raises, besides Ray's own.
_REFUSALS = (ConnectionError, RuntimeError, ValueError, OSError)
_INSTALL = f"Install the versions of this machine on all nodes, and {AGAIN}."


def connect(address: str | None, processors: int | None) -> Any:
    """The module `ray`, connected to a cluster.

    Args:
        address: HOST:PORT of the head node, or "auto". None means the cluster in RAY_ADDRESS or, if
            that is not set, a local Ray instance, started without dashboard and usage statistics.
        processors: number of concurrent tasks in a local Ray instance; None for one per core.

    Raises:
        UserError: Ray is not installed, or no cluster with the same versions of Ray and Python
            accepts the connection.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"--engine ray needs {error.name}, which is not installed. Install it on all nodes "
            "with: pip install 'consyn_jax[cluster]'"
        ) from error
    name, given = named_address(address)
    if given:
        check_address(name, given)
        found: dict[str, Any] = {"address": given}
    else:
        # By default, Ray lowers the priority of its workers (niceness 15) in favour of other work.
        # Here the workers do the main work.
        os.environ.setdefault("RAY_worker_niceness", "0")
        cores = len(os.sched_getaffinity(0))
        found = {"address": "local", "num_cpus": processors or cores, "include_dashboard": False}
    os.environ[_MARK] = str(os.getpid())
    try:
        with holding_signals(_kill_started):
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **found)
    except BaseException as error:
        # An interrupted or failed start leaves processes that `ray.shutdown` does not know of.
        disconnect(ray)
        known = (*_REFUSALS, ray.exceptions.RayError)
        # Ray raises a plain Exception if a node does not start within its time.
        if type(error) is Exception or isinstance(error, known):
            raise _refusal(f"{name} {given}" if given else "", error) from error
        raise
    finally:
        del os.environ[_MARK]
    return ray


def disconnect(ray: Any) -> None:
    """Leave the cluster; end all processes of a local Ray instance.

    Ctrl-C in a terminal also reaches these processes. Some of them may then survive Ray's shutdown,
    and are killed.
    """
    with holding_signals(_kill_started):
        ray.shutdown()
        _kill_started()


def _kill_started() -> None:
    """Kill the processes of the Ray instance that this process started."""
    while left := _started_here():  # again, because a process may just have started another
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _started_here() -> list[int]:
    """List the processes of the Ray instance that this process started."""
    mark, found = f"{_MARK}={os.getpid()}".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # other users' processes, and those that have just ended
            if mark in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
    return [pid for pid in found if pid != os.getpid()]


def _refusal(place: str, error: Exception) -> UserError:
    """Turn an error of `ray.init` into an error with a message for the user.

    Args:
        place: the name and the address of the cluster; empty for a local Ray instance.
    """
    text = " ".join(str(error).split())
    if "Version mismatch" in text:
        found = re.findall(r"Ray: (\S+) Python: ([\d.]*\d)", text)
        sides = [f"Ray {number} and Python {python}" for number, python in found]
        of_cluster, ours = sides if len(sides) == 2 else ("one version of Ray or Python", "another")
        return UserError(
            f"The Ray cluster runs {of_cluster}, this machine {ours}. Install the same versions on "
            "all nodes."
        )
    if not place:
        return UserError(
            f"A local Ray instance cannot be started: {brief(error)}. Leave --engine ray out to "
            "work without Ray."
        )
    if place.endswith(" auto"):
        return UserError(f"No Ray cluster answers at {place}: {brief(error)}. {START}")
    return UserError(
        f"Ray at {place} refused this machine: {brief(error)}. Give the port of ray start --head, "
        "and make this machine a node of the cluster (ray start --address HEAD:PORT), with the "
        "cluster's token (RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH as on the head node)."
    )


class Processors:
    """Counts the tasks that can run at a time.

    Args:
        count: the number of tasks; None for one on each processor of the cluster.
    """

    def __init__(self, ray: Any, count: int | None) -> None:
        self._ray, self._count = ray, count
        self._looked_s, self._found = -LOOK_SECONDS, 0

    def count(self) -> int:
        """Return the current number; it changes when nodes join or leave."""
        if self._count is not None:
            return self._count
        if time.monotonic() - self._looked_s > LOOK_SECONDS:
            self._looked_s = time.monotonic()
            self._found = int(self._ray.cluster_resources().get("CPU", 0))
        return max(self._found, 1)


def strangers() -> list[str]:
    """Directories on Ray's import path from which workers must not import.

    Ray puts the current directory on this path. There, a user's json.py would replace Python's
    module json. So the directory is left out, unless it contains this package.
    """
    here = str(Path.cwd())
    return [] if here == str(Path(__file__).parents[4]) else [here]


def other_versions(node: str, differences: dict[str, str]) -> UserError:
    """Make the error for a node on which versions of packages differ."""
    found = listed([f"{name} {value}" for name, value in differences.items()])
    return UserError(f"Node {node} of the Ray cluster has {found}. {_INSTALL}")


@contextmanager
def errors_as_sentences(ray: Any, retries: int, work: str = "block") -> Iterator[None]:
    """Turn Ray's errors about a lost task into errors with a message for the user.

    Args:
        retries: how often Ray repeats a task.
        work: name of the unit of work in messages, such as "block".
    """
    errors = ray.exceptions
    try:
        yield
    except ImportError as error:
        missing = getattr(error, "cause", error)
        raise UserError(
            f"A node of the Ray cluster cannot import {missing.name or brief(missing)}. {_INSTALL}"
        ) from error
    except (errors.WorkerCrashedError, errors.OutOfMemoryError) as error:
        raise UserError(
            f"A worker process on the Ray cluster was killed {retries + 1} times at the same "
            f"{work}; running out of memory is the usual cause. Give Ray fewer CPUs on each "
            f"node, or lower --num_workers, and {AGAIN}; it continues."
        ) from error
    except errors.RayTaskError:
        raise  # a defect, with the traceback of the worker
    except errors.RayError as error:  # nodes lost, a full object store or disk
        raise UserError(
            f"The Ray cluster lost a {work}: {brief(error)}. Look at `ray status`, and {AGAIN}; "
            "it continues."
        ) from error
