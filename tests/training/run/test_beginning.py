"""The beginning of a run: its log, its best model, its trackers, and what its keywords mean."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from consyn_jax.config import EvaluationOptions
from consyn_jax.errors import UserError
from consyn_jax.model_config import ModelConfig
from consyn_jax.resolve import resolve
from consyn_jax.training.checkpointing.best_evaluation import Selection
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.checkpointing.ownership import RunRecord
from consyn_jax.training.checkpointing.run_state import Progress
from consyn_jax.training.logging.console import Console
from consyn_jax.training.logging.metrics import MetricsLog
from consyn_jax.training.logging.tracking.callbacks import Callbacks, RunView
from consyn_jax.training.run import beginning
from consyn_jax.training.run.directory import RunDirectory
from consyn_jax.training.run.keywords import given_once, resolve_keywords
from consyn_jax.training.run.model_manifest import seal

Lines = list[tuple[int, dict[str, Any]]]


def warned(text: str) -> None:
    raise AssertionError(text)


def logged(path: Path, run: str, lines: Lines) -> MetricsLog:
    """The log of an earlier start of a run, which had a best model."""
    path.mkdir()
    (path / "best").mkdir()
    (path / "best" / "config.json").write_text("{}")
    with MetricsLog(path) as log:
        log.write(0, 0, {"run": run}, event="start")
        for step, values in lines:
            event = {"event": "best"} if "best" in values else {}
            log.write(step, 8 * step, values, **event)
    return MetricsLog(path)


@pytest.mark.parametrize(
    ("lines", "keeps_best"),
    [
        ([(4, {"best": 1.0}), (6, {"train/loss": 1.0}), (7, {"train/loss": 1.0})], True),
        ([(6, {"best": 1.0}), (7, {"train/loss": 1.0})], True),
        ([(6, {"train/loss": 1.0}), (7, {"best": 1.0})], False),
    ],
)
def test_resuming_takes_back_what_was_logged_later(
    lines: Lines, keeps_best: bool, tmp_path: Path
) -> None:
    record = RunRecord.new()
    directory = RunDirectory(tmp_path / "run", True, record)
    with logged(tmp_path / "run", record.run, lines) as log:
        assert beginning.rewind(log, directory, 6, warned) == {}
        progress = Progress(selection=Selection(best_value=1.0, best_step=4, stale=2))
        beginning.forget_missing_best(progress, tmp_path / "run")
    assert (tmp_path / "run" / "best").exists() == keeps_best
    best = (1.0, 4) if keeps_best else (None, None)
    assert progress.selection == Selection(*best, stale=2)
    steps = [line["step"] for line in beginning.read_metrics(tmp_path / "run/metrics.jsonl")]
    assert steps == [0] + [step for step, _ in lines if step <= 6]


@pytest.mark.parametrize(
    ("resume", "holds_run", "step"),
    [
        ("auto", True, 9),
        ("auto", False, None),
        ("7", True, 7),
        ("7", False, 7),
        ("never", False, None),
    ],
)
def test_a_run_resumes_from_the_step_that_is_wanted(
    resume: str, holds_run: bool, step: int | None, tmp_path: Path
) -> None:
    checkpoints = Mock(spec=Checkpoints)
    checkpoints.newest.return_value = 9
    directory = RunDirectory(tmp_path, holds_run, RunRecord.new())
    assert beginning.resume_step(resume, directory, checkpoints) == step


@pytest.mark.parametrize("has_log", [True, False])
def test_a_run_is_complete_after_its_last_step_its_model_and_its_last_event(
    has_log: bool, tmp_path: Path
) -> None:
    checkpoints, said, known = Mock(spec=Checkpoints), [], [True]
    checkpoints.record = lambda step: asdict(Progress(step=step))

    def is_complete(step: int | None) -> bool:
        options = EvaluationOptions()
        return beginning.is_complete(
            tmp_path, step, 10, checkpoints, options, known[0], said.append
        )

    final = tmp_path / "final"
    final.mkdir()
    assert not is_complete(None)
    assert not is_complete(9)
    assert said == []
    missing = [f"{final} has no model", f"{final}/consyn_manifest.json is missing"]
    assert not is_complete(10)
    (final / "config.json").write_text("{}")
    assert not is_complete(10)
    seal(final)
    if has_log:
        with MetricsLog(tmp_path) as log:
            log.write(10, 80, event="save")
    assert not is_complete(10)
    missing.append(f"{tmp_path}/metrics.jsonl has no finish event")
    told = f"The run in {tmp_path} has taken its last step, but"
    again = "The work after the last step is repeated."
    assert said == [f"{told} {reason}. {again}" for reason in missing]
    with MetricsLog(tmp_path) as log:
        log.write(10, 80, event="finish")
    assert is_complete(10)
    assert is_complete(11)
    assert not is_complete(9)
    assert len(said) == 3
    known[0] = False
    with pytest.raises(UserError, match="is complete, and an iterator or random data cannot be"):
        is_complete(10)


def test_a_log_that_ends_too_early_is_said(tmp_path: Path) -> None:
    record, said = RunRecord.new(), []
    directory = RunDirectory(tmp_path / "run", True, record)
    with logged(tmp_path / "run", record.run, [(5, {"train/loss": 1.0})]) as log:
        assert beginning.rewind(log, directory, 5, warned) == {}
        found = beginning.rewind(log, directory, 6, said.append)
        assert found == {"log_ended_at": 5}
        log.path.write_text("")
        assert beginning.rewind(log, directory, 1, said.append) == {"log_ended_at": 0}
    assert [text.partition(" ends at ")[2][:37] for text in said] == [
        "step 5, but the checkpoint is of step",
        "step 0, but the checkpoint is of step",
    ]


def test_the_log_of_another_run_is_refused_by_a_run_that_resumes(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", True, RunRecord.new())
    with logged(tmp_path / "run", "theirs", []) as log:
        with pytest.raises(UserError, match="is the log of another run"):
            beginning.rewind(log, directory, 6, warned)
        assert beginning.rewind(log, directory, -1, warned) == {}, "a new run begins its own"


def test_the_summary_of_a_log_has_the_newest_values(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(1, 8, {"train/loss": 3.0, "train/epoch": 0.5})
        log.write(2, 16, {"train/loss": 2.0})
        log.write(2, 16, {"eval/loss": 4.0})
        log.write(3, 24, {"a/b": 1.0}, event="best")
    assert beginning.recorded_summary(tmp_path / "metrics.jsonl") == {
        "train/loss": 2.0,
        "train/epoch": 0.5,
        "eval/loss": 4.0,
        "step": 3,
        "tokens": 24,
    }


@pytest.mark.parametrize(("metric", "is_better"), [("eval/loss", False), ("eval/accuracy", True)])
def test_a_plateau_follows_the_metric_of_the_best_model(metric: str, is_better: bool) -> None:
    run, _ = resolve({"scheduler": "plateau", "metric_for_best_model": metric})
    plateau = beginning.new_progress(run).plateau
    assert plateau is not None
    for value in range(100):
        plateau.update(float(value))
    assert (plateau.scale == 1.0) == is_better


def test_smaller_micro_batches_are_said() -> None:
    console = Mock(spec=Console)
    run, _ = resolve({"batch_size": 8})
    smaller, _ = resolve({"batch_size": 2, "gradient_accumulation_steps": 4})
    beginning.report_smaller_batches(run, run, console)
    assert not console.note.called
    beginning.report_smaller_batches(run, smaller, console)
    assert "of 8 do not fit" in console.note.call_args.args[0]
    assert "takes 4 micro-batches of 2 seq" in console.note.call_args.args[0]


@pytest.mark.parametrize(
    ("resumed", "has_logs", "continued"),
    [(None, False, None), (None, True, -1), (7, True, 7), (7, False, 7)],
)
def test_trackers_and_callbacks_get_all_about_the_run(
    resumed: int | None,
    has_logs: bool,
    continued: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Curves of a run that stopped before its first checkpoint are not continued."""
    made: dict[str, Any] = {}
    tracker, own, made_callbacks = Mock(), Mock(), Mock(return_value=Mock(spec=Callbacks))

    def makers(backends: Any, **about: Any) -> list[Any]:
        made.update(about, backends=backends)
        return [("tracker", tracker)]

    monkeypatch.setattr(beginning, "tracker_makers", makers)
    monkeypatch.setattr(beginning, "Callbacks", made_callbacks)
    if has_logs:
        (tmp_path / "logs").mkdir()
    flags = {"logging_backend": "wandb", "wandb_project": "mine", "wandb_run_name": "first"}
    options = resolve(flags)[0].logging
    view = RunView(tmp_path, config={"lr": 1.0}, resumed_from=resumed)
    progress, warn = Progress(tracker_id="x1"), Mock()
    checkpoints = Mock(spec=Checkpoints, directory=tmp_path / "checkpoints")
    checkpoints.steps.return_value = [2]
    beginning.open_callbacks(options, view, [("own", own)], progress, warn, checkpoints)
    made.pop("keep_id")("x2")
    assert progress.tracker_id == "x2"
    assert made == {
        "backends": options.logging_backend,
        "directory": tmp_path,
        "project": "mine",
        "run_name": "first",
        "config": {"lr": 1.0},
        "resume_step": continued,
        "run_id": "x1",
        "warn": warn,
    }
    called, run, warns, saved = made_callbacks.call_args.args
    assert (called, run, warns) == ([("tracker", tracker), ("own", own)], view, warn)
    assert saved() == []
    checkpoints.steps.return_value = [2, 4, 6]
    assert saved() == [tmp_path / "checkpoints" / name for name in "46"]
    assert saved() == []


