"""Which settings of a run its advice is told."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from test_trainer import trainer

from consyn_jax.training.logging.advice import Advice, Adviser, RunSettings

SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "warmup_steps": 3,
    "warmup_ratio": 0.9,
    "learning_rate": 3e-4,
    "max_grad_norm": 0.7,
    "batch_size": 8,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": "minimal",
    "eval_steps": 5,
    "save_steps": 4,
}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as given": ({}, {"warmup_steps": 3}),
    "left to the trainer": (
        {"warmup_steps": None, "warmup_ratio": 0.5, "eval_steps": None, "save_steps": None},
        {"warmup_steps": 3, "eval_steps": 1, "save_steps": 1},
    ),
    "no clipping": ({"max_grad_norm": 0.0}, {"max_grad_norm": None}),
}


@pytest.mark.parametrize("case", CHANGES)
def test_advice_is_told_the_settings_of_the_run(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, expected = CHANGES[case]
    told: list[RunSettings] = []

    def line(*arguments: Any) -> list[Advice]:
        told.append(arguments[-1])
        return []

    monkeypatch.setattr(Adviser, "line", line)
    trainer(tmp_path / "run", **SETTINGS | given).train()
    names = {"max_steps": "total_steps"}
    as_given = {names.get(name, name): value for name, value in SETTINGS.items()}
    fields = {field.name for field in dataclasses.fields(RunSettings)}
    whole = {name: value for name, value in (as_given | given | expected).items() if name in fields}
    assert dataclasses.asdict(told[-1]) == whole
