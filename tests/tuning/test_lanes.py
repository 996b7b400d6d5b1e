"""Trials side by side: each as if it trained alone, by one program for all lanes."""

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import jax
import pytest
from tiny_trials import MODEL, ROWS

from consyn_jax.cli import tune
from consyn_jax.errors import Diverged, Interrupted, UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.training.logging.tracking.callbacks import RunView
from consyn_jax.training.runtime.memory import Memory
from consyn_jax.tuning.lanes import lane_programs
from consyn_jax.tuning.lanes.lane import Lane, run_lanes
from consyn_jax.tuning.lanes.lane_programs import LanePrograms, lanes_step, pays, step_seconds
from consyn_jax.tuning.shared_programs import SharedPrograms, numbers_of, placed
from consyn_jax.tuning.study_run import Tuning
from consyn_jax.tuning.trial_trainer import TrialTrainer
from consyn_jax.tuning.varied_run import VariedRun

LANES = 3
COMPILED = "/jax/core/compile/backend_compile_duration"
# Every number that is an argument of the program. The second is ended, the third diverges.
TRIALS: list[dict[str, Any]] = [
    {"learning_rate": 1e-2, "dropout": 0.1, "seed": 1, "max_grad_norm": 0.1},
    {"learning_rate": 3e-2, "dropout": 0.2, "seed": 2, "weight_decay": 0.3},
    {"learning_rate": 1e30, "dropout": 0.3, "seed": 3},
    {"learning_rate": 2e-2, "dropout": 0.05, "seed": 4, "scheduler": "wsd", "warmup_steps": 9},
    {"learning_rate": 4e-3, "dropout": 0.3, "seed": 5, "beta1": 0.8, "beta2": 0.9, "eps": 1e-5},
]
LANE_OF_TRIAL = [0, 1, 2, 2, 1]


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
    return [{n: line[n] for n in names if n in line} for line in lines if "event" not in line]


