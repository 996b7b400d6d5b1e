"""The files for Kubernetes fit the cluster's schemas, and the image has what it needs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import cannot_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FILES = ROOT / "scripts" / "kubernetes"
VERSIONS = [f"1.{minor}" for minor in range(29, 38)]
COMPONENTS = ["", *sorted(path.name for path in (FILES / "with").iterdir())]


def built(place: Path, base: str, components: list[str]) -> list[dict[str, Any]]:
    """The objects that `kubectl kustomize` makes of a base and components."""
    if shutil.which("kubectl") is None:
        cannot_run("kubectl is not installed")
    shutil.copytree(FILES, place / "kubernetes")
    (place / "own").mkdir()
    chosen = {
        "resources": [f"../kubernetes/{base}"],
        "components": [f"../kubernetes/with/{name}" for name in components],
    }
    (place / "own" / "kustomization.yaml").write_text(yaml.safe_dump(chosen))
    text = subprocess.check_output(["kubectl", "kustomize", place / "own"], text=True)
    return list(yaml.safe_load_all(text))


def missing_keys(given: Any, kept: Any, place: str = "") -> list[str]:
    """Where a value that went through a schema is not what it was."""
    if isinstance(given, dict) and isinstance(kept, dict):
        pairs = [(f"{place}.{key}", value, kept.get(key)) for key, value in given.items()]
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        both = enumerate(zip(given, kept, strict=True))
        pairs = [(f"{place}[{index}]", *pair) for index, pair in both]
    else:
        return [] if given == kept else [place]
    return [name for where, one, other in pairs for name in missing_keys(one, other, where)]


def validate(found: dict[str, Any]) -> None:
    """Compare an object with the schemas of all versions, unknown fields included."""
    validator = pytest.importorskip("kubernetes_validate", reason="needs the extra dev")
    for version in VERSIONS:
        validator.validate(found, version, strict=True)


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_job_fits_the_schemas(component: str, tmp_path: Path) -> None:
    service, job = sorted(
        built(tmp_path, "job", [component] if component else []),
        key=lambda each: str(each["kind"]),
        reverse=True,
    )
    validate(service)
    validate(job)


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_jobset_fits_the_schemas(component: str, tmp_path: Path) -> None:
    """By JobSet's own Python models, and its Job by the schemas of Kubernetes."""
    models = pytest.importorskip(
        "kubeflow_trainer_api.models.jobset_v1alpha2_job_set", reason="needs the extra dev"
    )
    [jobset] = built(tmp_path, "jobset", [component] if component else [])
    kept = models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict()
    assert missing_keys(jobset, kept) == []
    for job in jobset["spec"]["replicatedJobs"]:
        header = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}}
        validate(header | {"spec": job["template"]["spec"]})


def test_the_schemas_refuse_an_unknown_field(tmp_path: Path) -> None:
    models = pytest.importorskip(
        "kubeflow_trainer_api.models.jobset_v1alpha2_job_set", reason="needs the extra dev"
    )
    [jobset] = built(tmp_path, "jobset", [])
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["gpus"] = 8
    kept = models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict()
    assert [place.rpartition(".")[2] for place in missing_keys(jobset, kept)] == ["gpus"]


def test_the_steps_of_the_image(tmp_path: Path) -> None:
    """What the Dockerfile installs, from what .dockerignore lets into the build, runs.

    No image is built, as its base image would have to be downloaded from a hub. The packages of the
    extra cuda13 are installed in another stage of CI.
    """
    context, place = tmp_path / "src", tmp_path / "installed"
    context.mkdir()
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    for name in (rule[1:] for rule in rules if rule.startswith("!")):
        source = ROOT / name
        if source.is_dir():
            leave = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, context / name, ignore=leave)
        else:
            shutil.copy(source, context / name)
    steps = (FILES / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    [install] = [step for step in steps if step.startswith("RUN pip install")]
    command, _, cleaning = install.removeprefix("RUN ").partition(" && ")
    assert cleaning == "rm -r /src"
    defaults = dict(step.removeprefix("ARG ").split("=") for step in steps if step[:4] == "ARG ")
    for name, value in defaults.items():
        command = command.replace(f"${name}", value)
    words = command.replace('"', "").split()
    assert words == [
        "pip",
        "install",
        "--no-cache-dir",
        "/src[cuda13,buckets]",
        "-c",
        "/src/constraints.txt",
    ]
    assert (context / "constraints.txt").exists()
    options = ["--no-deps", "--quiet", "--target", str(place)]
    subprocess.check_call([sys.executable, "-m", "pip", "install", *options, str(context)])
    shutil.rmtree(context)
    own = {"PYTHONPATH": str(place), "CONSYN_CACHE": str(tmp_path / "cache")}
    flags = ["--model", "haiku", "--dry_run", "--output", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "consyn_jax.cli.train", *flags],
        env=os.environ | own,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [entry] = [step for step in steps if step.startswith("ENTRYPOINT")]
    assert (place / "bin" / entry.split('"')[1]).exists()
    assert any(step.startswith("USER ") and step != "USER root" for step in steps)
