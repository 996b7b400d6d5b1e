"""The commands that a run names at its end are commands."""

import shlex
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from consyn_jax.cli import evaluate, generate
from consyn_jax.cli.train import read_arguments
from consyn_jax.config import RunConfig
from consyn_jax.config_file import describe
from consyn_jax.flags import with_flags
from consyn_jax.resolve import resolve
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.checkpointing.run_state import Progress
from consyn_jax.training.run.ending import interruption, next_commands
from consyn_jax.training.run.recording import Recorder


@pytest.mark.parametrize(
    ("flags", "longer"),
    [
        ({"max_steps": "150"}, {"max_steps": 300}),
        ({"total_tokens": "100000000000"}, {"total_tokens": 200_000_000_000}),
        ({"epochs": "1.5", "max_steps": "7"}, {"epochs": 3.0, "max_steps": 14}),
        ({}, {"epochs": 6.0}),
    ],
)
def test_each_is_understood(
    flags: dict[str, str], longer: dict[str, float], tmp_path: Path
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
    again, _, mode = read_arguments(third[1:])
    assert (third[0], mode) == ("consyn-train", "")
    assert again == with_flags(run, {**longer, "overwrite_schedule": True})


def test_a_run_that_no_command_made_is_not_trained_longer_by_one(tmp_path: Path) -> None:
    run: RunConfig
    run, origins = resolve({"max_steps": 5}, given_as="keyword")
    assert len(next_commands(tmp_path, run, origins)) == 2
    assert next_commands(tmp_path, run, origins)[1].endswith("--data TEXT_FILE")


@pytest.mark.parametrize("is_saved", [True, False])
@pytest.mark.parametrize(
    ("flags", "command"),
    [
        ({}, "the same command"),
        ({"overwrite": "true"}, "the same command without --overwrite"),
        ({"resume": "4"}, "the same command with --resume auto"),
    ],
)
def test_the_command_that_continues_deletes_nothing(
    flags: dict[str, str], command: str, is_saved: bool
) -> None:
    run, _ = resolve({"output": "there", "model": "haiku", **flags})
    checkpoints, recorder = Mock(spec=Checkpoints), Mock(spec=Recorder, progress=Progress(step=7))
    checkpoints.steps.return_value = [7 if is_saved else 5]
    recorder.sources_taken.return_value = {}
    said = str(interruption("SIGTERM", checkpoints, recorder, run))
    end = f"saved in there. Run {command} again to continue."
    assert said.endswith(end if is_saved else f"{command[1:]} continues from step 5.")
