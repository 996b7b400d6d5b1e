"""Advice in real runs: each is provoked, and a run near it stays silent."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model_config import ModelConfig
from consyn_jax.training import ConsynTrainer
from consyn_jax.training.logging import advice
from consyn_jax.training.run import recording

pytestmark = pytest.mark.slow
SMALL = ModelConfig(
    vocab_size=64,
    hidden_dim=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=64,
    context=16,
    tie_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


@pytest.fixture(autouse=True)
def without_judging_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a run takes beside other load."""
    monkeypatch.setattr(advice, "LEAST_SECONDS", float("inf"))


def rows(count: int, seed: int, high: int = 64) -> list[dict[str, Any]]:
    drawn = np.random.default_rng(seed).integers(3, high, (count, 16))
    return [{"input_ids": row} for row in drawn]


class Slow(list[Any]):
    """Rows that take a while to read."""

    def __getitem__(self, i: Any) -> Any:
        time.sleep(0.02)
        return super().__getitem__(i)


def advised(path: Path, data: Any, evaluation: Any = None, **settings: Any) -> list[str]:
    """The advice that a run logs."""
    settings = {"max_steps": 60, "logging_steps": 1, "save_steps": 1000, "lr": 1e-3} | settings
    if evaluation is not None:
        settings.setdefault("eval_steps", 10)
    given = {"batch_size": 8, "max_tokens": 16, "output_dir": str(path), "quiet": True}
    model = ConsynLMHeadModel.from_config(SMALL, seed=1)
    ConsynTrainer(model, data, evaluation, **given, **settings).train()
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line["about"] for line in lines if line.get("event") == "advice"]


def test_a_run_that_memorises(tmp_path: Path) -> None:
    few, other, many = rows(8, 1), rows(64, 2), rows(480, 3, high=9)
    assert "overfitting" in advised(tmp_path / "few", few, other, lr=3e-3, max_steps=100)
    assert advised(tmp_path / "many", many, rows(64, 4, high=9), lr=3e-3) == []


def test_a_rate_that_is_too_low(tmp_path: Path) -> None:
    data = rows(64, 1, high=9)
    assert "rate too low" in advised(tmp_path / "low", data, max_steps=230, lr=1e-9)
    assert "rate too low" not in advised(tmp_path / "right", data, max_steps=230)


def test_gradients_that_are_clipped(tmp_path: Path) -> None:
    data = rows(480, 1, high=9)
    clipped = advised(tmp_path / "low", data, max_steps=220, max_grad_norm=1e-3)
    assert "most steps clipped" in clipped
    assert advised(tmp_path / "high", data, max_steps=220, max_grad_norm=10.0) == []


def test_waiting_and_evaluating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "LEAST_SECONDS", 0.5)
    data = rows(480, 1, high=9)
    assert "waiting for data" in advised(tmp_path / "slow", Slow(data))
    many = rows(400, 2, high=9)
    often = {"max_steps": 12, "eval_steps": 1}
    assert "evaluations too frequent" in advised(tmp_path / "often", data, many, **often)
    # The steps take so long that the rest takes a small share on a busy machine, too.
    count = recording.Recorder.count
    monkeypatch.setattr(
        recording.Recorder, "count", lambda self, values: (time.sleep(0.05), count(self, values))
    )
    rarely = advised(tmp_path / "rarely", data, rows(8, 2, high=9), max_steps=100, eval_steps=50)
    assert "evaluations too frequent" not in rarely
    assert "waiting for data" not in rarely
