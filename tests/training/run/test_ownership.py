"""A run is told from any other run, and a start of it from any other start."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_directories import DERIVED, begin, run

from consyn_jax.errors import UserError
from consyn_jax.training.checkpointing.ownership import (
    RUN_JSON,
    RunRecord,
    check_log,
    check_owner,
    check_step,
    record_in,
    short,
)
from consyn_jax.training.logging.metrics import MetricsLog
from consyn_jax.training.run.directory import RunDirectory
from consyn_jax.training.run.live_report import read_samples
from consyn_jax.training.run.lock import LOCK, read_holder
from consyn_jax.training.run.opening import open_run_directory


def opened(path: Path, **flags: Any) -> RunDirectory:
    """A run that runs."""
    config, origins = run(path, **flags)
    directory = open_run_directory(config, DERIVED)
    directory.write_config(config, origins, DERIVED)
    return directory


def test_an_identity_is_random_lasts_for_all_starts_and_is_in_the_lock(tmp_path: Path) -> None:
    first = opened(tmp_path / "a")
    assert json.loads((tmp_path / "a" / LOCK).read_text())["run"] == first.record.run
    first.close()
    (first.checkpoints / "3").mkdir(parents=True)
    again, other = opened(tmp_path / "a"), opened(tmp_path / "b")
    assert again.record.run == first.record.run != other.record.run
    assert again.record.start != first.record.start
    assert RunRecord.read(tmp_path / "a") == again.record
    assert not again.is_adopted
    again.close()
    other.close()
    anew = opened(tmp_path / "a", overwrite=True)
    assert anew.record.run != first.record.run
    anew.close()


def test_a_run_of_a_version_without_identities_gets_one(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / RUN_JSON).unlink()
    directory = opened(tmp_path)
    assert directory.is_adopted
    assert directory.record.unsigned_until == 3
    assert directory.record.owns(None, 3)
    assert not directory.record.owns(None, 4), "later ones carry it"
    assert not directory.record.owns("another", 3)
    directory.close()
    assert not opened(tmp_path).is_adopted


def test_without_run_json_the_identity_of_the_newest_checkpoint_counts(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / RUN_JSON).unlink()
    (tmp_path / "checkpoints" / "3" / "run.json").write_text('{"step": 3, "run": "abc"}')
    directory = opened(tmp_path)
    assert directory.record.run == "abc"
    assert not directory.record.owns(None, 0)
    directory.close()


@pytest.mark.parametrize(
    "content", ["", "\0" * 100, "[]", "{}", '{"run": 1, "start": ""}', '{"x": 1}', "[" * 100_000]
)
def test_a_damaged_run_json_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / RUN_JSON).write_text(content)
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        RunRecord.read(tmp_path)


def test_a_checkpoint_of_another_run_is_named(tmp_path: Path) -> None:
    own, place = RunRecord.new(), tmp_path / "checkpoints" / "7"
    check_owner(place, own.run, 7, own)
    for theirs in (RunRecord.new().run, None, 5):
        with pytest.raises(UserError, match=r"checkpoints/7 is a checkpoint of another run"):
            check_owner(place, theirs, 7, own)
    place.mkdir(parents=True)
    assert record_in(place / "run.json") == {}
    (place / "run.json").write_text(json.dumps({"run": own.run}))
    assert record_in(place / "run.json") == {"run": own.run}


def test_a_checkpoint_with_the_name_of_another_step_is_named(tmp_path: Path) -> None:
    check_step(tmp_path / "7", {"step": 7})
    for recorded in (8, "07", None, 10**400):
        with pytest.raises(UserError, match=r"the name of step 7, but contains the state of step "):
            check_step(tmp_path / "7", {"step": recorded})


def test_a_log_of_another_run_is_named(tmp_path: Path) -> None:
    own = RunRecord.new()
    start: dict[str, Any] = {"step": 0, "event": "start"}
    check_log(tmp_path, [start | {"run": own.run}, {"step": 1, "train/loss": 1.0}], own)
    for line in (start, start | {"run": "abc"}, start | {"event": "resume", "run": "abc"}):
        with pytest.raises(UserError, match="is the log of another run"):
            check_log(tmp_path, [line], own)
    check_log(tmp_path, [start], RunRecord.new(unsigned_until=10))


# ---------------------------------------------------------------------------- while a run is running


@pytest.mark.parametrize("noticed_by", ["the heartbeat", "a write"])
@pytest.mark.parametrize("is_there", [True, False], ids=["running", "ended"])
@pytest.mark.parametrize("how", ["directory replaced", "directory moved", "lock removed"])
def test_a_run_whose_directory_another_start_has_taken_writes_nothing_more(
    how: str, is_there: bool, noticed_by: str, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    first = opened(path)
    (first.checkpoints / "3").mkdir(parents=True)
    log = MetricsLog(path, first.check_for_line)
    log.write(1, 10)
    if how == "directory replaced":
        shutil.rmtree(path)
    elif how == "directory moved":
        path.rename(tmp_path / "elsewhere")
    else:
        (path / LOCK).unlink()
    second = opened(path)
    if how == "lock removed":
        assert second.record.run == first.record.run, "the same run, started once more"
    if not is_there:
        second.close()
    before = content(path)
    if noticed_by == "the heartbeat":
        first.beat()
    else:
        with pytest.raises(UserError):
            log.write(2, 20)
    with pytest.raises(UserError) as caught:
        first.raise_if_lost()
    theirs, own = short(second.record.run), short(first.record.run)
    assert str(path) in str(caught.value)
    assert (
        "which has started the run again"
        if theirs == own
        else f"(with identity {theirs}; this run has identity {own})"
    ) in str(caught.value)
    with pytest.raises(UserError):
        first.check()
    log.close()
    first.close()
    assert content(path) == before
    second.close()


def content(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


def test_without_another_start_a_removed_lock_or_run_json_is_made_again(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    for name in (LOCK, RUN_JSON):
        (tmp_path / name).unlink()
        directory.beat()
        directory.check()
        assert (tmp_path / name).exists()
    directory.close()


def test_a_heartbeat_goes_on_when_a_disk_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next write reports it."""
    directory = opened(tmp_path)

    def check(self: RunDirectory) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "check", check)
        directory.beat()
    directory.check()
    directory.close()


