import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from run_directories import DERIVED, begin, holds_run, run

from consyn_jax.distributed.process_group import CONTINUE_ADVICE, ProcessGroup
from consyn_jax.errors import UserError, advised, leave_out_overwrite
from consyn_jax.resolve import resolve
from consyn_jax.training.checkpointing.ownership import RunRecord
from consyn_jax.training.run import opening
from consyn_jax.training.run.lock import read_holder
from consyn_jax.training.run.opening import check_output, open_run_directory


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
    with pytest.raises(UserError, match="has a trial of a study"):
        check_output(run(tmp_path)[0])
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


@pytest.mark.parametrize("model", ["best", "final"])
def test_a_run_with_a_model_is_continued_without_a_checkpoint(model: str, tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "checkpoints" / "3").rmdir()
    (tmp_path / model).mkdir()
    assert holds_run(run(tmp_path)[0])
    with pytest.raises(UserError, match=r"--beta1 was 0\.9 and is 0\.8"):
        holds_run(run(tmp_path, beta1=0.8)[0])


@pytest.mark.parametrize(("resume", "step"), [("auto", 9), ("3", None), ("6", 6)])
def test_a_budget_must_be_beyond_the_step_that_is_resumed(
    resume: str, step: int | None, tmp_path: Path
) -> None:
    begin(tmp_path)
    for name in ("6", "9"):
        (tmp_path / "checkpoints" / name).mkdir()
    config = run(tmp_path, resume=resume, overwrite_schedule=True)[0]
    if step is None:
        assert holds_run(config, DERIVED | {"total_steps": 5})
        return
    with pytest.raises(UserError, match=f"is already at step {step}, past the 5 steps"):
        holds_run(config, DERIVED | {"total_steps": 5})


def test_a_directory_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for missing in (os.W_OK, os.X_OK):
        monkeypatch.setattr(
            os,
            "access",
            lambda path, mode, missing=missing: path == tmp_path and not mode & missing,
        )
        with pytest.raises(UserError, match=f"cannot be written: no permission for {tmp_path}"):
            check_output(run(tmp_path / "new")[0])
    monkeypatch.setattr(os, "access", lambda path, mode: path == tmp_path)
    assert not check_output(run(tmp_path / "new")[0])


WSD = {"scheduler": "wsd", "warmup_steps": 10, "decay_ratio": 0.5, "max_steps": 100}


@pytest.mark.parametrize(
    ("step", "flags", "derived", "message"),
    [
        (30, {}, {}, None),
        (30, {}, {"total_steps": 1}, None),  # its own length is that of the decay
        (40, {}, {}, "has no checkpoint of that step. Saved steps: 3, 30, 80."),
        (3, {}, {}, "--decay_from 3: at this step the learning rate of the run in "),
        (80, {}, {}, "--decay_from 80: at this step the learning rate of the run in "),
        (30, {"seed": 1}, {}, "has another run: --seed was 42 and is 1. Repeat the flags"),
        (30, {}, {"data": "xyz"}, "has another run: the training data changed. Repeat the flags"),
        (30, {"output": "no"}, {}, "continues a run, but --output no has none. Repeat the flags"),
    ],
)
def test_a_run_is_decayed_from_a_checkpoint_of_its_peak(
    step: int, flags: dict[str, str], derived: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    begin(tmp_path / "run", **WSD)
    for name in ("30", "80"):
        (tmp_path / "run" / "checkpoints" / name).mkdir()
    config, _ = resolve(
        {"model": "haiku", "output": str(tmp_path / "run"), **WSD, "decay_from": step, **flags}
    )
    if message is None:
        assert not check_output(config, DERIVED | derived)
        return
    with pytest.raises(UserError) as refused:
        check_output(config, DERIVED | derived)
    assert message in str(refused.value)


def test_a_run_that_is_fetched_is_compared_too(tmp_path: Path) -> None:
    begin(tmp_path / "there")

    def fetch(path: Path) -> None:
        shutil.copytree(tmp_path / "there", path, dirs_exist_ok=True)

    config = run(tmp_path / "here")[0]
    with pytest.raises(UserError, match="holds another run: the training data changed"):
        open_run_directory(config, DERIVED | {"data": "xyz"}, fetch=fetch)
    shutil.rmtree(tmp_path / "here")
    directory = open_run_directory(config, DERIVED, fetch=fetch)
    directory.close()
    assert directory.holds_run


@pytest.mark.parametrize("sees_it", [True, False])
def test_other_processes_wait_until_they_see_the_directory_of_the_first(
    sees_it: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path)
    record, now, seen = RunRecord.new(), [100.0], iter(["", "old", "own"])

    def sleep(seconds: float) -> None:
        assert seconds < 1
        now[0] += 1.0

    monkeypatch.setattr(opening.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(opening.time, "sleep", sleep)
    monkeypatch.setattr(opening, "read_holder", lambda _: next(seen) if sees_it else "")
    first = Mock(spec=ProcessGroup, gather=lambda own: [json.dumps([True, "own", asdict(record)])])
    monkeypatch.setattr(opening, "current_process_group", lambda: first)
    if not sees_it:
        with pytest.raises(UserError, match="is not the same directory here as in process 0"):
            open_run_directory(run(tmp_path)[0], DERIVED, write=False)
        assert 119 < now[0] < 123
        return
    directory = open_run_directory(run(tmp_path)[0], DERIVED, write=False)
    monkeypatch.undo()
    assert (directory.holds_run, directory.record, directory.lock) == (True, record, None)
    assert not directory.is_adopted


def test_other_processes_change_nothing(tmp_path: Path) -> None:
    config, _ = run(tmp_path / "run")
    assert not holds_run(config, write=False)
    assert not (tmp_path / "run").exists()
    begin(tmp_path / "run")
    known = open_run_directory(config, DERIVED, write=False).record
    assert known == RunRecord.read(tmp_path / "run")
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
