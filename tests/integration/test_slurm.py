"""The shipped job script on a real Slurm: whatever ends a job, it goes on where it was.

Each job has its own fault, and they run at the same time.
"""

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import Run, cannot_run
from .nursery import FLAGS
from .slurm_cluster import COUNTS, TRAINS, Job, SlurmCluster, missing_programs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm" / "train.sbatch"
OPTIONS = "--cpus-per-task=1 --gpus-per-node=1 --time=10 --nodelist="
HERE, THERE = "127.0.0.[1-2]", "127.0.0.[3-4]"
MORE = ["--eval_steps", "6", "--save_steps", "2", "--rendezvous_seconds", "120"]


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[SlurmCluster]:
    """Without GPUs for JAX, which would take the pretended ones for real."""
    if missing := missing_programs():
        cannot_run(f"Slurm is not installed: no {', '.join(missing)}")
    if os.geteuid() != 0:
        cannot_run("Only root can start a Slurm with GPUs")
    patch = pytest.MonkeyPatch()
    patch.setenv("JAX_PLATFORMS", "cpu")
    patch.setenv("JAX_NUM_CPU_DEVICES", "1")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        patch.delenv(name)
    with tempfile.TemporaryDirectory(prefix="slurm") as place, SlurmCluster(Path(place)) as cluster:
        yield cluster
    patch.undo()


def submit(cluster: SlurmCluster, path: Path, flags: list[object], fault: str = "") -> Job:
    """A job of two nodes that will meet the fault, and has time for it in its first start."""
    nodes = THERE if fault in ("preempted", "crash", "fewer nodes") else HERE
    options = f"{OPTIONS}{nodes}"
    if fault == "fewer nodes":  # excluded are the others, as a list of nodes would want all of them
        options = f"{OPTIONS.removesuffix('--nodelist=')}--nodes=1-2 --exclude={HERE}"
    if fault == "limit":
        options += " --time=2 --signal=USR1@45"
    environment = {"FIRST_NODE": nodes.replace("[", "").partition("-")[0]}
    environment |= {"SLOW_S": "12" if fault == "limit" else "2"} if fault else {}
    environment |= {"CRASH": "1", "MOST_RESTARTS": "2"} if fault == "crash" else {}
    return cluster.submit(SCRIPT, *flags, "--output", path, options=options, **environment)


def preempt(job: Job) -> None:
    """Wait for a more urgent job to take the nodes of `job`, and to be done."""
    options = f"--partition=urgent --exclusive --nodelist={THERE} --nodes=2 --time=1"
    wrapped = "--output=/dev/null --job-name=urgent --wrap=true"
    number = job.cluster.run("sbatch", "--parsable", *options.split(), *wrapped.split())
    assert Job(job.cluster, number).ended()[0] == "COMPLETED"


def lose_node(job: Job) -> None:
    """Let Slurm find the last node down. The job goes on with the one that is left."""
    node = job.cluster.nodes[-1]
    job.cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")


FAULTS: dict[str, Callable[[Job], object]] = {
    "frozen": lambda job: os.kill(job.pid(1), signal.SIGSTOP),
    "killed": lambda job: os.kill(job.pid(1), signal.SIGKILL),
    "limit": lambda job: None,
    "requeued": lambda job: job.cluster.run("scontrol", "requeue", job.number),
    "preempted": preempt,
    "fewer nodes": lose_node,  # the last one, as the jobs before may need the node
}


def meet_faults(cluster: SlurmCluster, place: Path, flags: list[object]) -> dict[str, Job]:
    """Jobs that have ended well, each after one restart; their runs are in `place`, by fault."""
    jobs = {fault: submit(cluster, place / fault, flags, fault) for fault in FAULTS}
    crash = submit(cluster, place / "crash", flags, "crash")
    began = time.monotonic()
    for fault, job in jobs.items():
        if fault != "limit":
            job.trained(place / fault, 6)
        FAULTS[fault](job)
    assert crash.ended() == ("FAILED", "139:0", 2), crash.said
    assert "Not requeued: 2 restarts have been made." in crash.said
    for fault, job in jobs.items():
        assert job.ended() == ("COMPLETED", "0:0", 1), (fault, job.said)
        print(f"{fault}: done {time.monotonic() - began:.0f} s after the submission")
    assert "SIGUSR1 at step" in jobs["limit"].said.replace("SIGUSR1SIGUSR1", "SIGUSR1")
    assert "has sent no heartbeat" in jobs["frozen"].said
    assert "is gone, so the run ends" in jobs["killed"].said
    assert jobs["fewer nodes"].shown("NumNodes") == "1"
    return jobs


@pytest.mark.long
def test_what_ends_a_job_is_followed_by_another_start(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    cluster.install(COUNTS)
    meet_faults(cluster, tmp_path, [])
    for fault in FAULTS:
        lines = (tmp_path / fault / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [
            {"train/loss": step} for step in range(16)
        ], fault


@pytest.mark.exhaustive
def test_a_run_survives_what_ends_a_job(
    cluster: SlurmCluster, corpus: Path, tmp_path: Path
) -> None:
    cluster.install(TRAINS)
    flags: list[object] = [*FLAGS, *MORE, "--data", corpus]
    whole = submit(cluster, tmp_path / "whole", flags)
    assert whole.ended() == ("COMPLETED", "0:0", 0), whole.said
    undisturbed = Run(tmp_path / "whole", 0, whole.said)
    assert len(undisturbed.numbers) > 16
    for fault, job in meet_faults(cluster, tmp_path, flags).items():
        run = Run(tmp_path / fault, 0, job.said)
        if fault == "fewer nodes":  # one process instead of two: the same batches, other rounding
            for line, other in zip(run.numbers, undisturbed.numbers, strict=True):
                assert line == pytest.approx(other, rel=1e-5), fault
        else:
            assert run.numbers == undisturbed.numbers, fault
            assert run.weights == undisturbed.weights, fault
        assert run.events.count("resume") == 1, fault