class StopAt:
    """Ends a trial as the pruner does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_evaluate(self, run: RunView, values: dict[str, Any]) -> None:
        if values["step"] == self.step:
            run.stop("pruned")


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], set[int]]:
    """Train `TRIALS` in `LANES` lanes.

    Returns:
        Their directories, the lane of each, and the trials after whose beginning something was
        compiled.
    """
    path, shared = tmp_path_factory.mktemp("lanes"), SharedPrograms()
    left, lane_of, compiled = list(enumerate(TRIALS)), dict[int, int](), set[int]()

    def work(lane: Lane) -> None:
        while left:
            number, settings = left.pop(0)
            lane_of[number] = lane.number
            own = LanePrograms(shared, LANES, lane)
            trial = trainer(path / str(number), own, lane, **settings)
            if number == 1:
                trial.add_callback(StopAt(20))
            if number == 2:
                with pytest.raises(Diverged):
                    trial.train()
            else:
                trial.train()

    def count(event: str, *_: Any, **__: Any) -> None:
        if event == COMPILED:
            compiled.add(max(lane_of))

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        run_lanes(LANES, work)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    return path, [lane_of[number] for number in range(len(TRIALS))], compiled


@pytest.mark.slow
def test_a_lane_is_refilled_without_compiling(
    side_by_side: tuple[Path, list[int], set[int]],
) -> None:
    path, lane_of, compiled = side_by_side
    assert lane_of == LANE_OF_TRIAL
    assert 4 not in compiled, "a lane that was refilled compiled something"
    reached = [metrics(path / str(number))[-1]["step"] for number in range(len(TRIALS))]
    assert reached[2] < 10
    assert [reached[number] for number in (0, 1, 3, 4)] == [50, 20, 50, 50]


@pytest.mark.parametrize("number", [0, 3])
def test_a_trial_in_a_lane_learns_as_alone(
    number: int, side_by_side: tuple[Path, list[int], set[int]], tmp_path: Path
) -> None:
    """Also one that refills a lane, beside trials that are at other steps, end or diverge."""
    trainer(tmp_path, SharedPrograms(), None, **TRIALS[number]).train()
    alone, together = metrics(tmp_path), metrics(side_by_side[0] / str(number))
    assert len(alone) == len(together) == 55
    for one, other in zip(alone, together, strict=True):
        assert other == pytest.approx(one, rel=1e-5)


class Program:
    """Adds up what the lanes call it with."""

    def __init__(self, waits: bool) -> None:
        self.waits, self.seen = waits, list[dict[int, Any]]()

    def __call__(self, calls: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        self.seen.append(dict(calls))
        return {number: sum(arguments) for number, arguments in calls.items()}


def test_a_program_runs_once_all_lanes_have_come_to_it() -> None:
    """The one that waits runs after the others, and a lane that has ended is left out."""
    step, evaluation = Program(waits=True), Program(waits=False)
    found = list[Any]()

    def work(lane: Lane) -> None:
        found.append(lane.call(step, 10, lane.number))
        if lane.number == 1:
            found.append(lane.call(evaluation, 5))
        if lane.number:
            found.append(lane.call(step, 20, lane.number))

    run_lanes(3, work)
    assert step.seen == [{0: (10, 0), 1: (10, 1), 2: (10, 2)}, {1: (20, 1), 2: (20, 2)}]
    assert evaluation.seen == [{1: (5,)}]
    assert found == [10, 11, 12, 5, 21, 22]


def test_a_lane_that_fails_closes_the_others() -> None:
    step, closed = Program(waits=True), list[int]()

    def work(lane: Lane) -> None:
        try:
            for _ in range(lane.number + 1):
                lane.call(step, 1)
            raise UserError("The disk is full.")
        finally:
            closed.append(lane.number)

    with pytest.raises(UserError, match="The disk is full"):
        run_lanes(3, work)
    assert closed == [0, 1, 2]
    assert len(step.seen) == 1


def test_a_signal_ends_every_lane() -> None:
    step = Program(waits=True)

    def work(lane: Lane) -> None:
        for _ in range(9):
            lane.call(step, 1)
            if lane.number == 1 and lane.signals.received is None:
                os.kill(os.getpid(), signal.SIGTERM)
            if lane.signals.received:
                raise Interrupted(f"{lane.signals.received} at step 3.")

    with pytest.raises(Interrupted, match=r"SIGTERM: 3 trials were running\. .* last checkpoint"):
        run_lanes(3, work)
    assert len(step.seen) == 2


def test_a_signal_that_cuts_no_trial_short_still_ends_the_command() -> None:
    with pytest.raises(Interrupted, match="SIGTERM: no trial was running"):
        run_lanes(2, lambda lane: lane.number or os.kill(os.getpid(), signal.SIGTERM))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--vectorize some", "--vectorize must be a number of trials such as 8, or auto"),
        ("--vectorize 0", "--vectorize must be a number of trials"),
        ("--search optimizer=adamw,muon", "--search optimizer=adamw,muon changes it. Leave it out"),
        ("--search num_layers=2:4", "--search num_layers=2:4 changes it"),
        ("--search batch_size=8,16", "--search batch_size=8,16 changes it"),
        ("--search label_smoothing=0:0.1", "--search label_smoothing=0:0.1 changes it"),
        ("--search dropout=0:0.1", "dropout=0:0.1 changes it. Begin it above 0, or leave --vec"),
        ("--search scheduler=cosine,plateau", "Remove plateau from its values"),
        ("--optimizer_memory host", "--optimizer_memory host does not work with --vectorize"),
        ("--auto_batch", "--auto_batch does not work with --vectorize"),
        ("--gradient_accumulation_steps 2", "--gradient_accumulation_steps does not work"),
        ("--profile_steps 2:3", "--profile_steps does not work with --vectorize"),
        ("--logging_backend wandb", "--logging_backend wandb does not work with --vectorize"),
        ("", "--vectorize uses one device, but there are 8. Start the command once for each"),
    ],
)
def test_what_lanes_cannot_do_is_named_before_the_data_is_read(
    flags: str, sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    search = "" if "--search" in flags else "--search lr=1e-3:1e-2"
    lanes = "" if "--vectorize" in flags else "--vectorize 4"
    given = ["--output", str(tmp_path / "study"), *f"{lanes} {search} {flags}".split()]
    assert tune.main(given) == 2
    said = capfd.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_too_many_lanes_end_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The values of a trial are not the reason."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("A sentence.\n\n" * 500)
    sizes = {"hidden_dim": 16, "num_heads": 2, "num_kv_heads": 2, "num_layers": 1, "mlp_dim": 16}
    sizes |= {"max_tokens": 16, "batch_size": 8, "max_steps": 4, "eval_steps": 2}
    given = ["--model", "haiku", "--tokenizer", "bytes"]
    given += [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    given += ["--data", str(corpus), "--validation_fraction", "0.2", "--logging_backend", "none"]
    given += ["--output", str(tmp_path / "study"), "--search", "lr=0.1:0.2", "--vectorize", "2"]
    monkeypatch.setattr(lane_programs.jax, "device_count", lambda: 1)
    monkeypatch.setattr(lane_programs, "_lowered", Mock())
    monkeypatch.setattr(lane_programs, "step_memory", lambda _: Memory(1 << 33, 1 << 33))
    monkeypatch.setattr(lane_programs, "device_bytes", lambda: 1 << 33)
    assert tune.main(given) == 2
    said = capfd.readouterr().err
    assert "Trial 0: 2 trials side by side need 16.0 GiB, but a device has 8.0. Give a sm" in said
    journal = (tmp_path / "study" / "study" / "journal.log").read_text()
    assert '"failed"' not in journal


def test_an_adapter_is_refused() -> None:
    given = ["--checkpoint", "x", "--lora_rank", "4", "--search", "lr=1:2", "--vectorize", "2"]
    config, origins, _ = tune.read_arguments(given)
    with pytest.raises(UserError, match="--lora_rank does not work with --vectorize"):
        lane_programs.check_lanes(config, VariedRun.of((config, origins)))


def test_auto_doubles_the_lanes_while_it_pays() -> None:
    seconds = {1: 1.0, 2: 1.2, 4: 1.8, 8: 3.5}
    assert [lanes for lanes in seconds if pays(seconds, lanes)] == [1, 2, 4]


@pytest.mark.slow
def test_auto_measures_as_many_lanes_as_there_is_work_for(tmp_path: Path) -> None:
    trial = trainer(tmp_path, SharedPrograms(), None, **TRIALS[0])
    seconds = step_seconds(trial, most=3)
    assert set(seconds) <= {1, 2}
    assert all(value > 0 for value in seconds.values())


@pytest.mark.parametrize("ended", [19, 20, 21])
def test_auto_measures_nothing_if_no_two_trials_are_left(ended: int) -> None:
    trial = SimpleNamespace(state=SimpleNamespace(is_finished=lambda: True))
    study: Any = SimpleNamespace(study=SimpleNamespace(trials=[trial] * ended), limit=20)
    assert [Tuning._num_lanes(study, asked) for asked in ("auto", "8")] == [1, 1]


@pytest.mark.slow
def test_too_many_lanes_for_the_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_programs, "device_bytes", lambda: 1000)
    trial = trainer(tmp_path, SharedPrograms(), None, **TRIALS[0])
    with pytest.raises(UserError, match=r"A trial needs .* GiB, .* Lower --batch_size\."):
        step_seconds(trial, most=8)
    program, steps = trial.build().program, trial.total_steps
    numbers = placed(numbers_of(trial.run, steps), program.mesh)
    with pytest.raises(UserError, match=r"2 trials side by side need .* smaller number to --vec"):
        lanes_step(SharedPrograms(), program, trial.run, numbers, 2)
