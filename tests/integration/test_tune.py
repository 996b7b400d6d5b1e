"""`consyn-tune` as people run it: trials that share one program, kills, several processes."""

import gc
import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import pytest

from consyn_jax.cli import train, tune
from consyn_jax.errors import UserError
from consyn_jax.flags import flat
from consyn_jax.training import ConsynTrainer
from consyn_jax.training.runtime.memory import OutOfMemory, StepTooLarge
from consyn_jax.tuning.study_identity import mark_trial
from consyn_jax.tuning.trial_run import TrialRun, end_trial
from consyn_jax.tuning.trial_trainer import TrialTrainer

from .conftest import TINY
from .nursery import Nursery

if not os.environ.get("CI"):  # where the extra must be installed
    pytest.importorskip("optuna", reason="needs the extra tune")

SEARCH = [
    "--search",
    "lr=1e-3:1e-1:log",
    "weight_decay=0:0.3",
    "beta2=0.9:0.99",
    "warmup_steps=0:3",
]
SEARCH += ["seed=1:99", "dropout=0.05:0.2", "max_grad_norm=0.5:2"]
SEARCH += ["label_smoothing=0.01:0.2", "z_loss=0.0001:0.001"]
STEP_2 = '{"step": 2, "tokens": 1, "time_s": 1.0, "train/loss": 1.0}\n'
COMPILED = "/jax/core/compile/backend_compile_duration"


def flags(corpus: Path, output: Path, *more: object) -> list[str]:
    given = [*TINY, "--validation_fraction", "0.2", "--data", corpus, "--output", output]
    search = [] if "--search" in more else SEARCH
    return [str(word) for word in [*given, "--sampler", "random", *search, *more]]


def trials(output: Path) -> dict[int, str]:
    """The state of each trial in the journal, as Optuna reads it."""
    import optuna

    file = str(output / "study" / "journal.log")
    backend = optuna.storages.journal.JournalFileBackend(file)
    storage = optuna.storages.JournalStorage(backend)
    study = optuna.load_study(study_name="consyn", storage=storage)
    return {trial.number: trial.state.name for trial in study.trials}


