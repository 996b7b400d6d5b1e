"""A run is complete when all of its end is there; what is not its own is refused by name."""

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from consyn_jax.training.checkpointing.ownership import RunRecord
from consyn_jax.training.run.model_manifest import disagreement

from .conftest import TINY, Run

pytestmark = pytest.mark.slow

Here = Callable[..., Run]
FLAGS = [*TINY, "--validation_fraction", "0.2", "--load_best_model_at_end", "--quiet"]


@pytest.fixture(scope="module")
def whole(corpus: Path, process: Here, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A complete run, which nobody changes."""
    run = process(tmp_path_factory.mktemp("whole") / "run", *FLAGS, "--data", corpus)
    assert run.code == 0, run.said
    return run


@pytest.fixture
def run(whole: Run, tmp_path: Path) -> Run:
    """A copy of it."""
    shutil.copytree(whole.path, tmp_path / "run")
    return Run(tmp_path / "run", 0, "")


def test_a_complete_run_has_one_identity_everywhere(run: Run, corpus: Path, here: Here) -> None:
    record = RunRecord.read(run.path)
    assert record is not None
    assert [line["run"] for line in run.lines if line.get("event") == "start"] == [record.run]
    for checkpoint in (run.path / "checkpoints").iterdir():
        assert json.loads((checkpoint / "run.json").read_text())["run"] == record.run
    assert disagreement(run.path / "best") is None
    assert disagreement(run.path / "final") is None
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    again = here(run.path, *FLAGS, "--data", corpus)
    assert again.code == 0
    assert "This run is complete" in again.said
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_no_file_of_a_run_is_writable_by_all(run: Run) -> None:
    for path in run.path.rglob("*"):
        assert not path.stat().st_mode & stat.S_IWOTH, path


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("weights are NUL", "model.safetensors is not what was written"),
        ("weights are empty", "model.safetensors has 0 bytes"),
        ("no manifest", "consyn_manifest.json is missing"),
        ("no finish", "has no finish event"),
        ("no log", "has no finish event"),
        ("empty log", "has no finish event"),
    ],
)
def test_an_end_that_is_not_whole_is_done_again(
    harm: str, said: str, run: Run, whole: Run, corpus: Path, here: Here
) -> None:
    weights, log = run.path / "final" / "model.safetensors", run.path / "metrics.jsonl"
    if harm == "weights are NUL":
        weights.write_bytes(bytes(weights.stat().st_size))
    elif harm == "weights are empty":
        weights.write_bytes(b"")
    elif harm == "no manifest":
        (run.path / "final" / "consyn_manifest.json").unlink()
    elif harm == "no log":
        log.unlink()
    else:
        lines = log.read_text().splitlines(keepends=True)
        assert '"finish"' in lines[-1], "the last line of all"
        log.write_text("" if harm == "empty log" else "".join(lines[:-1]))
    for name in ("report.html", "loss.png"):
        (run.path / name).unlink()
    again = here(run.path, *FLAGS, "--data", corpus)
    assert again.code == 0, again.said
    assert said in again.said
    assert ". The work after the last step is repeated" in again.said
    assert again.weights == whole.weights
    assert disagreement(run.path / "final") is None
    assert again.events[-1] == "finish"
    assert (run.path / "report.html").exists()
    assert (run.path / "loss.png").exists()
    if harm in ("no log", "empty log"):
        assert "ends at step 0, but the checkpoint is of step 6" in again.said
    assert "This run is complete" in here(run.path, *FLAGS, "--data", corpus).said


def test_a_log_that_ends_before_the_checkpoint_is_said_with_both_steps(
    run: Run, corpus: Path, here: Here
) -> None:
    log = run.path / "metrics.jsonl"
    kept = [line for line in log.read_text().splitlines(True) if json.loads(line)["step"] <= 2]
    log.write_text("".join(kept) + '{"step": 3, "tok')
    again = here(run.path, *FLAGS, "--data", corpus)
    assert again.code == 0, again.said
    assert "ends at step 2, but the checkpoint is of step 6" in again.said
    (resumed,) = (line for line in again.lines if line.get("event") == "resume")
    assert resumed["log_ended_at"] == 2


def test_a_best_model_that_is_damaged_is_not_exported(run: Run, corpus: Path, here: Here) -> None:
    weights = run.path / "best" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    shutil.rmtree(run.path / "final")
    refused = here(run.path, *FLAGS, "--data", corpus)
    assert refused.code == 2
    assert "best/model.safetensors is not what was written" in refused.said
    assert not (run.path / "final").exists()
    weights.write_bytes(data)
    assert here(run.path, *FLAGS, "--data", corpus).code == 0


@pytest.fixture(scope="module")
def other(whole: Run, corpus: Path, process: Here, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Another run, of another rate and seed."""
    path = tmp_path_factory.mktemp("other") / "run"
    run = process(path, *FLAGS, "--data", corpus, "--lr", "0.01", "--seed", "7")
    assert run.code == 0, run.said
    return run


def test_a_checkpoint_of_another_run_is_refused_by_name(
    run: Run, other: Run, corpus: Path, here: Here
) -> None:
    shutil.rmtree(run.path / "checkpoints" / "6")
    shutil.copytree(other.path / "checkpoints" / "6", run.path / "checkpoints" / "6")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    refused = here(run.path, *FLAGS, "--data", corpus)
    assert refused.code == 2
    assert "checkpoints/6 is a checkpoint of another run" in refused.said
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    earlier = here(run.path, *FLAGS, "--data", corpus, "--resume", "4")
    assert earlier.code == 0, earlier.said


def test_a_log_of_another_run_is_refused_by_name(
    run: Run, other: Run, corpus: Path, here: Here
) -> None:
    shutil.copy(other.path / "metrics.jsonl", run.path / "metrics.jsonl")
    shutil.rmtree(run.path / "final")
    refused = here(run.path, *FLAGS, "--data", corpus)
    assert refused.code == 2
    assert "metrics.jsonl is the log of another run" in refused.said
    assert (run.path / "metrics.jsonl").read_bytes() == (other.path / "metrics.jsonl").read_bytes()


def test_a_run_of_a_version_without_identities_and_manifests_goes_on(
    run: Run, whole: Run, corpus: Path, here: Here
) -> None:
    from consyn_jax.training.checkpointing.checkpoint_files import CHECKSUMS, file_hash

    (run.path / "run.json").unlink()
    for name in ("best", "final"):
        (run.path / name / "consyn_manifest.json").unlink()
    log = run.path / "metrics.jsonl"
    log.write_text(log.read_text().replace('"event": "start", "run"', '"event": "start", "x"'))
    for place in (run.path / "checkpoints").iterdir():
        record = json.loads((place / "run.json").read_text())
        del record["run"]
        before = file_hash(place / "run.json")
        (place / "run.json").write_text(json.dumps(record))
        sums = (place / CHECKSUMS).read_text()
        (place / CHECKSUMS).write_text(sums.replace(before, file_hash(place / "run.json")))
    flags = [flag for flag in FLAGS if flag != "--quiet"]
    again = here(run.path, *flags, "--data", corpus)
    assert again.code == 0, again.said
    assert (
        "was started by an older version, which gave runs no id, so it gets an id now" in again.said
    )
    assert "was exported by an older version, without a manifest" in again.said
    assert again.weights == whole.weights
    assert "This run is complete" in here(run.path, *FLAGS, "--data", corpus).said
