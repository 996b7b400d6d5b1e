import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from consyn_jax.config import RunConfig, UserError, flat
from consyn_jax.resolve import resolve
from consyn_jax.training.config_file import describe, read_config_file
from consyn_jax.training.run_directory import compare, open_run_directory

DERIVED = {"data": "abc", "validation": None, "tokenizer": "def", "sequences_per_step": 8, "total_steps": 100, "vocab_size": 259}


def run(output: Path, **flags: Any) -> tuple[RunConfig, dict[str, str]]:
    return resolve({"model": "haiku", "output": str(output), **flags})


def holds_run(config: RunConfig, derived: dict[str, Any] = DERIVED, *, write: bool = True) -> bool:
    """Open the directory of `config` and let it go."""
    directory = open_run_directory(config, derived, write=write)
    directory.close()
    return directory.holds_run


def begin(output: Path, **flags: Any) -> None:
    """A run that has saved step 3."""
    config, origins = run(output, **flags)
    directory = open_run_directory(config, DERIVED)
    directory.write_config(config, origins, DERIVED)
    (directory.checkpoints / "3").mkdir(parents=True)
    directory.close()


def test_a_new_directory_is_made_and_then_holds_the_run(tmp_path: Path) -> None:
    config, _ = run(tmp_path / "a" / "b")
    assert not holds_run(config)
    assert (tmp_path / "a" / "b").is_dir()
    begin(tmp_path / "a" / "b")
    assert holds_run(config)


def test_what_lies_beside_the_checkpoints_and_is_no_step_is_passed_over(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "checkpoints" / "²").mkdir()
    assert holds_run(run(tmp_path)[0])


def test_two_processes_do_not_write_to_one_directory(tmp_path: Path) -> None:
    config, _ = run(tmp_path)
    first = open_run_directory(config, DERIVED)
    with pytest.raises(UserError, match="is in use by another process"):
        open_run_directory(config, DERIVED)
    first.close()
    assert not holds_run(config)


def test_config_yaml_tells_every_value_and_its_origin_and_is_read_back(tmp_path: Path) -> None:
    flags = {"lr": 1e-3, "data": ["a: b.txt", "#c.jsonl"], "wandb_run_name": "no", "mixed_precision": "no", "epochs": 2.5, "sliding_window": 16}
    config, origins = run(tmp_path, **flags)
    begin(tmp_path, **flags)
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    assert any(line.startswith("lr: 0.001") and line.endswith("# flag") for line in lines)
    assert any(line.startswith("hidden_dim: 128") and line.endswith("# preset haiku") for line in lines)
    assert any(line.startswith("seed: 42") and line.endswith("# default") for line in lines)
    assert set(yaml.safe_load(describe(config, origins))) == set(flat(config))
    again, _ = resolve({}, read_config_file(tmp_path / "config.yaml"), file_name="config.yaml")
    assert again == config


def test_a_run_does_not_write_down_that_it_overwrote(tmp_path: Path) -> None:
    begin(tmp_path, overwrite=True, resume="never")
    recipe = read_config_file(tmp_path / "config.yaml")
    assert (recipe["overwrite"], recipe["resume"]) == (False, "auto")


def test_what_does_not_change_the_mathematics_may_change(tmp_path: Path) -> None:
    begin(tmp_path)
    config, _ = run(tmp_path, save_steps=7, logging_backend="none", mesh="data=8", gradient_checkpointing="full", quiet=True)
    assert holds_run(config)


