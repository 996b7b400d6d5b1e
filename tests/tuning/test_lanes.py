"""Trials side by side: each as if it trained alone, by one program for all lanes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from consyn_jax.errors import Diverged
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model_config import ModelConfig
from consyn_jax.training.logging.tracking.callbacks import RunView
from consyn_jax.tuning.lane_programs import LanePrograms
from consyn_jax.tuning.lanes import Lane, run_lanes
from consyn_jax.tuning.shared_programs import SharedPrograms
from consyn_jax.tuning.trial_trainer import TrialTrainer

MODEL = ModelConfig(
    vocab_size=64,
    hidden_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    context=32,
    eos_token_id=0,
)
ROWS = np.random.default_rng(0).integers(1, 64, (64, 16))
LANES = 3
COMPILED = "/jax/core/compile/backend_compile_duration"
# Every number that is an argument of the program.
TRIALS: list[dict[str, Any]] = [
    {"learning_rate": 1e-2, "dropout": 0.1, "seed": 1},
    {"learning_rate": 3e-2, "dropout": 0.2, "seed": 2, "weight_decay": 0.3, "beta1": 0.8},
    {"learning_rate": 2e-2, "dropout": 0.05, "seed": 3, "scheduler": "wsd", "warmup_steps": 9},
    {"learning_rate": 4e-3, "dropout": 0.3, "seed": 4, "beta2": 0.9, "eps": 1e-5},
    {"learning_rate": 1e-2, "dropout": 0.1, "seed": 5, "max_grad_norm": 0.1},
]


def trainer(path: Path, shared: SharedPrograms, lane: Lane | None, **settings: Any) -> TrialTrainer:
    given = {"max_steps": 50, "batch_size": 8, "eval_steps": 10, "save_steps": 50, "quiet": True}
    more = {"logging_backend": "none", "logging_steps": 1}
    return TrialTrainer(
        shared,
        [],
        None if lane is None else lane.signals,
        model=ConsynLMHeadModel.from_config(MODEL, seed=settings.get("seed", 1)),
        train_dataloader=ROWS,
        eval_dataloader=ROWS[:8],
        output_dir=path,
        **{**given, **more, **settings},
    )


def metrics(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    names = ("train/loss", "eval/loss", "train/learning_rate", "step")
    return [
        {n: line[n] for n in names if n in line}
        for line in lines
        if "event" not in line
    ]


class StopAt:
    """Ends a trial as the pruner does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_evaluate(self, run: RunView, values: dict[str, Any]) -> None:
        if values["step"] == self.step:
            run.stop("pruned")


def side_by_side(
    path: Path,
    trials: list[dict[str, Any]],
    begun: Callable[[int, TrialTrainer], None] = lambda number, trial: None,
) -> list[int]:
    """Train the trials in `LANES` lanes, and return the lane of each."""
    shared, left, placed = SharedPrograms(), list(enumerate(trials)), [0] * len(trials)

    def work(lane: Lane) -> None:
        while left:
            number, settings = left.pop(0)
            placed[number] = lane.number
            own = LanePrograms(shared, LANES, lane)
            trial = trainer(path / str(number), own, lane, **settings)
            begun(number, trial)
            try:
                trial.train()
            except Diverged:
                pass

    run_lanes(LANES, work)
    return placed


def test_a_trial_in_a_lane_learns_as_alone(tmp_path: Path) -> None:
    """Also one that refills a lane, beside trials that are at other steps."""
    compiled: list[int] = []
    number_now = [0]

    def begun(number: int, trial: TrialTrainer) -> None:
        number_now[0] = number
        if number == 1:
            trial.add_callback(StopAt(20))

    def count(event: str, *_: Any, **__: Any) -> None:
        if event == COMPILED:
            compiled.append(number_now[0])

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        placed = side_by_side(tmp_path / "lanes", TRIALS, begun)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert placed[:4] == [0, 1, 2, 1]
    assert set(compiled) <= {0, 1, 2}, "a lane that was refilled compiled something"
    shared = SharedPrograms()
    for number, settings in enumerate(TRIALS):
        together = metrics(tmp_path / "lanes" / str(number))
        assert together[-1]["step"] == (20 if number == 1 else 50)
        if number in (0, 3):
            trainer(tmp_path / f"alone{number}", shared, None, **settings).train()
            alone = metrics(tmp_path / f"alone{number}")
            assert len(alone) == len(together) == 55
            for one, other in zip(alone, together, strict=True):
                assert one.keys() == other.keys()
                for name, value in one.items():
                    assert other[name] == pytest.approx(value, rel=1e-5), (number, one, other)
