"""The scripts for clusters start the right processes, and restart runs that can continue."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from consyn_jax.resolve import resolve

SCRIPTS = Path(__file__).parents[2] / "scripts"


def submitted(
    place: Path, *arguments: object, code: int = 0, env: dict[str, str] | None = None
) -> tuple[int, list[str], str]:
    """The job script's exit code, the commands that it runs, and what it says.

    Args:
        code: what `srun` returns.
    """
    for name, does in (("srun", f"exit {code}"), ("scontrol", "exit 0")):
        stub = place / name
        stub.write_text(f"#!/bin/sh\n(printf '%s|' {name} \"$@\"; echo) >> {place}/calls\n{does}\n")
        stub.chmod(0o755)
    (place / "calls").write_text("")
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", SCRIPTS / "slurm" / "train.sbatch", *map(str, arguments)],
        env=own | {"PATH": f"{place}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"} | (env or {}),
        check=False,
        capture_output=True,
        text=True,
    )
    return done.returncode, (place / "calls").read_text().splitlines(), done.stderr


SRUN = "srun|--kill-on-bad-exit=0|--wait=90|consyn-train|{}|--distributed|"
# Stopped and saved, another process lost; aborted, bus error, killed, segmentation fault.
CONTINUES = {75, 76, 134, 135, 137, 139}


@pytest.mark.parametrize("code", sorted({0, 1, 2, 3, 4, 130, 143} | CONTINUES))
def test_slurm_requeues_runs_that_can_continue(code: int, tmp_path: Path) -> None:
    ended, calls, said = submitted(tmp_path, "--config", "a b.yaml", code=code)
    requeued = ["scontrol|requeue|17|"] if code in CONTINUES else []
    assert (ended, calls) == (code, [SRUN.format("--config|a b.yaml"), *requeued])
    assert said == ""


def test_a_run_that_fails_again_and_again_is_not_requeued_for_ever(tmp_path: Path) -> None:
    for limit in ({}, {"MOST_RESTARTS": "2"}):
        most = int(limit.get("MOST_RESTARTS", "20"))
        for restarts, requeued in ((most - 1, True), (most, False), (most + 1, False)):
            ended, calls, said = submitted(
                tmp_path, "--quiet", code=139, env={"SLURM_RESTART_COUNT": str(restarts), **limit}
            )
            assert (ended, len(calls)) == (139, 1 + requeued)
            words = f"Not requeued: {most} restarts have been made.\n"
            assert said == ("" if requeued else words)


def test_a_run_that_is_stopped_and_saved_goes_on_however_often(tmp_path: Path) -> None:
    _, calls, said = submitted(tmp_path, code=75, env={"SLURM_RESTART_COUNT": "99"})
    assert (len(calls), said) == (2, "")


ARRAY = {"SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "2"}


def test_numbers_of_job_and_task_in_arguments(tmp_path: Path) -> None:
    given = ["--output", "/runs/a b-%A/%a", "--run_name", "%j %%"]
    _, calls, _ = submitted(tmp_path, *given, env=ARRAY)
    assert calls == [SRUN.format("--output|/runs/a b-15/2|--run_name|17 %")]
    for environment in (ARRAY, {}):
        _, calls, said = submitted(tmp_path, "--name", "%%a %%%%j 5%", env=environment)
        assert (calls, said) == ([SRUN.format("--name|%a %%j 5%")], "")
    ended, calls, said = submitted(tmp_path, "--output", "/runs/%a")
    assert (ended, calls) == (2, [])
    assert "%a in the arguments need an array of jobs" in said
    _, calls, _ = submitted(tmp_path, "--output", "/runs/%j")
    assert calls == [SRUN.format("--output|/runs/17")]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MOST_RESTARTS": "abc"}, "MOST_RESTARTS=abc is no whole number. Give one"),
        ({"MOST_RESTARTS": "-1"}, "MOST_RESTARTS=-1 is no whole number."),
        ({"SLURM_JOB_ID": ""}, "This script runs in a job of Slurm: sbatch "),
    ],
)
def test_a_mistake_is_a_sentence(environment: dict[str, str], words: str, tmp_path: Path) -> None:
    ended, calls, said = submitted(tmp_path, env=environment, code=139)
    assert (ended, calls) == (2, [])
    assert said.startswith(words)
    assert said.count("\n") == 1


def test_each_task_of_a_sweep_has_its_own_flags(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("--lr 1e-3\n--lr 3e-3  --beta2 0.99\n")
    _, calls, _ = submitted(tmp_path, "--output", "%a", env={"SWEEP": str(sweep), **ARRAY})
    assert calls == [SRUN.format("--output|2|--lr|3e-3|--beta2|0.99")]
    beyond = ARRAY | {"SLURM_ARRAY_TASK_ID": "3"}
    for environment, words in (
        (beyond, f"SWEEP={sweep} has no line 3"),
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "0"}, f"SWEEP={sweep} has no line 0"),
        ({}, "SWEEP needs an array of jobs"),
        (ARRAY | {"SWEEP": f"{tmp_path}/none"}, f"SWEEP={tmp_path}/none cannot be read."),
    ):
        ended, calls, said = submitted(tmp_path, env={"SWEEP": str(sweep), **environment})
        assert (ended, calls) == (2, [])
        assert said.startswith(words)
        assert said.count("\n") == 1
    sweep.write_bytes(b"# rates\r\n\r\n--lr 1e-3\r\n  # a larger one\r\n--lr 3e-3\r\n")
    _, calls, _ = submitted(tmp_path, env={"SWEEP": str(sweep), **ARRAY})
    assert calls == [SRUN.format("--lr|3e-3")]
    sweep.write_text("--output /runs/%a\n" * 2)
    _, calls, _ = submitted(tmp_path, env={"SWEEP": str(sweep), **ARRAY})
    assert calls == [SRUN.format("--output|/runs/2")]


def job(name: str) -> tuple[dict[str, Any], str]:
    """The Job in a file, and the name of its first pod."""
    parts = list(
        yaml.safe_load_all((SCRIPTS / "kubernetes" / name.removesuffix(".yaml") / name).read_text())
    )
    if parts[-1]["kind"] == "Job":
        service, found = parts
        spec = found["spec"]
        assert service["metadata"]["name"] == spec["template"]["spec"]["subdomain"]
        assert service["spec"]["selector"] == {"job-name": found["metadata"]["name"]}
        return spec, f"{found['metadata']['name']}-0.{service['metadata']['name']}"
    own = parts[0]["metadata"]["name"]
    [replicated] = parts[0]["spec"]["replicatedJobs"]
    return replicated["template"]["spec"], f"{own}-{replicated['name']}-0-0.{own}"


@pytest.mark.parametrize("name", ["job.yaml", "jobset.yaml"])
def test_kubernetes_starts_one_run(name: str) -> None:
    spec, first = job(name)
    pod = spec["template"]["spec"]
    [waiting], [container] = pod["initContainers"], pod["containers"]
    hosts = spec["completions"]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == hosts
    environments = [
        {each["name"]: each.get("value") for each in one["env"]} for one in (waiting, container)
    ]
    assert [each["PROCESSES"] for each in environments] == [str(hosts)] * 2
    argv = [
        text.replace("$(PROCESSES)", str(hosts)).replace("$(PROCESS_ID)", "1")
        for text in container["args"]
    ]
    given = dict(text.removeprefix("--").partition("=")[::2] for text in argv)
    assert given.pop("config").startswith("/shared/")
    assert given.pop("distributed") == ""
    run, _ = resolve(
        {
            **given,
            "distributed": True,
            "num_processes": int(given["num_processes"]),
            "process_id": int(given["process_id"]),
        }
    )
    assert run.hardware.coordinator_address == f"{first}:29400"
    assert (run.hardware.num_processes, run.hardware.process_id) == (hosts, 1)
    assert first.replace("-0.", "-$i.") in waiting["args"][0]
    codes = {"containerName": container["name"], "operator": "In", "values": [2, 3]}
    assert spec["podFailurePolicy"]["rules"][0] == {"action": "FailJob", "onExitCodes": codes}
    assert pod["restartPolicy"] == "Never", "pod failure policies need it"
