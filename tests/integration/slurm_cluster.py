"""A real Slurm of four nodes on this host, each with four pretended GPUs, and jobs on it.

Nothing of the system changes: all files are in one directory, nodes have loopback addresses, and
the GPUs are device files without a device. Needs root and the packages slurm-wlm and munge.
"""

import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from free_ports import free_port

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
NODES = 4
STARTS_S = 240
# `cred_expire` is also how long a requeued job waits, which is two minutes by default.
CONFIGURATION = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthInfo=socket={place}/munge.socket,cred_expire=5
SlurmUser=root
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool/%n
SlurmctldPidFile={place}/controller.pid
SlurmdPidFile={place}/%n.pid
SlurmctldLogFile={place}/controller.log
SlurmdLogFile={place}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
ReturnToService=2
MinJobAge=3600
MessageTimeout=60
TCPTimeout=30
"""
# In place of the installed command: it says its number, and some jobs are slow or crash.
COMMAND = """#!{python}
import os, signal, sys, time
job, start = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
with open("{place}/pids/%s-%s-%s" % (job, start, os.environ["SLURM_PROCID"]), "w") as file:
    file.write(str(os.getpid()))
if "CRASH" in os.environ:
    os.kill(os.getpid(), signal.SIGSEGV)
slow_s = float(os.environ.get("SLOW_S", 0)) if start == "0" else 0
{program}
"""
# The command itself.
TRAINS = """
from consyn_jax.cli.train import main
from consyn_jax.data import loader
inner = loader.BatchLoader.batch
def batch(self, step):
    time.sleep(slow_s if step > 5 else 0)
    return inner(self, step)
loader.BatchLoader.batch = batch
sys.exit(main())
"""
# Processes that meet, lose each other and stop as those of a run do, without the seconds that JAX
# takes. Each step is a line, and is saved.
COUNTS = """
import pathlib
from consyn_jax.distributed import cluster
from consyn_jax.distributed.rendezvous import meet
received = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: received.append(signal.Signals(number).name))
count, number = (int(os.environ["SLURM_" + name]) for name in ("NTASKS", "PROCID"))
address = (os.environ["FIRST_NODE"], cluster._port_of_step())
place = cluster.Place(address, count, number, cluster._start_of_step())
group, _ = meet(place, 60, None, lambda abouts: None, "consyn-train")
output = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
log = output / "metrics.jsonl"
output.mkdir(exist_ok=True)
done = group.gather(str(len(log.read_text().splitlines()) if log.exists() else 0))[0]
for step in range(int(done), 16):
    time.sleep(slow_s if step > 5 else 0.05)
    if number == 0:
        with log.open("a") as file:
            file.write('{"train/loss": %d}\\n' % step)
    if any(names := group.gather(" ".join(received))):
        print("".join(names), "at step", step, flush=True)
        group.leave()
        os._exit(75)
