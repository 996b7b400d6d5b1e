"""The commands that a run names at its end are commands."""

import shlex
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from consyn_jax.cli import evaluate, generate
from consyn_jax.cli.train import read_arguments
from consyn_jax.config import RunConfig
from consyn_jax.config_file import describe
from consyn_jax.flags import with_flags
from consyn_jax.resolve import resolve
from consyn_jax.training.checkpointing.best_evaluation import Selection
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.checkpointing.run_state import Progress
from consyn_jax.training.run.ending import closing_lines, interruption, next_commands
from consyn_jax.training.run.recording import Recorder


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


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ({"data": "corpus/"}, "--data corpus/"),
        ({"data": "corpus/", "validation": ["a b.txt"]}, "--data 'a b.txt'"),
        ({"data": ["a.jsonl"], "text_key": "body"}, "--data a.jsonl --text_key body"),
        ({"data": ["a.jsonl"], "messages_key": "turns"}, "--data TEXT_FILE"),
        ({"data": [f"{i}.txt" for i in range(9)]}, "--data TEXT_FILE"),
        ({"objective": "dpo", "checkpoint": "there", "data": "pairs.jsonl"}, "--data TEXT_FILE"),
    ],
)
def test_the_data_of_a_run_is_named_where_it_can_be_evaluated(
    flags: dict[str, Any], shown: str, tmp_path: Path
) -> None:
    command = next_commands(tmp_path, *resolve(flags))[1]
    assert command == f"consyn-evaluate {tmp_path / 'final'} {shown}"
    assert evaluate.read_arguments(shlex.split(command)[1:]).texts.data


def test_a_model_with_a_chat_template_is_talked_to(tmp_path: Path) -> None:
    first = shlex.split(next_commands(tmp_path, *resolve({}), is_chat=True)[0])
    assert first == ["consyn-generate", str(tmp_path / "final"), "--interactive"]
    assert generate.read_arguments(first[1:]).prompts.interactive


def test_the_losses_at_the_end_are_told_apart(tmp_path: Path) -> None:
    selection = Selection(best_value=5.5, best_step=6)
    progress = Progress(step=7, tokens=1234, selection=selection)
    recorder = Mock(spec=Recorder, progress=progress, last={"train/loss": 5.25})
    run, origins = resolve({"data": "corpus/"})
    lines = closing_lines(tmp_path, run, origins, recorder, None)
    assert lines[:4] == [
        "7 steps, 1,234 target tokens",
        "train loss 5.2500 in step 7 (the lines above show means of about 20 steps)",
        f"best eval loss 5.5000 at step 6: {tmp_path / 'best'}",
        "Next:",
    ]
    advice = "(Texts that were not trained on give a better evaluation.)"
    assert lines[-2] == advice
    run, origins = resolve({"data": "corpus/", "validation": "held-out/"})
    assert advice not in closing_lines(tmp_path, run, origins, recorder, None)


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
