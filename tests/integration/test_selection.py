"""Early stopping, the plateau, the best model and the optimizers and precisions that keep a state
of their own, as whole runs."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from consyn_jax.training.loop import Training

from .conftest import MODEL, Run

FLAGS = [
    *MODEL,
    "--max_steps",
    "20",
    "--max_tokens",
    "32",
    "--batch_size",
    "8",
    "--validation_fraction",
    "0.2",
]
FLAGS += [
    "--logging_steps",
    "3",
    "--eval_steps",
    "2",
    "--save_steps",
    "5",
    "--logging_backend",
    "none",
]
# Nothing improves by a whole nat between evaluations of so short a run.
STOPPING = ["--early_stopping_patience", "3", "--early_stopping_min_delta", "1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        [*STOPPING, "--early_stopping_min_steps", "9"],
        [
            "--scheduler",
            "plateau",
            "--plateau_patience",
            "0",
            "--plateau_threshold",
            "0.5",
            "--metric_for_best_model",
            "eval/accuracy",
        ],
        pytest.param(["--optimizer", "schedule_free_adamw"], marks=pytest.mark.exhaustive),
        pytest.param(
            ["--optimizer", "muon", "--moment_dtype", "bfloat16", "--max_grad_norm", "0.5"],
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            ["--mixed_precision", "fp16", "--dropout", "0.1"], marks=pytest.mark.exhaustive
        ),
    ],
    ids=["early stopping", "plateau", "schedule-free", "muon", "fp16 and dropout"],
)
def test_a_stop_changes_nothing(
    flags: list[str],
    here: Callable[..., Run],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = here(tmp_path / "whole", *FLAGS, *flags, "--data", corpus)
    assert whole.code == 0, whole.said
    record = Training._record

    def and_signal(self: Training, *args: object) -> None:
        record(self, *args)  # type: ignore[arg-type]
        if self.progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_record", and_signal)
        stopped = here(tmp_path / "run", *FLAGS, *flags, "--data", corpus)
    assert stopped.code == 75, stopped.said
    resumed = here(tmp_path / "run", *FLAGS, *flags, "--data", corpus)
    assert resumed.code == 0, resumed.said
    assert (resumed.numbers, resumed.weights) == (whole.numbers, whole.weights)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_early_stop_ends_the_run_for_good_until_patience_is_raised(
    here: Callable[..., Run], corpus: Path, tmp_path: Path
) -> None:
    flags = [*FLAGS, "--data", corpus]
    run = here(tmp_path / "run", *flags, *STOPPING)
    assert run.code == 0, run.said
    (stop,) = [line for line in run.lines if line.get("event") == "early_stop"]
    assert stop["step"] == 8  # the first evaluation is the best, and three follow
    assert run.lines[-1]["event"] == "finish"
    assert "Early stop at step 8" in run.said
    before = run.lines
    again = here(tmp_path / "run", *flags, *STOPPING)
    assert "This run is complete" in again.said
    assert again.lines == before
    longer = here(tmp_path / "run", *flags)
    assert longer.lines[-1] | {"time_s": 0} == {
        "step": 20,
        "tokens": longer.lines[-1]["tokens"],
        "time_s": 0,
        "event": "finish",
        "best_step": 20,
    }


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_best_model_is_the_final_one_where_that_was_asked_for(
    here: Callable[..., Run], corpus: Path, tmp_path: Path
) -> None:
    # a rate at which the loss rises at once
    run = here(
        tmp_path / "run",
        *FLAGS,
        "--data",
        corpus,
        "--max_steps",
        "6",
        "--lr",
        "3",
        "--scheduler",
        "constant",
        "--load_best_model_at_end",
    )
    assert run.code == 0, run.said
    finish = run.lines[-1]
    losses = {line["step"]: line["eval/loss"] for line in run.numbers if "eval/loss" in line}
    assert finish["best_step"] == min(losses, key=lambda step: losses[step]) != 6
    best, final = (load_file(run.path / name / "model.safetensors") for name in ("best", "final"))
    assert all((best[name] == final[name]).all() for name in best)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_plateau_lowers_the_rate_that_is_logged(
    here: Callable[..., Run], corpus: Path, tmp_path: Path
) -> None:
    flags = [
        "--scheduler",
        "plateau",
        "--plateau_patience",
        "0",
        "--plateau_threshold",
        "0.9",
        "--plateau_factor",
        "0.5",
        "--warmup_steps",
        "0",
    ]
    run = here(
        tmp_path / "run",
        *FLAGS,
        "--data",
        corpus,
        *flags,
        "--lr",
        "1e-3",
        "--min_lr_ratio",
        "0.2",
        "--logging_steps",
        "1",
    )
    assert run.code == 0, run.said
    rates = {
        line["step"]: line["train/learning_rate"]
        for line in run.numbers
        if "train/learning_rate" in line
    }
    assert [rates[step] for step in (1, 4, 5, 7, 20)] == pytest.approx(
        [1e-3, 1e-3, 5e-4, 2.5e-4, 2e-4]
    )


@pytest.mark.slow
@pytest.mark.exhaustive
def test_half_precision_survives_an_overflow(
    here: Callable[..., Run], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from consyn_jax.training import precision

    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**40)
    run = here(
        tmp_path / "run",
        *FLAGS,
        "--data",
        corpus,
        "--mixed_precision",
        "fp16",
        "--logging_steps",
        "1",
    )
    assert run.code == 0, run.said
    lines = [
        json.loads(json.dumps(line, allow_nan=False))
        for line in run.numbers
        if "train/loss_scale" in line
    ]
    assert lines[-1]["train/skipped_steps"] > 0
    assert lines[-1]["train/loss_scale"] < lines[0]["train/loss_scale"]
