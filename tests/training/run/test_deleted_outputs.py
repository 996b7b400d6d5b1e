"""What somebody deletes under a run is noticed at the next write."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_directories import DERIVED, run

from consyn_jax.errors import UserError
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.checkpointing.ownership import RunRecord
from consyn_jax.training.logging.metrics import MetricsLog, read_metrics
from consyn_jax.training.logging.tracking.callbacks import RunView
from consyn_jax.training.logging.tracking.trackers import TensorBoardTracker
from consyn_jax.training.run.directory import RunDirectory
from consyn_jax.training.run.opening import open_run_directory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def opened(path: Path) -> Iterator[RunDirectory]:
    """The directory of a run that is running."""
    config, origins = run(path)
    directory = open_run_directory(config, DERIVED)
    directory.write_config(config, origins, DERIVED)
    yield directory
    directory.close()


@pytest.mark.parametrize("how", ["deleted", "moved", "emptied", "made anew by another run"])
def test_a_directory_that_is_gone_ends_the_run_and_is_not_made_again(
    how: str, opened: RunDirectory, path: Path
) -> None:
    opened.check()
    if how == "moved":
        path.rename(path.with_name("elsewhere"))
    else:
        shutil.rmtree(path)
    if how == "emptied":
        path.mkdir()
    if how == "made anew by another run":
        other = open_run_directory(run(path)[0], DERIVED)
    with pytest.raises(UserError, match=f"--output {path} was deleted or moved while the run"):
        opened.check()
    assert path.exists() == (how in ("emptied", "made anew by another run"))
    if how == "made anew by another run":
        assert opened.lock is not None
        opened.lock.release()
        assert (path / "lock").exists(), "the other run keeps its lock"
        other.close()
        opened.lock = None


def test_a_copy_in_the_place_of_the_directory_ends_the_run(
    opened: RunDirectory, path: Path
) -> None:
    opened.check()
    shutil.copytree(path, path.with_name("copy"))
    path.rename(path.with_name("moved"))
    path.with_name("copy").rename(path)
    before = sorted(path.rglob("*"))
    with pytest.raises(UserError, match="is not the directory in which the run began"):
        opened.check()
    assert sorted(path.rglob("*")) == before


def test_a_run_that_takes_its_place_during_a_check_is_named(
    opened: RunDirectory, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened.check()
    config, origins = run(path.with_name("other"))
    other = open_run_directory(config, DERIVED)
    other.write_config(config, origins, DERIVED)

    def first_the_own(record: RunRecord, file: str) -> bool:
        path.rename(path.with_name("moved"))
        path.with_name("other").rename(path)
        return True

    monkeypatch.setattr(RunRecord, "is_in", first_the_own)
    with pytest.raises(UserError, match="now has another run"):
        opened.check()
    other.close()


def test_checkpoints_that_become_a_link_end_the_run(opened: RunDirectory, path: Path) -> None:
    opened.checkpoints.mkdir(exist_ok=True)
    opened.check()
    opened.checkpoints.rename(path.with_name("outside"))
    opened.checkpoints.symlink_to(path.with_name("outside"))
    with pytest.raises(UserError, match="checkpoints has become a link, which is not followed"):
        opened.check()
    opened.close()
    assert (path / "lock").exists(), "it changes nothing more"


def test_a_deleted_configuration_is_written_again(opened: RunDirectory, path: Path) -> None:
    before = (path / "config.yaml").read_text()
    (path / "config.yaml").unlink()
    opened.check()
    assert (path / "config.yaml").read_text() == before


def test_a_deleted_lock_is_taken_again_unless_another_run_has_it(
    opened: RunDirectory, path: Path
) -> None:
    (path / "lock").unlink()
    opened.check()
    assert (path / "lock").exists()
    with pytest.raises(UserError, match="in use by another process"):
        open_run_directory(run(path)[0], DERIVED)
    (path / "lock").unlink()
    other = open_run_directory(run(path)[0], DERIVED)
    with pytest.raises(UserError, match="in use by another process"):
        opened.check()
    other.close()


@pytest.mark.parametrize("how", ["deleted", "emptied"])
def test_a_deleted_tokenizer_is_written_again(how: str, opened: RunDirectory, path: Path) -> None:
    opened.write_tokenizer(BPETokenizer.bytes())
    before = (path / "tokenizer" / "tokenizer.json").read_bytes()
    shutil.rmtree(path / "tokenizer")
    if how == "emptied":
        (path / "tokenizer").mkdir()
    opened.check()
    assert (path / "tokenizer" / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_log_that_is_deleted_or_replaced_is_written_anew_with_all_lines(
    how: str, tmp_path: Path
) -> None:
    said: list[str] = []
    with MetricsLog(tmp_path, warn=said.append) as log:
        log.write(1, 10, {"train/loss": 2.0})
        log.write(2, 20, {"train/loss": 1.0})
        log.path.unlink()
        if how == "replaced":
            log.path.write_text('{"step": 1, "tokens": 10, "time_s": 0}\n')
        log.write(3, 30, {"train/loss": 0.5})
        log.write(4, 40, {"train/loss": 0.4})
        assert [line["step"] for line in read_metrics(log.path)] == [1, 2, 3, 4]
    assert len(said) == 1
    assert said[0].endswith("was deleted or replaced. It was written again with all its lines.")


def test_a_log_writes_nothing_into_a_directory_that_is_gone(
    opened: RunDirectory, path: Path
) -> None:
    with MetricsLog(path, opened.check) as log:
        log.write(1, 10)
        shutil.rmtree(path)
        with pytest.raises(UserError, match="was deleted or moved"):
            log.write(2, 20)
    assert not path.exists()


def test_tensorboard_begins_a_new_file_after_its_own_was_deleted(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path / "logs")
    run = RunView(tmp_path)
    tracker.on_step(run, {"step": 1, "a": 1.0})
    shutil.rmtree(tmp_path / "logs")
    tracker.on_step(run, {"step": 2, "a": 1.0})
    tracker.on_end(run, "complete")
    assert len(list((tmp_path / "logs").iterdir())) == 1