@pytest.mark.parametrize("how", ["overwritten", "cut", "appended to"])
def test_a_log_that_somebody_changes_in_place_is_not_continued(how: str, tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(1, 10, {"train/loss": 1.0})
        log.write(2, 20, {"train/loss": 1.0})
        whole = log.path.read_bytes()
        changed = {"overwritten": b"{}\n", "cut": whole[:-9], "appended to": whole + b"{}\n"}[how]
        with log.path.open("r+b") as file:  # as `cp` does
            file.truncate()
            file.write(changed)
            file.truncate()
        with pytest.raises(UserError, match="was changed by another program"):
            log.write(3, 30)
        assert log.path.read_bytes() == changed


# ------------------------------------------------------------------------------ a stranger's directory


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "lock",
        "best",
        "checkpoints",
        "checkpoints/3/state",
        "tokenizer/tokenizer.json",
    ],
)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes_in_a_run_directory_are_refused_by_name(
    kind: str, name: str, tmp_path: Path
) -> None:
    outside, path = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    begin(path)
    target = path / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(target)
    else:
        target.symlink_to(outside)
    what = "a pipe" if kind == "pipe" else "a link"
    with pytest.raises(
        UserError, match=f"{name} is {what}, but a run writes only to regular files"
    ):
        open_run_directory(run(path)[0], DERIVED)
    assert not list(outside.iterdir())


def test_overwrite_removes_links_and_what_they_point_at_stays(tmp_path: Path) -> None:
    outside, path = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    (outside / "kept").write_text("theirs")
    begin(path)
    (path / "metrics.jsonl").symlink_to(outside / "kept")
    (path / "best").symlink_to(outside)
    open_run_directory(run(path, overwrite=True)[0], DERIVED).close()
    assert (outside / "kept").read_text() == "theirs"
    assert not (path / "best").is_symlink()


READERS: dict[str, Callable[[Path], object]] = {
    RUN_JSON: lambda file: RunRecord.read(file.parent),
    "record.json": record_in,
    LOCK: lambda file: read_holder(file.parent),
    "samples.jsonl": read_samples,
}


@pytest.mark.parametrize("name", READERS)
def test_no_reader_follows_a_link(name: str, tmp_path: Path) -> None:
    outside, place = tmp_path / "outside", tmp_path / "run"
    place.mkdir()
    record = {"run": "abc", "start": "x", "unsigned_until": -1}
    outside.write_text(json.dumps(record) + "\n")
    (place / name).symlink_to(outside)
    nothing: dict[str, object] = {"record.json": {}, LOCK: ""}
    if name == RUN_JSON:
        with pytest.raises(UserError, match=r"run\.json cannot be read: "):
            READERS[name](place / name)
    elif name == "samples.jsonl":
        lines, fault = read_samples(place / name)
        assert (lines, fault[:15]) == ([], "cannot be read ")
    else:
        assert READERS[name](place / name) == nothing[name]


def test_a_record_that_is_no_object_is_empty(tmp_path: Path) -> None:
    (tmp_path / RUN_JSON).write_text("[1]")
    assert record_in(tmp_path / RUN_JSON) == {}