@pytest.mark.parametrize(
    ("flags", "derived", "words"),
    [
        ({"lr": 0.1, "beta1": 0.8, "dropout": 0.1}, {}, ["--beta1 was 0.9 and is 0.8", "--dropout was 0.0 and is 0.1"]),
        ({"hidden_dim": 64}, {}, ["--hidden_dim was 128 and is 64", "--head_dim was 32 and is 16"]),
        ({}, {"data": "other"}, ["the training data changed"]),
        ({}, {"tokenizer": None}, ["the tokenizer changed"]),
        ({}, {"vocab_size": 300}, ["the vocabulary was 259 and is 300"]),
        ({}, {"sequences_per_step": 16}, ["batch_size x gradient_accumulation_steps was 8 and is 16"]),
    ],
)
def test_another_run_is_told_apart_difference_by_difference(flags: dict[str, Any], derived: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    begin(tmp_path)
    config, _ = run(tmp_path, **flags)
    found = compare(yaml.safe_load((tmp_path / "config.yaml").read_text()), config, DERIVED | derived)
    assert found == words
    with pytest.raises(UserError) as caught:
        open_run_directory(config, DERIVED | derived)
    message = str(caught.value)
    assert f"--output {tmp_path} holds another run: " in message
    assert all(word in message for word in words)


def test_overwriting_deletes_the_run_and_nothing_else(tmp_path: Path) -> None:
    begin(tmp_path)
    outside = tmp_path.parent / "elsewhere"
    outside.mkdir(exist_ok=True)
    (outside / "kept.txt").write_text("theirs")
    for name in ("checkpoints/4", "best", "final", "logs", "notes"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "profile").symlink_to(outside, target_is_directory=True)
    assert not holds_run(run(tmp_path, overwrite=True, lr=0.1)[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "thesis.tex"]
    assert (outside / "kept.txt").read_text() == "theirs"


def test_overwriting_that_was_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", Mock(side_effect=OSError(5, "Input/output error")))
        with pytest.raises(UserError, match="cannot be used: Input/output error"):
            open_run_directory(run(tmp_path, overwrite=True)[0], DERIVED)
    assert not holds_run(run(tmp_path, overwrite=True)[0])
    assert not (tmp_path / "checkpoints").exists()


def test_a_directory_that_holds_no_run_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "precious").write_text("x")
    assert not holds_run(run(tmp_path, overwrite=True)[0])
    assert (tmp_path / "logs" / "precious").exists()


def test_overwriting_does_not_delete_what_the_run_is_made_from(tmp_path: Path) -> None:
    begin(tmp_path)
    for flags in ({"data": [str(tmp_path / "final" / "config.json")]}, {"tokenizer": str(tmp_path / "tokenizer")}, {"checkpoint": str(tmp_path / "best")}):
        with pytest.raises(UserError, match=rf"--overwrite would delete --{next(iter(flags))} "):
            holds_run(run(tmp_path, overwrite=True, **flags)[0])
    assert (tmp_path / "checkpoints" / "3").is_dir()


def test_a_directory_that_cannot_be_used_is_refused_in_words(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match=r"is a file\. Name a directory\."):
        open_run_directory(run(file)[0], DERIVED)
    with pytest.raises(UserError, match=r"cannot be made: .*file is a file"):
        open_run_directory(run(file / "below")[0], DERIVED)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl without a config\.yaml, so it is not a run of ours"):
        open_run_directory(run(foreign)[0], DERIVED)
    (foreign / "metrics.jsonl").unlink()
    (foreign / "checkpoints" / "500").mkdir(parents=True)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"foreign holds checkpoints without a config\.yaml, so it is not a run of ours"):
            open_run_directory(run(foreign, overwrite=overwrite)[0], DERIVED)


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"just a text", b"lr: 1.0\n"])
def test_a_config_yaml_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged|is not the configuration of a run"):
        open_run_directory(run(tmp_path)[0], DERIVED)


def test_resuming_on_purpose_needs_a_run_and_never_resuming_needs_none(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run"):
        open_run_directory(run(tmp_path / "run", resume="never")[0], DERIVED)
    assert not holds_run(run(tmp_path / "new", resume="never")[0])
    with pytest.raises(UserError, match=r"--resume 5: .* has no checkpoint of that step; there are: 3\."):
        open_run_directory(run(tmp_path / "run", resume="5")[0], DERIVED)
    assert holds_run(run(tmp_path / "run", resume="3")[0])


def test_only_directories_with_the_number_of_a_step_are_checkpoints(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "3²").mkdir()
    (checkpoints / "²").mkdir()
    (checkpoints / "5").write_text("")
    with pytest.raises(UserError, match=r"there are: 3\."):
        open_run_directory(run(tmp_path / "run", resume="5")[0], DERIVED)
    shutil.rmtree(checkpoints)
    checkpoints.write_text("")
    with pytest.raises(UserError, match=r"checkpoints cannot be read: Not a directory\. Name another --output\."):
        open_run_directory(run(tmp_path / "run")[0], DERIVED)


def test_a_run_that_saved_nothing_may_be_another(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "checkpoints" / "3").rmdir()
    assert not holds_run(run(tmp_path, lr=0.1)[0])


def test_other_processes_only_look(tmp_path: Path) -> None:
    config, _ = run(tmp_path / "run")
    assert not holds_run(config, write=False)
    assert not (tmp_path / "run").exists()
    begin(tmp_path / "run")
    holds_run(replace(config, saving=replace(config.saving, overwrite=True)), write=False)
    assert (tmp_path / "run" / "config.yaml").exists()
