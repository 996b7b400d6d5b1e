"""From the command line of `consyn-train` to what is called, without doing it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest

from consyn_jax.cli import dry_run, train
from consyn_jax.cli.proof import repeat_logged
from consyn_jax.distributed import launch, process_group
from consyn_jax.errors import UserError
from consyn_jax.resolve import resolve
from consyn_jax.training import trainer
from consyn_jax.training.mirror import remote_run
from consyn_jax.training.run import lock, opening

NEW = ["--model", "haiku", "--output", "runs/a"]


@pytest.mark.parametrize(("flags", "action"), [([], ""), (["--lr_find"], "lr_find")])
def test_training_counts_its_time_from_the_start_of_the_command(
    flags: list[str], action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = Mock()
    monkeypatch.setattr(train, "train", called)
    before = time.perf_counter()
    train.run([*NEW, *flags])
    assert before <= called.call_args.kwargs.pop("began") <= time.perf_counter()
    config, origins, *found = called.call_args.args
    assert (config.saving.output, origins["output"]) == ("runs/a", "flag")
    assert found == [train.ACTIONS[action]]


@pytest.mark.parametrize("writes", [None, True, False])
def test_a_directory_that_is_not_written_is_not_checked(
    writes: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, made, action, checks = Mock(), Mock(), Mock(), Mock()
    own = Mock(trainer_inputs=lambda settings: {"settings": settings}, settings="settings")

    @contextmanager
    def prepared(settings: Any, check: Any) -> Iterator[Mock]:
        assert settings == (config, {})
        check(config)
        yield own

    monkeypatch.setattr(train, "prepared_run", prepared)
    monkeypatch.setattr(train, "_check_directory", checks)
    monkeypatch.setattr(trainer, "ConsynTrainer", made)
    train.train(config, {}, action, began=4.5, **({} if writes is None else {"writes": writes}))
    assert checks.call_args_list == ([] if writes is False else [call(config)])
    made.assert_called_once_with(settings="settings")
    assert made.return_value.began == 4.5
    action.assert_called_once_with(made.return_value)


@pytest.mark.parametrize("is_first", [True, False])
def test_one_process_checks_the_directory(is_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (config, _), checks = resolve({"output": "runs/a"}), Mock()
    monkeypatch.setattr(process_group, "is_first", lambda: is_first)
    for place, name in (
        (opening, "check_output"),
        (lock, "check_free"),
        (remote_run, "check_remote"),
    ):
        monkeypatch.setattr(place, name, getattr(checks, name))
    train._check_directory(config)
    expected = [call.check_output(config), call.check_free(Path("runs/a"))]
    assert checks.mock_calls == ([*expected, call.check_remote(config)] if is_first else [])


def test_a_repeated_step_does_not_write_to_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    called, replay = Mock(), Mock()
    monkeypatch.setattr(train, "train", called)
    monkeypatch.setattr(repeat_logged, "settings_of_run", lambda *about: (*about, Path("runs/a")))
    monkeypatch.setattr(repeat_logged, "replay", replay)
    train.run([*NEW, "--replay_step", "3"])
    config, origins, action = called.call_args.args
    assert (config.proof.replay_step, origins["replay_step"]) == (3, "flag")
    assert called.call_args.kwargs == {"writes": False}
    action("trainer")
    replay.assert_called_once_with("trainer", Path("runs/a"))


@pytest.mark.parametrize("flags", [["--topology", "h200:1x8"], ["--fit", "recipe.yaml"]])
def test_a_plan_is_made_without_weights(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA and a preset: the memory of a run, however its weights begin."""
    called = Mock()
    monkeypatch.setattr(dry_run, "plan", called)
    train.run([*NEW, "--lora_rank", "4", "--dry_run", *flags])
    config, origins, choice = called.call_args.args
    assert (config.lora.rank, origins["lora_rank"], choice) == (4, "flag", (None, None, None))
    with pytest.raises(UserError, match=f"^{flags[0]} needs --dry_run. Add --dry_run, or leave "):
        train.run([*NEW, *flags])


def test_processes_meet_only_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Mock()
    monkeypatch.setattr(launch, "runtime", runtime)
    alone, several = (
        Mock(**{"hardware.distributed": distributed}) for distributed in (False, True)
    )
    for config, mode in ((alone, ""), (alone, "lr_find"), (alone, "dry_run"), (several, "dry_run")):
        assert isinstance(train._runtime(config, mode), nullcontext)
    runtime.assert_not_called()
    assert train._runtime(several, "") is runtime.return_value
    runtime.assert_called_once_with(several)
    with pytest.raises(UserError, match=r"^--lr_find runs in one process\. Leave --dist"):
        train._runtime(several, "lr_find")
