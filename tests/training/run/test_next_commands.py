"""The commands that a run names at its end are commands."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from consyn_jax.cli import evaluate, generate
from consyn_jax.cli.train import read_arguments
from consyn_jax.config import RunConfig
from consyn_jax.config_file import describe
from consyn_jax.flags import with_flags
from consyn_jax.resolve import resolve
from consyn_jax.training.run.ending import next_commands


@pytest.mark.parametrize(
    ("flags", "longer"),
    [
        ({"max_steps": "150"}, {"max_steps": 300}),
        ({"total_tokens": "100000000000"}, {"total_tokens": 200_000_000_000}),
        ({"epochs": "1.5", "max_steps": "7"}, {"epochs": 3.0, "max_steps": 14}),
        ({}, {"epochs": 6.0}),
        ({"logging_backend": ["wandb", "mine:Tracker"]}, {"epochs": 6.0}),
    ],
)
def test_each_is_understood(
    flags: dict[str, Any], longer: dict[str, float], tmp_path: Path
) -> None:
    directory = tmp_path / "a run's"
    run, origins = resolve({"output": str(directory), **flags, "validation": ["my text.txt"]})
    directory.mkdir()
    (directory / "config.yaml").write_text(describe(run, origins) + yaml.safe_dump({"derived": {}}))
    first, second, third = (shlex.split(c) for c in next_commands(directory, run, origins))
    assert first[0] == "consyn-generate"
    assert generate.read_arguments(first[1:]).model.model == str(directory / "final")
    assert second[0] == "consyn-evaluate"
    scored = evaluate.read_arguments(second[1:])
    assert scored.models.model == (str(directory / "final"),)
    assert scored.texts.data == ("my text.txt",)
    again, origins, mode = read_arguments(third[1:])
    is_own = "logging_backend" in flags
    assert (origins["logging_backend"] == "flag") == is_own, "code must be typed"
    assert (third[0], mode) == ("consyn-train", "")
    assert again == with_flags(run, {**longer, "overwrite_schedule": True})


def test_a_run_that_no_command_made_is_not_trained_longer_by_one(tmp_path: Path) -> None:
    run: RunConfig
    run, origins = resolve({"max_steps": 5}, given_as="keyword")
    assert len(next_commands(tmp_path, run, origins)) == 2
    assert next_commands(tmp_path, run, origins)[1].endswith("--data TEXT_FILE")
