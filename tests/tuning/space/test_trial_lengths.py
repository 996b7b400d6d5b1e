"""Evaluations and tokens of the trials of a study."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consyn_jax.errors import UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model_config import ModelConfig
from consyn_jax.training import ConsynTrainer
from consyn_jax.tuning.search_space import parse_search
from consyn_jax.tuning.space.trial_lengths import num_evaluations, tokens_grow_with

SHAPE = {"hidden_dim": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8}
MODEL = ModelConfig(vocab_size=16, mlp_dim=8, context=16, eos_token_id=0, **SHAPE)
ROWS = np.ones((64, 15), np.int32)


def trainer(output: Path, **settings: Any) -> ConsynTrainer:
    model = ConsynLMHeadModel.from_config(MODEL, seed=0)
    return ConsynTrainer(model, ROWS, ROWS[:8], output_dir=output, max_tokens=16, **settings)


@pytest.mark.parametrize(
    ("budget", "names"),
    [
        ({"max_steps": 8}, ["batch_size", "gradient_accumulation_steps"]),
        ({"max_steps": 8, "num_epochs": 1}, ["batch_size", "gradient_accumulation_steps"]),
        ({"max_steps": 99, "num_epochs": 1}, []),  # an epoch is 16 batches of 4
        ({"max_steps": 99, "total_tokens": 1024}, []),
        ({"num_epochs": 1}, []),
        ({"total_tokens": 1024}, []),
    ],
)
def test_trials_with_larger_batches_read_more_tokens_if_steps_are_counted(
    budget: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    any_trial = trainer(tmp_path, **budget)
    space = parse_search(["batch_size=8,4", "lr=1,2", "gradient_accumulation_steps=1:4"])
    assert tokens_grow_with(any_trial, space) == names
    assert tokens_grow_with(any_trial, space[:1]) == names[:1]
    assert tokens_grow_with(any_trial, space[1:2]) == []


def test_a_pruner_needs_two_evaluations(tmp_path: Path) -> None:
    one = trainer(tmp_path, max_steps=4, eval_steps=4)
    assert num_evaluations(one, "eval/loss", "none") == 1
    with pytest.raises(UserError, match="--pruner median compares evaluations during training"):
        num_evaluations(one, "eval/loss", "median")
    assert num_evaluations(trainer(tmp_path, max_steps=9, eval_steps=4), "eval/loss", "median") == 3
