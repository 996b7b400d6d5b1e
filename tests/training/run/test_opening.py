import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from run_directories import DERIVED, begin, holds_run, run

from consyn_jax.distributed.process_group import CONTINUE_ADVICE, ProcessGroup
from consyn_jax.errors import UserError, advised, leave_out_overwrite
from consyn_jax.training.run import opening
from consyn_jax.training.run.lock import read_holder
from consyn_jax.training.run.opening import open_run_directory


def test_a_new_directory_is_made_and_then_holds_the_run(tmp_path: Path) -> None:
    config, _ = run(tmp_path / "a" / "b")
    assert not holds_run(config)
    assert (tmp_path / "a" / "b").is_dir()
    begin(tmp_path / "a" / "b")
    assert holds_run(config)


def test_names_beside_the_checkpoints_that_are_not_steps_are_ignored(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "checkpoints" / "²").mkdir()
    assert holds_run(run(tmp_path)[0])


@pytest.mark.parametrize("name", ["020", "1" + 30 * "0", 250 * "9", "\u0662"])
def test_a_number_that_no_checkpoint_has_for_a_name_is_refused(name: str, tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "checkpoints" / name).mkdir()
    with pytest.raises(UserError, match=rf"{name} is not a valid name for a checkpoint"):
        holds_run(run(tmp_path)[0])


def test_two_processes_do_not_write_to_one_directory(tmp_path: Path) -> None:
    config, _ = run(tmp_path)
    first = open_run_directory(config, DERIVED)
    with pytest.raises(UserError, match="is in use by another process"):
        open_run_directory(config, DERIVED)
    first.close()
    assert not holds_run(config)


def test_overwriting_does_not_delete_inputs_of_the_run(tmp_path: Path) -> None:
    begin(tmp_path)
    for flags in (
        {"data": [str(tmp_path / "final" / "config.json")]},
        {"tokenizer": str(tmp_path / "tokenizer")},
        {"checkpoint": str(tmp_path / "best")},
    ):
        with pytest.raises(UserError, match=rf"--overwrite would delete --{next(iter(flags))} "):
            holds_run(run(tmp_path, overwrite=True, **flags)[0])
    assert (tmp_path / "checkpoints" / "3").is_dir()


@pytest.mark.parametrize("overwrite", [False, True])
def test_once_the_old_run_is_deleted_no_process_advises_to_overwrite(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, the same command without --overwrite would continue the old run."""
    begin(tmp_path)
    config, _ = run(tmp_path, overwrite=overwrite)
    advice: list[str] = []
    first = open_run_directory(
        config, DERIVED, fetch=lambda path: advice.append(advised(CONTINUE_ADVICE))
    )
    advice.append(advised(CONTINUE_ADVICE))

    message = json.dumps([first.holds_run, read_holder(tmp_path), asdict(first.record)])

    def gather(own: str) -> list[str]:
        advice.append(advised(CONTINUE_ADVICE))
        return [message, own]

    leave_out_overwrite(False)  # for another process
    other = Mock(spec=ProcessGroup, gather=gather)
    monkeypatch.setattr(opening, "current_process_group", lambda: other)
    open_run_directory(config, DERIVED, write=False).close()
    advice.append(advised(CONTINUE_ADVICE))
    first.close()
    without = CONTINUE_ADVICE.replace("command", "command without --overwrite")
    assert advice == [CONTINUE_ADVICE, without if overwrite else CONTINUE_ADVICE] * 2


def test_a_directory_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match=r"is a file\. Name a directory\."):
        open_run_directory(run(file)[0], DERIVED)
    with pytest.raises(UserError, match=r"cannot be made: .*file is a file"):
        open_run_directory(run(file / "below")[0], DERIVED)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(
        UserError, match=r"metrics\.jsonl without a config\.yaml, so it is not a consyn-train run"
    ):
        open_run_directory(run(foreign)[0], DERIVED)
    (foreign / "metrics.jsonl").unlink()
    (foreign / "checkpoints" / "500").mkdir(parents=True)
    for overwrite in (False, True):
        with pytest.raises(
            UserError,
            match=r"foreign holds checkpoints without a config\.yaml, so it is not a consyn",
        ):
            open_run_directory(run(foreign, overwrite=overwrite)[0], DERIVED)


def test_only_the_study_uses_the_directory_of_a_trial(tmp_path: Path) -> None:
    (tmp_path / "trial.json").touch()
    with pytest.raises(UserError, match="has a trial of a study, which only consyn-tune continues"):
        open_run_directory(run(tmp_path)[0], DERIVED)
    assert [file.name for file in tmp_path.iterdir()] == ["trial.json"]
    open_run_directory(run(tmp_path)[0], DERIVED, is_trial=True).close()


def test_resume_by_step_needs_that_checkpoint_and_never_needs_no_run(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run"):
        open_run_directory(run(tmp_path / "run", resume="never")[0], DERIVED)
    assert not holds_run(run(tmp_path / "new", resume="never")[0])
    with pytest.raises(
        UserError, match=r"--resume 5: .* has no checkpoint of that step. Saved steps: 3\."
    ):
        open_run_directory(run(tmp_path / "run", resume="5")[0], DERIVED)
    assert holds_run(run(tmp_path / "run", resume="3")[0])


def test_only_directories_named_by_a_step_are_checkpoints(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "3²").mkdir()
    (checkpoints / "²").mkdir()
    (checkpoints / "5").write_text("")
    with pytest.raises(UserError, match=r"Saved steps: 3\."):
        open_run_directory(run(tmp_path / "run", resume="5")[0], DERIVED)
    shutil.rmtree(checkpoints)
    checkpoints.write_text("")
    with pytest.raises(
        UserError, match=r"checkpoints cannot be read: Not a directory\. Name another --output\."
    ):
        open_run_directory(run(tmp_path / "run")[0], DERIVED)


def test_a_run_without_a_checkpoint_may_be_replaced_by_another(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "checkpoints" / "3").rmdir()
    assert not holds_run(run(tmp_path, lr=0.1)[0])


def test_other_processes_change_nothing(tmp_path: Path) -> None:
    config, _ = run(tmp_path / "run")
    assert not holds_run(config, write=False)
    assert not (tmp_path / "run").exists()
    begin(tmp_path / "run")
    holds_run(replace(config, saving=replace(config.saving, overwrite=True)), write=False)
    assert (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("write", [True, False])
def test_a_run_on_other_data_is_refused_before_anything_is_fetched(
    write: bool, tmp_path: Path
) -> None:
    begin(tmp_path)
    fetched: list[Path] = []
    with pytest.raises(UserError, match="holds another run: the training data changed"):
        open_run_directory(
            run(tmp_path)[0], DERIVED | {"data": "xyz"}, write=write, fetch=fetched.append
        )
    assert fetched == []