SHAPE = ModelConfig(
    vocab_size=300,
    hidden_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    context=64,
)


def chosen(*data: Any, context: int = 64, **settings: Any) -> Mapping[str, Any]:
    """Length, batch size and rate that follow from the data and the objective."""
    both = (*data, None)[:2]
    run, _ = resolve_keywords(replace(SHAPE, context=context), both, {"max_steps": 1, **settings})
    assert (run.model.model, run.model.num_kv_heads) == ("haiku", 1)
    return {
        "max_tokens": run.data.max_tokens,
        "batch_size": run.budget.batch_size,
        "lr": run.optimizer.lr,
    }


def test_lengths_batches_and_rates_follow_from_the_data() -> None:
    rows, longer = SimpleNamespace(natural_length=24), SimpleNamespace(natural_length=48)
    usual = {"max_tokens": 64, "batch_size": 8, "lr": 5e-5}
    assert chosen(object()) == usual
    assert chosen(rows) == usual | {"max_tokens": 24}
    assert chosen(rows, longer) == chosen(longer, rows) == usual | {"max_tokens": 48}
    assert chosen(rows, longer, context=32) == usual | {"max_tokens": 32}
    packed = SimpleNamespace(block_size=40, natural_length=24, batch_size=None)
    assert chosen(packed, longer) == usual | {"max_tokens": 40}
    assert chosen(SimpleNamespace(packed=packed)) == usual | {"max_tokens": 40}
    batches = SimpleNamespace(natural_length=24, batch_size=3)
    assert chosen(batches) == {"max_tokens": 24, "batch_size": 3, "lr": 5e-5}
    assert chosen(batches, max_tokens=16, batch_size=2, lr=0.5) == {
        "max_tokens": 16,
        "batch_size": 2,
        "lr": 0.5,
    }


def test_preference_pairs_are_trained_with_a_rate_of_their_own() -> None:
    assert chosen(SimpleNamespace(natural_length=24), objective="dpo")["lr"] == 1e-6


def test_the_directory_may_be_given_by_its_flag(tmp_path: Path) -> None:
    assert given_once({"output": "./output", "lr": None}, {"output": "there"}) == {
        "output": "there"
    }
    assert given_once({"output": tmp_path, "lr": 1.0}, {}) == {"output": str(tmp_path), "lr": 1.0}
    with pytest.raises(UserError, match=r"^output_dir and output are the same setting"):
        given_once({"output": "elsewhere"}, {"output": "there"})
    with pytest.raises(UserError, match="must be the path of a directory, not of type int"):
        given_once({"output": 5}, {})