def metrics(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" not in line]


def test_trials_share_a_program_and_the_recipe_repeats_the_best(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No trial leaves arrays on the device for the next one, however late Python collects garbage."""
    compiled: Counter[int] = Counter()
    now, arrays = [-1], list[int]()

    def count(event: str, *_: Any, **__: Any) -> None:
        compiled[now[0]] += event == COMPILED

    whole = TrialRun.run

    def counted(self: TrialRun) -> str:
        now[0] = self.claim.number
        arrays.append(sum(array.nbytes for array in jax.live_arrays()))
        return whole(self)

    monkeypatch.setattr(TrialRun, "run", counted)
    jax.monitoring.register_event_duration_secs_listener(count)
    gc.disable()
    try:
        output = tmp_path / "study"
        assert tune.main(flags(corpus, output, "--trials", 4, "--pruner", "none")) == 0
    finally:
        gc.enable()
        jax.monitoring.unregister_event_duration_listener(count)
    assert compiled[0] > 0
    assert arrays[3] <= arrays[1]
    assert {number: compiled[number] for number in (1, 2, 3)} == {1: 0, 2: 0, 3: 0}
    said = capfd.readouterr()
    assert said.out.splitlines()[0].split()[:3] == ["trial", "eval/loss", "lr"]
    assert len(said.out.splitlines()) == 5
    assert f"consyn-train --config {output / 'recipe.yaml'}" in said.err
    assert trials(output) == dict.fromkeys(range(4), "COMPLETE")
    assert "<circle" in (output / "study.html").read_text()
    left = {path.name for path in (output / "trials" / "0000").iterdir()}
    assert left.isdisjoint({"checkpoints", "best", "final", "samples.jsonl"})
    assert "metrics.jsonl" in left

    best = int(said.out.splitlines()[1].split()[0])
    assert train.main(["--config", str(output / "recipe.yaml")]) == 0
    trained = output / f"best-{best:04}"
    assert (trained / "final" / "model.safetensors").exists()
    alone, together = metrics(trained), metrics(output / "trials" / f"{best:04}")
    assert len(alone) == len(together)
    for one, other in zip(alone, together, strict=True):
        for name in {"train/loss", "eval/loss", "train/learning_rate"} & one.keys():
            assert other[name] == pytest.approx(one[name], rel=1e-5)

    # The same command has nothing left to do, and more trials go on.
    assert tune.main(flags(corpus, output, "--trials", 4, "--pruner", "none")) == 0
    assert len(trials(output)) == 4
    refused_beside_the_study(corpus, output, capfd)


def refused_beside_the_study(corpus: Path, output: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing else gets into the study's directory, or takes its trials for results."""

    def said(code: int) -> str:
        assert code == 2
        text = capfd.readouterr().err
        assert text.count("\n") == 1, "refused before the header"
        return text

    capfd.readouterr()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    plain = [*TINY, "--data", str(corpus), "--output", str(output)]
    assert "contains a study of consyn-tune" in said(train.main(plain))
    plain[-1] = str(output / "trials" / "0000")
    assert "has a trial of a study" in said(train.main(plain))
    url = f"sqlite:///{output}.db"
    assert f"the storage given is {url}" in said(tune.main(flags(corpus, output, "--storage", url)))
    again = ["--config", str(output / "recipe.yaml"), "--search", "lr=1e-3:1e-2"]
    again += ["--output", str(output / "best-0099")]  # as in a recipe that nobody trained yet
    assert f"is inside {output}, which contains a study" in said(tune.main(again))
    after = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    assert after == before
    shutil.rmtree(output / "study")
    other = flags(corpus, output, "--search", "lr=1e-5:1e-4")
    assert "has trials of another study" in said(tune.main(other))


@pytest.mark.slow
def test_a_study_in_which_every_trial_diverges_says_so(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "study"
    search = ["--search", "lr=1e5:1e6", "--trials", 1, "--pruner", "none", "--hidden_dim", 16]
    assert tune.main(flags(corpus, output, *search)) == 3
    said = capfd.readouterr().err
    assert f"Everything is in {output}: study.html, trials/.\n" in said
    assert "is done: 1 diverged. Lower the ranges (lr=100000:1e+06)" in said
    assert "Next:" not in said


def test_a_wrong_class_is_refused_before_the_data_is_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", "no/such/data", "--output", str(tmp_path / "study")]
    given += ["--search", "lr=1e-3:1e-2", "--logging_backend", "nosuch:Class"]
    assert tune.main(given) == 2
    assert "there is no module nosuch" in capfd.readouterr().err


def test_a_mistake_that_only_the_data_shows_comes_before_the_first_trial(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "study"
    for more, sentence in (
        (["--eval_steps", 6], "Lower --eval_steps, or use --pruner none"),
        (
            ["--search", "warmup_steps=1:7", "--max_steps", 9, "--epochs", 0.5],
            "with --warmup_steps 7 is refused: Warm-up of 7 steps is longer",
        ),
    ):
        assert tune.main(flags(corpus, output, *more)) == 2
        assert sentence in capfd.readouterr().err
        assert not (output / "trials").exists()
    output.mkdir(exist_ok=True)
    (output / "metrics.jsonl").write_text("")
    assert tune.main(flags(corpus, output)) == 2
    assert "contains a run of consyn-train" in capfd.readouterr().err


def test_the_header_names_what_is_compiled_again_and_what_a_search_replaces(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(self: TrialRun) -> str:
        self.claim.trial.set_user_attr("outcome", "done")
        self.study.tell(self.claim, 1.0)
        return "done"

    monkeypatch.setattr(TrialRun, "run", end)
    (tmp_path / "recipe.yaml").write_text("lr: 0.001\n")
    given = [*TINY, "--validation_fraction", "0.2", "--data", corpus, "--output", tmp_path / "a"]
    given += ["--config", tmp_path / "recipe.yaml", "--search", "lr=0.1,0.2", "qk_norm=true,false"]
    assert tune.main([*map(str, given), "--trials", "9"]) == 0
    said = capfd.readouterr().err
    assert re.search(r"compiled +again for each value of qk_norm\n", said)
    assert re.search(r"replaced +by --search in --config: lr\n", said)
    assert re.search(r"trials +4, one for each point of the search space; 0 so far\n", said)
    ranges = [*map(str, given[:-6]), str(tmp_path / "c"), "--time_budget", "0.001s"]
    assert tune.main([*ranges, "--search", "dropout=0:0.3", "z_loss=0.1:0.2"]) == 2
    said = capfd.readouterr().err
    assert re.search(r"trials +no limit; 0 so far\n", said)
    assert re.search(r"compiled +once more for dropout 0\n", said)
    assert "--total_tokens" not in said
    ranges[ranges.index(str(tmp_path / "c"))] = str(tmp_path / "d")
    assert tune.main([*ranges, "--search", "gradient_accumulation_steps=1,2"]) == 2
    said = capfd.readouterr().err
    assert re.search(r"tokens +more in trials with a larger gradient_accumulation_steps, ", said)
    requests = [*map(str, given[:-6]), str(tmp_path / "b"), "--search", "lr=0.1,0.2"]
    assert tune.main([*requests, "--eval_requests", "nofile.jsonl"]) == 2
    assert "nofile.jsonl in --eval_requests does not exist" in capfd.readouterr().err


class Faults:
    """Trials of one flag that end at once: done, or with the error for their value (0: for all)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, start: list[str]) -> None:
        self.start, self.building = start, dict[int, UserError]()
        self.training, self.search = dict[int, UserError](), "seed=1:99"
        self.begun = set[int]()  # values of trials that take a step before their error
        plain, faults = TrialTrainer.build, self

        def build(self: TrialTrainer, *schedule: Any) -> Any:
            faults._raise(faults.building, flat(self.run)[faults.flag])
            return plain(self, *schedule)

        def train(self: TrialRun) -> str:
            mark_trial(self.path, self.study.identity, self.claim.values)
            if self.claim.values[faults.flag] in faults.begun:
                (self.path / "metrics.jsonl").write_text(STEP_2)
            faults._raise(faults.training, self.claim.values[faults.flag])
            end_trial(self.study, self.claim, self.path, 1.0, {"outcome": "done"})
            return "done"

        monkeypatch.setattr(TrialTrainer, "build", build)
        monkeypatch.setattr(TrialRun, "run", train)

    def _raise(self, errors: dict[int, UserError], value: int) -> None:
        if (error := errors.get(0, errors.get(value))) is not None:
            raise error

    @property
    def flag(self) -> str:
        return self.search.partition("=")[0]

    def tune(self, output: Path, *more: str) -> int:
        given = [*self.start, "--output", str(output), "--search", self.search]
        return tune.main([*given, *more])


@pytest.fixture
def faults(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Faults:
    given = [*TINY, "--validation_fraction", "0.2", "--data", str(corpus)]
    return Faults(monkeypatch, [*given, "--sampler", "random"])


@pytest.mark.slow
def test_a_trial_whose_values_are_refused_fails_and_the_study_goes_on(
    faults: Faults, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With an error that only the trial itself shows."""
    faults.search = "gradient_accumulation_steps=1:12"
    faults.building = {number: UserError(f"No {number}.") for number in (1, 5, 9)}
    faults.training = {number: StepTooLarge(f"No room for {number}.") for number in (3, 7)}
    faults.training |= {number: OutOfMemory(f"No memory for {number}.") for number in (10, 11)}
    faults.begun = {11}
    output = tmp_path / "a"
    assert faults.tune(output, "--trials", "99") == 0
    said = capfd.readouterr()
    assert "steps 1: no value, failed: No 1." in said.err
    assert "steps 3: no value, failed: No room for 3." in said.err
    assert "steps 10: no value, failed: No memory for 10." in said.err
    assert "steps 11: no value, failed: No memory for 11." in said.err
    assert "The search space has 12 points, and all have been tried." in said.err
    assert "5 done, 7 failed" in (output / "study.html").read_text()
    faults.search = "seed=1:99"
    # A study does not lose all its trials to one fault, also if others are done.
    faults.building[0] = UserError("No seed.")
    assert faults.tune(tmp_path / "b") == 2
    assert "All 5 trials failed, the last one because: No seed." in capfd.readouterr().err
    assert trials(tmp_path / "b") == dict.fromkeys(range(5), "PRUNED")
    del faults.building[0]
    assert faults.tune(tmp_path / "b", "--trials", "7") == 0
    faults.building[0] = UserError("No seed.")
    assert faults.tune(tmp_path / "b", "--time_budget", "1h") == 2
    assert "5 trials in a row failed, the last one because: No seed." in capfd.readouterr().err
    assert len(trials(tmp_path / "b")) == 12
    # A finished study has nothing to go on with.
    assert faults.tune(tmp_path / "b", "--trials", "17") == 0
    assert "in a row" not in capfd.readouterr().err
    assert len(trials(tmp_path / "b")) == 17


def test_first_values_that_are_refused_end_no_study_of_others(
    faults: Faults,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = ConsynTrainer.build

    def build(self: ConsynTrainer, *schedule: Any) -> Any:
        faults._raise(faults.building, self.run.budget.gradient_accumulation_steps)
        return plain(self, *schedule)

    monkeypatch.setattr(ConsynTrainer, "build", build)
    faults.search = "gradient_accumulation_steps=1,2"
    faults.building = {number: UserError(f"No {number}.") for number in (1, 2)}
    assert faults.tune(tmp_path / "study") == 2
    assert capfd.readouterr().err == (
        "consyn-tune: A trial of --search with --gradient_accumulation_steps 1 is refused: No 1.\n"
    )
    assert not (tmp_path / "study" / "study").exists()
    del faults.building[2]
    assert faults.tune(tmp_path / "study") == 0
    assert "gradient_accumulation_steps 1: no value, failed: No 1." in capfd.readouterr().err
    faults.building = {0: UserError("No mesh fits.")}  # whatever the values are
    assert faults.tune(tmp_path / "other") == 2
    assert capfd.readouterr().err == "consyn-tune: No mesh fits.\n"


def test_a_fault_that_is_not_of_the_values_ends_the_command_and_no_trial(
    faults: Faults, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "study"

    def ends_with(sentence: str) -> None:
        assert faults.tune(output) == 2
        assert capfd.readouterr().err.splitlines()[-1] == f"consyn-tune: Trial 0: {sentence}"
        assert trials(output) == {0: "RUNNING"}

    faults.training[0] = OutOfMemory("A device ran out of memory.")
    ends_with("A device ran out of memory.")
    faults.training[0] = UserError("--output is now used by another process.")
    ends_with("--output is now used by another process.")
    faults.training[0] = UserError("Run the same command again.")
    assert faults.tune(output, "--overwrite") == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said == "consyn-tune: Trial 0: Run the same command again without --overwrite."
    faults.training[0] = StepTooLarge("All trials need 9 GiB.")
    ends_with("All trials need 9 GiB.")
    faults.building[0] = UserError("A file is missing.")
    faults.building[0].__cause__ = OSError("no such file")
    ends_with("A file is missing.")
    # An earlier process has trained this trial: a smaller machine must not lose it.
    log = output / "trials" / "0000" / "metrics.jsonl"
    (log.parent / "checkpoints" / "2").mkdir(parents=True)
    log.write_text(STEP_2)
    faults.building[0] = StepTooLarge("The train step needs 9 GiB.")
    ends_with("The train step needs 9 GiB.")
    assert (log.parent / "checkpoints" / "2").exists()


def test_a_machine_that_cannot_train_at_all_begins_no_trial(
    faults: Faults,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ConsynTrainer, "build", Mock(side_effect=UserError("No mesh fits.")))
    assert faults.tune(tmp_path / "study") == 2
    assert capfd.readouterr().err == "consyn-tune: No mesh fits.\n"
    assert not (tmp_path / "study" / "study").exists()


@pytest.mark.slow
@pytest.mark.long
def test_kills_and_two_processes_lose_and_repeat_no_trial(
    corpus: Path,
    tmp_path: Path,
    nursery: Nursery,
) -> None:
    """Five kills, at moments from the first claim to the last trial."""
    output, total = tmp_path / "study", 10
    given = flags(corpus, output, "--trials", total, "--save_steps", 2, "--pruner", "none")
    for done in range(0, total, 2):
        process = nursery.start(*given, command="tune", devices=1)
        log = output / "trials" / f"{done:04}" / "metrics.jsonl"
        while not log.exists() and process.alive:
            time.sleep(0.01)
        time.sleep(0.013 * done)
        if process.alive:
            process.signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        seen = trials(output)
        assert sorted(seen) == list(range(len(seen)))
        assert Counter(seen.values())["RUNNING"] <= 1
    both = [nursery.start(*given, command="tune", devices=1) for _ in range(2)]
    assert [process.wait(600) for process in both] == [0, 0], [child.said for child in both]
    assert trials(output) == dict.fromkeys(range(total), "COMPLETE")
    names = sorted(path.name for path in (output / "trials").iterdir())
    assert names == [f"{number:04}" for number in range(total)]
    for name in names:
        steps = [line["step"] for line in metrics(output / "trials" / name) if "train/loss" in line]
        assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_lanes_that_are_killed_lose_and_repeat_no_trial(
    corpus: Path,
    tmp_path: Path,
    nursery: Nursery,
) -> None:
    """Kills, a signal, and two processes, each with three lanes."""
    output, total = tmp_path / "study", 8
    given = flags(corpus, output, "--trials", total, "--save_steps", 2, "--pruner", "none")
    given += ["--vectorize", "3"]
    for kind, seen, delay_s in (
        (signal.SIGKILL, 3, 0.0),
        (signal.SIGKILL, 3, 0.4),
        (signal.SIGTERM, 5, 0.0),
    ):
        process = nursery.start(*given, command="tune", devices=1)
        log = output / "trials" / f"{seen - 1:04}" / "metrics.jsonl"
        while process.alive and not (log.exists() and "train/loss" in log.read_text()):
            time.sleep(0.01)
        time.sleep(delay_s)
        if process.alive:
            process.signal(kind)
            code = process.wait()
            assert code in ({-kind} if kind == signal.SIGKILL else {75, 143, 0}), process.said
        found = trials(output)
        assert sorted(found) == list(range(len(found)))
        assert Counter(found.values())["RUNNING"] <= 3
    both = [nursery.start(*given, command="tune", devices=1) for _ in range(2)]
    assert [process.wait(600) for process in both] == [0, 0], [child.said for child in both]
    assert trials(output) == dict.fromkeys(range(total), "COMPLETE")
    for number in range(total):
        lines = metrics(output / "trials" / f"{number:04}")
        assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_signal_saves_every_lane_and_the_same_command_goes_on(
    corpus: Path,
    tmp_path: Path,
    nursery: Nursery,
) -> None:
    """With another number of lanes, too."""
    output = tmp_path / "study"
    given = flags(corpus, output, "--trials", 3, "--max_steps", 60, "--eval_steps", 30)
    process = nursery.start(*given, "--vectorize", 3, command="tune", devices=1)
    logs = [output / "trials" / f"{number:04}" / "metrics.jsonl" for number in range(3)]
    while not logs[2].exists() or "train/loss" not in logs[2].read_text():
        assert process.alive, process.said
        time.sleep(0.02)
    process.signal(signal.SIGTERM)
    assert process.wait() == 75, process.said
    assert "SIGTERM: 3 trials were running" in process.said
    assert trials(output) == dict.fromkeys(range(3), "RUNNING")
    again = nursery.start(*given, "--vectorize", "auto", command="tune", devices=1)
    assert again.wait(600) == 0, again.said
    assert "Trials side by side: " in again.said
    assert trials(output) == dict.fromkeys(range(3), "COMPLETE")
    assert all("resume" in log.read_text() for log in logs)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_signal_saves_the_trial_and_the_same_command_goes_on(
    corpus: Path,
    tmp_path: Path,
    nursery: Nursery,
) -> None:
    output = tmp_path / "study"
    given = flags(corpus, output, "--trials", 1, "--max_steps", 150, "--eval_steps", 75)
    process = nursery.start(*given, command="tune", devices=1)
    log = output / "trials" / "0000" / "metrics.jsonl"
    while not log.exists() or "train/loss" not in log.read_text():
        assert process.alive, process.said
        time.sleep(0.02)
    process.signal(signal.SIGTERM)
    assert process.wait() == 75, process.said
    assert re.search(r"SIGTERM at step \d+: the state is saved", process.said)
    assert trials(output) == {0: "RUNNING"}
    again = nursery.start(*given, command="tune", devices=1)
    assert again.wait(600) == 0, again.said
    assert trials(output) == {0: "COMPLETE"}
    assert "resume" in log.read_text()


@pytest.mark.slow
def test_a_first_batch_that_the_devices_do_not_divide_fails_its_trial_only(
    faults: Faults, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    faults.search, output = "batch_size=12,8", tmp_path / "study"
    at = faults.start.index("--batch_size")
    del faults.start[at : at + 2]
    assert faults.tune(output, "--mesh", "fsdp=8", "--sampler", "grid") == 0
    assert "12 " in capfd.readouterr().err
    assert sorted(trials(output).values()) == ["COMPLETE", "PRUNED"]