group.leave()
group.close()
"""


def missing_programs() -> list[str]:
    """What is not installed."""
    return [name for name in PROGRAMS if _found(name) is None]


def _found(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class SlurmCluster:
    """Runs from `with` on; `place` is an empty directory with a short path (for a socket)."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.environment = os.environ | {
            "SLURM_CONF": str(place / "slurm.conf"),
            "PATH": f"{place}/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }

    def __enter__(self) -> "SlurmCluster":
        try:
            self._configure()
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(subprocess.CalledProcessError):
            self.run("scancel", "--user=root")
            self._await(lambda: not self.run("squeue", "--noheader"))
        self._stop()

    def run(self, program: str, *arguments: object) -> str:
        """What a program of Slurm prints."""
        return subprocess.run(
            [_found(program) or program, *map(str, arguments)],
            env=self.environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=STARTS_S,
        ).stdout.strip()

    def submit(self, script: Path, *arguments: object, options: str = "", **env: str) -> "Job":
        """`sbatch OPTIONS SCRIPT ARGUMENTS` in the cluster's directory."""
        before = self.environment
        self.environment = before | env
        try:
            number = self.run(
                *("sbatch", "--parsable", f"--chdir={self.place}"),
                *(*options.split(), script, *arguments),
            )
        finally:
            self.environment = before
        return Job(self, number)

    def _configure(self) -> None:
        for name in ("state", "spool", "dev", "bin", "pids"):
            (self.place / name).mkdir()
        for number in range(4):
            os.mknod(self.place / f"dev/gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(240, number))
        (self.place / "gres.conf").write_text(f"Name=gpu File={self.place}/dev/gpu[0-3]\n")
        key = self.place / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        text = CONFIGURATION.format(
            host=os.uname().nodename.partition(".")[0], port=free_port(), place=self.place
        )
        for node in self.nodes:
            text += f"NodeName={node} NodeAddr={node} Port={free_port()} CPUs=4 Gres=gpu:4\n"
        text += "PartitionName=main Nodes=ALL Default=YES PriorityTier=1\n"
        text += "PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF\n"
        (self.place / "slurm.conf").write_text(text)
        self.install(TRAINS)

    def install(self, program: str) -> None:
        """Make `program` the command that jobs submitted from now on run."""
        command = self.place / "bin/consyn-train"
        command.write_text(
            COMMAND.format(
                python=sys.executable,
                place=self.place,
                program=program,
            )
        )
        command.chmod(0o755)

    @property
    def nodes(self) -> list[str]:
        return [f"127.0.0.{number}" for number in range(1, NODES + 1)]

    def _start(self) -> None:
        munge = {"key-file": "key", "socket": "munge.socket", "pid-file": "munge.pid"}
        munge |= {"log-file": "munge.log", "seed-file": "seed"}
        self.run(
            "munged", "--force", *(f"--{name}={self.place}/{file}" for name, file in munge.items())
        )
        self.run("slurmctld", "-c")
        for node in self.nodes:
            self.run("slurmd", "-N", node)
        self._await(
            lambda: self.run("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D") == str(NODES)
        )

    def _await(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + STARTS_S
        while not done():
            assert time.monotonic() < deadline, self.run("sinfo") + self.run("squeue")
            time.sleep(0.25)

    def _stop(self) -> None:
        for file in (*self.place.glob("127.0.0.*.pid"), *self.place.glob("[cm]*.pid")):
            with suppress(OSError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)
        deadline = time.monotonic() + STARTS_S
        while any(self.place.glob("*.pid")) and time.monotonic() < deadline:
            time.sleep(0.1)  # each daemon removes its file


class Job:
    """A job of the cluster, by its number."""

    def __init__(self, cluster: SlurmCluster, number: str) -> None:
        self.cluster, self.number = cluster, number

    def shown(self, name: str) -> str:
        """A field of `scontrol show job`."""
        text = self.cluster.run("scontrol", "show", "job", "-o", self.number)
        found = re.search(rf"\b{name}=(\S*)", text)
        assert found is not None, text
        return found[1]

    @property
    def said(self) -> str:
        log = self.cluster.place / f"consyn-{self.number}.log"
        return log.read_text() if log.exists() else "no log"

    def pid(self, process: int, start: int = 0) -> int:
        """Of a task in one of the job's starts."""
        file = self.cluster.place / f"pids/{self.number}-{start}-{process}"
        return int(file.read_text())

    def trained(self, path: Path, steps: int) -> None:
        """Wait until the run in `path` has logged so many steps."""
        metrics, deadline = path / "metrics.jsonl", time.monotonic() + 600
        while not metrics.exists() or metrics.read_text().count('"train/loss"') < steps:
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def ended(self, seconds: float = 900) -> tuple[str, str, int]:
        """State, exit code and number of restarts, once the job is not requeued any more."""
        deadline = time.monotonic() + seconds
        while (state := self.shown("JobState")) not in ("COMPLETED", "FAILED", "CANCELLED"):
            assert time.monotonic() < deadline, f"{state}: {self.said}"
            time.sleep(0.5)
        return state, self.shown("ExitCode"), int(self.shown("Restarts"))
