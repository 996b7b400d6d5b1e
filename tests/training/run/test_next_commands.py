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
from consyn_jax.tokenization import BPETokenizer
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
        ({"epochs": "1.25"}, {"epochs": 2.5}),
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
    decay, origins = resolve({"max_steps": 5, "decay_from": 3, "scheduler": "wsd"})
    assert len(next_commands(tmp_path, decay, origins)) == 2


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ({"data": "corpus/"}, "--data corpus/"),
        ({"data": "corpus/", "validation": ["a b.txt"]}, "--data 'a b.txt'"),
        ({"data": ["a.jsonl"], "text_key": "body"}, "--data a.jsonl --text_key body"),
        ({"data": ["a.jsonl"], "messages_key": "turns"}, "--data TEXT_FILE"),
        ({"data": ["1", "2", "3", "4"]}, "--data 1 2 3 4"),
        ({"data": ["1", "2", "3", "4", "5"]}, "--data TEXT_FILE"),
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
    plain, chat = (Mock(spec=BPETokenizer, chat_template=text) for text in (None, "{{ }}"))
    lines = closing_lines(tmp_path, run, origins, recorder, plain)
    assert closing_lines(tmp_path, run, origins, recorder, None) == lines
    assert "--interactive" not in lines[4]
    assert "--interactive" in closing_lines(tmp_path, run, origins, recorder, chat)[4]
    assert lines[:4] == [
        "7 steps, 1,234 target tokens",
        "train loss 5.2500 in step 7 (the lines above show means of about 20 steps)",
        f"best eval loss 5.5000 at step 6: {tmp_path / 'best'}",
        "Next:",
    ]
    advice = "(Texts that were not trained on give a better evaluation.)"
    assert lines[-2] == advice
    (tmp_path / "store").mkdir()
    for name in ("manifest.json", "a.tokens"):
        (tmp_path / "store" / name).touch()
    recorder.last = {}
    for data, named in (
        ({"data": "corpus/", "validation": "held-out/"}, "--data held-out/"),
        ({"data": ["corpus/", str(tmp_path / "store")]}, f"--data {tmp_path / 'store'}"),
        ({"data": ["a.jsonl"], "messages_key": "turns"}, "--data TEXT_FILE"),
    ):
        lines = closing_lines(tmp_path, *resolve(data), recorder, None)
        assert lines[1].startswith("train loss nan in step 7")
        assert advice not in lines
        assert " ".join(lines[5].split()).replace("\\ ", "").endswith(named)


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
    recorder.sources_taken.return_value = {"sources": {"a": 3}}
    said = str(interruption("SIGTERM", checkpoints, recorder, run))
    end = f"saved in there. Run {command} again to continue."
    assert said.endswith(end if is_saved else f"{command[1:]} continues from step 5.")
    told = {"signal": "SIGTERM", "sources": {"a": 3}}
    recorder.event.assert_called_once_with("signal", told)
    checkpoints.steps.return_value = []
    said = str(interruption("SIGTERM", checkpoints, recorder, run))
    assert said.endswith("could not be saved. T" + command[1:] + " continues from the beginning.")
    recorder.progress.step = 0
    assert "there is nothing to save yet" in str(
        interruption("SIGTERM", checkpoints, recorder, run)
    )
