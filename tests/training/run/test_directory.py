import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from run_directories import DERIVED, begin, holds_run, run

from consyn_jax.config_file import describe, read_config_file
from consyn_jax.errors import UserError
from consyn_jax.flags import flat
from consyn_jax.resolve import resolve
from consyn_jax.training.logging.metrics import MetricsLog
from consyn_jax.training.run.directory import found_study
from consyn_jax.training.run.opening import check_output, open_run_directory


def test_config_yaml_has_every_value_with_its_origin_and_is_read_back(tmp_path: Path) -> None:
    flags = {
        "lr": 1e-3,
        "data": ["a: b.txt", "#c.jsonl"],
        "wandb_run_name": "no",
        "mixed_precision": "no",
        "epochs": 2.5,
        "sliding_window": 16,
    }
    config, origins = run(tmp_path, **flags)
    begin(tmp_path, **flags)
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    assert any(line.startswith("lr: 0.001") and line.endswith("# flag") for line in lines)
    assert any(
        line.startswith("hidden_dim: 128") and line.endswith("# preset haiku") for line in lines
    )
    assert any(line.startswith("seed: 42") and line.endswith("# default") for line in lines)
    assert set(yaml.safe_load(describe(config, origins))) == set(flat(config))
    again, _ = resolve({}, read_config_file(tmp_path / "config.yaml"), file_name="config.yaml")
    assert again == config


def test_config_yaml_does_not_record_overwrite_and_resume(tmp_path: Path) -> None:
    begin(tmp_path, overwrite=True, resume="never")
    recipe = read_config_file(tmp_path / "config.yaml")
    assert (recipe["overwrite"], recipe["resume"]) == (False, "auto")
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("overwrite:"))
    assert line.endswith("# default")


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


@contextmanager
def without_room_in_a_file() -> Iterator[None]:
    """As under `ulimit -f 0`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_limit_on_the_size_of_files_is_told_as_what_it_is(tmp_path: Path) -> None:
    """There is room, and there is no checkpoint to continue from."""
    config, origins = run(tmp_path)
    directory = open_run_directory(config, DERIVED)
    raise_it = r"cannot be written: File too large\. Raise the limit on the size of files \(ulimit"
    with MetricsLog(tmp_path) as log, without_room_in_a_file():
        with pytest.raises(UserError, match=rf"config\.yaml {raise_it}"):
            directory.write_config(config, origins, DERIVED)
        with pytest.raises(UserError, match=rf"{raise_it}.*or from the beginning if there is none"):
            log.write(1, 8, {"train/loss": 1.0})
    directory.close()


def test_an_interrupted_overwrite_is_completed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("study/study.json", "a study of consyn-tune"),
        ("ladder.json", "a ladder of consyn-tune"),
        ("sizes/0-haiku/config.yaml", "a ladder of consyn-tune"),
        ("sizes/other/config.yaml", None),
    ],
)
def test_a_study_is_no_run(name: str, kind: str | None, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    assert found_study(tmp_path) == kind
    if kind:
        with pytest.raises(UserError, match=f"contains {kind}, but a run needs its own directory"):
            check_output(run(tmp_path)[0])


def test_links_of_weights_and_biases_within_its_directory_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "latest-run").symlink_to(tmp_path)
    assert not holds_run(run(tmp_path)[0])


def test_lines_of_the_log_check_the_directory_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, origins = run(tmp_path)
    directory = open_run_directory(config, DERIVED)
    directory.write_config(config, origins, DERIVED)
    found = []
    for now in (100.0, 100.5, 101.5):
        (tmp_path / "config.yaml").unlink(missing_ok=True)
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        directory.check_for_line()
        found.append((tmp_path / "config.yaml").exists())
    monkeypatch.undo()
    assert found == [True, False, True]
    directory.close()
