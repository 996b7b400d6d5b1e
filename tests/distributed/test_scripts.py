"""What lies in scripts/ for clusters: that it starts what there is to start, and starts again what is worth it."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from consyn_jax.resolve import resolve

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (3, False), (75, True), (76, True)])
def test_slurm_gets_the_job_back_where_that_helps(code: int, requeued: bool, tmp_path: Path) -> None:
    for name, does in (("srun", f"exit {code}"), ("scontrol", "exit 0")):
        stub = tmp_path / name
        stub.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/told\n{does}\n')
        stub.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    done = subprocess.run(["bash", SCRIPTS / "slurm" / "train.sbatch", "--config", "a b.yaml"], env=env, check=False)
    assert done.returncode == code
    told = (tmp_path / "told").read_text().splitlines()
    assert told == ["srun --kill-on-bad-exit=0 consyn-train --config a b.yaml --distributed", "scontrol requeue 17"][: 1 + requeued]


def job(name: str) -> tuple[dict[str, Any], str]:
    """The Job in one of the files, and the name of its first pod."""
    parts = list(yaml.safe_load_all((SCRIPTS / "kubernetes" / name).read_text()))
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
    environments = [{each["name"]: each.get("value") for each in one["env"]} for one in (waiting, container)]
    assert [each["PROCESSES"] for each in environments] == [str(hosts)] * 2
    argv = [text.replace("$(PROCESSES)", str(hosts)).replace("$(PROCESS_ID)", "1") for text in container["args"]]
    given = dict(text.removeprefix("--").partition("=")[::2] for text in argv)
    assert given.pop("config").startswith("/shared/")
    assert given.pop("distributed") == ""
    run, _ = resolve({**given, "distributed": True, "num_processes": int(given["num_processes"]), "process_id": int(given["process_id"])})
    assert run.hardware.coordinator_address == f"{first}:29400"
    assert (run.hardware.num_processes, run.hardware.process_id) == (hosts, 1)
    assert first.replace("-0.", "-$i.") in waiting["args"][0]
    codes = {"containerName": container["name"], "operator": "In", "values": [2, 3]}
    assert spec["podFailurePolicy"]["rules"][0] == {"action": "FailJob", "onExitCodes": codes}
    assert pod["restartPolicy"] == "Never", "pod failure policies want it"
