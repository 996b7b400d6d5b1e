"""TensorBoard and Weights & Biases as callbacks of a run."""

import json
import math
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tensorboard_files import read_back, tensorboard_events, texts

from consyn_jax.training.logging.metrics import MetricsLog, read_metrics
from consyn_jax.training.logging.tracking.callbacks import Callbacks, RunView
from consyn_jax.training.logging.tracking.trackers import evaluations, tracker_makers
from consyn_jax.training.logging.tracking.wandb_rows import _records, _values


def begin(
    backend: str,
    directory: Path,
    warn: Callable[[str], None] = pytest.fail,
    resume_step: int | None = None,
    **more: Any,
) -> Callbacks:
    """The trackers of a run in `directory`."""
    config = {"lr": 1e-3}
    run = RunView(directory, "id", config, 9, resume_step)
    about = {"project": "p", "config": config, "resume_step": resume_step, "warn": warn, **more}
    return Callbacks(tracker_makers([backend], directory=directory, **about), run, warn)


def test_the_names_of_the_flag(tmp_path: Path) -> None:
    for backend, names in {
        "tensorboard": ["TensorBoard"],
        "wandb": ["Weights & Biases"],
        "both": ["TensorBoard", "Weights & Biases"],
        "none": [],
        "mine:Tracker": [],
    }.items():
        made = tracker_makers([backend], directory=tmp_path, project="p", warn=pytest.fail)
        assert [name for name, _ in made] == names
    assert not list(tmp_path.iterdir())


def test_a_table_of_evaluations() -> None:
    history = [
        {"step": 1, "tokens": 5, "train/loss": 2.0},
        {"step": 2, "tokens": 10, "eval/loss": 3.0},
        {"step": 2, "tokens": 10, "event": "best", "eval/loss": 3.0},
        {"step": 4, "tokens": 20, "eval/loss": 2.0, "eval/accuracy": 0.5},
    ]
    columns, rows = evaluations(history)
    assert columns == ["step", "tokens", "eval/loss", "eval/accuracy"]
    assert rows == [[2, 10, 3.0, None], [4, 20, 2.0, 0.5]]


class TestTensorBoard:
    def test_events_are_on_disk_at_once_and_can_be_read(self, tmp_path: Path) -> None:
        trackers = begin("tensorboard", tmp_path)
        assert not list(tmp_path.iterdir()), "nothing is imported before the first step"
        trackers.run.samples = [{"step": 7, "tokens": 70, "text": "To be\n# or not"}]
        trackers.step({"step": 7, "tokens": 70, "train/loss": 2.5, "eval/loss": math.nan})
        (path,) = (tmp_path / "logs").iterdir()
        assert path.name.startswith("events.out.tfevents.")
        version, config, scalars, sample = tensorboard_events(path)
        assert version.file_version == "brain.Event:2"
        assert config.summary.value[0].tensor.string_val[0].endswith(b"| lr | 0.001 |")
        assert scalars.step == 7
        assert [value.tag for value in scalars.summary.value] == [
            "tokens",
            "train/loss",
            "eval/loss",
        ]
        assert scalars.summary.value[1].simple_value == 2.5
        assert math.isnan(scalars.summary.value[2].simple_value)
        assert sample.summary.value[0].tensor.string_val[0] == b"    To be\n    # or not"
        trackers.evaluate({"step": 7, "eval/accuracy": 0.5})
        assert len(tensorboard_events(path)) == 5, "a sample is written once"
        trackers.end("complete")

    def test_a_resume_writes_a_new_file_that_purges_later_steps(self, tmp_path: Path) -> None:
        for resume_step in (None, 5, 5):
            trackers = begin("tensorboard", tmp_path, resume_step=resume_step)
            trackers.run.samples = [{"step": 5, "tokens": 1, "text": "five"}]
            with MetricsLog(tmp_path) as log:
                trackers.step(log.write(6, 48, {"eval/loss": 1.5}))
            trackers.end("complete")
        files = sorted((tmp_path / "logs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        assert len(files) == 3
        first, second, third = map(tensorboard_events, files)
        assert len(first) == 5
        for events in (second, third):
            assert len(events) == 4, "config and sample were written by the first start"
            assert (events[1].step, events[1].session_log.status) == (
                6,
                1,
            )  # SessionLog.START: forget from step 6 on
        assert read_back(tmp_path / "logs")["eval/loss"] == {6: 1.5}
        found = texts(tmp_path / "logs")
        assert found["sample"] == ["    five"]
        assert len(found["config"]) == 1
        assert found["evaluations"][0].splitlines()[-1] == "| 6 | 48 | 1.5 |"

    def test_a_directory_that_cannot_be_written_is_a_warning(self, tmp_path: Path) -> None:
        (tmp_path / "logs").write_text("in the way")
        warnings: list[str] = []
        trackers = begin("tensorboard", tmp_path, warnings.append)
        trackers.step({"step": 1, "a": 1.0})
        trackers.evaluate({"step": 1, "eval/loss": 1.0})
        trackers.end("complete")
        assert len(warnings) == 1
        assert warnings[0].startswith("TensorBoard.on_step raised FileExistsError")
        assert "switched off; the run and metrics.jsonl are not affected." in warnings[0]


WANDB = """if True:
    import json, os, signal, sys
    from pathlib import Path
    from consyn_jax.training.logging.metrics import MetricsLog
    from consyn_jax.training.logging.tracking.callbacks import Callbacks, RunView
    from consyn_jax.training.logging.tracking.trackers import tracker_makers
    order = json.loads(sys.argv[1])
    directory, warnings, ids = Path(order["directory"]), [], []
    resumed, run_id = order.get("resume_step"), order.get("run_id")
    config = {"lr": 1e-3, "resume": "auto", "overwrite_schedule": order.get("other", False)}
    run = RunView(directory, "id", config, 9, resumed)
    run.samples = [{"step": 1, "tokens": 8, "text": "<b>To be</b>"}]
    about = {"project": "p", "run_name": "name", "config": config, "run_id": run_id, "resume_step": resumed}
    made = tracker_makers(["wandb"], directory=directory, **about, keep_id=ids.append, warn=warnings.append)
    with MetricsLog(directory) as log:
        log.truncate_from(-1 if resumed is None else resumed)
        trackers = Callbacks(made, run, warnings.append)
        print(ids[0], flush=True)
        for step in order["steps"]:
            trackers.step(log.write(step, 8 * step, {"train/loss": 2.5 / step}))
            if step % 3 == 0:
                trackers.evaluate(log.write(step, 8 * step, {"eval/loss": 3.0 / step}))
        if order.get("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        (directory / "report.html").write_text("<p>the page")
        trackers.end("complete")
    print(len(warnings), *warnings)
"""


def offline_files(directory: Path) -> list[Path]:
    return sorted((directory / "wandb").glob("offline-run-*/run-*.wandb"))


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the history in a file of Weights & Biases."""
    return [row for record in _records(path.read_bytes()) if (row := _values(record))]


class TestWandb:
    def run(self, directory: Path, environment: dict[str, str], **order: Any) -> list[str]:
        """What a start prints: the id of the run, and the number of warnings with them."""
        keep = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        own = {"HOME": str(directory), "WANDB__DISABLE_STATS": "true"}
        own["WANDB__SERVICE_WAIT"] = "240"  # seconds for its process to start
        done = subprocess.run(
            [sys.executable, "-c", WANDB, json.dumps({"directory": str(directory), **order})],
            env={**keep, **own, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert done.returncode == (-signal.SIGKILL if order.get("killed") else 0), done.stderr
        return done.stdout.splitlines()

    @pytest.mark.slow
    @pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
    def test_an_offline_run_and_its_resume_are_one_run_without_lost_or_repeated_rows(
        self, killed: bool, tmp_path: Path
    ) -> None:
        offline = {"WANDB_MODE": "offline"}
        steps = list(range(1, 400))  # more than wandb keeps in memory
        run_id, *said = self.run(tmp_path, offline, steps=steps, killed=killed)
        assert said == ([] if killed else ["0"])
        (first,) = offline_files(tmp_path)
        assert first.name == f"run-{run_id}.wandb"
        assert len(rows(first)) > 0, "some rows survive a kill"
        if killed:  # how many depends on the moment
            first.write_bytes(first.read_bytes()[:40_000])
            assert 10 < len(rows(first)) < 400
        again = {"run_id": run_id, "resume_step": 395, "steps": list(range(396, 403))}
        assert self.run(tmp_path, offline, **again) == [run_id, "0"]
        files = offline_files(tmp_path)
        assert [path.name for path in files] == [first.name] * 2
        found = [row for path in files for row in rows(path) if "tokens" in row]
        lines = read_metrics(tmp_path / "metrics.jsonl")
        ours, theirs = (
            sorted((row["step"], "eval/loss" in row, row["tokens"]) for row in each)
            for each in (found, lines)
        )
        assert ours == theirs
        others = [row for path in files for row in rows(path) if "tokens" not in row]
        assert sum("sample._type" in row for row in others) == 1
        tables = [row for row in others if "evaluations._type" in row]
        assert len(tables) == (1 if killed else 2)
        assert tables[-1]["evaluations.nrows"] == 402 // 3
        assert [
            b"&lt;b&gt;To be" in page.read_bytes() for page in tmp_path.rglob("media/html/*.html")
        ] == [True]
        kinds = [record for record in _records(files[-1].read_bytes()) if b"report-" in record]
        assert kinds, "the page is an artifact"

    def test_a_resume_of_an_online_run_begins_after_what_was_uploaded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        logged: list[dict[str, Any]] = []

        class OnlineRun:
            id, offline, dir = "abc", False, str(tmp_path / "wandb" / "run-1-abc" / "files")
            summary: ClassVar = {"step": 7}

            def define_metric(self, name: str, step_metric: str) -> None: ...

            def log(self, row: dict[str, Any]) -> None:
                logged.append(row)

        fake = types.ModuleType("wandb")
        given: dict[str, Any] = {}
        fake.init = lambda **more: given.update(more) or OnlineRun()  # type: ignore[attr-defined]
        fake.Settings = dict  # type: ignore[attr-defined]
        fake.errors = types.SimpleNamespace(Error=OSError)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "wandb", fake)
        with MetricsLog(tmp_path) as log:
            for step in range(1, 7):
                log.write(step, 8 * step, {"train/loss": 1.0})
        for changed, steps in ((False, [8, 9]), (True, [7, 8, 9])):
            logged.clear()
            config = {"resume": "auto", "overwrite_schedule": changed}
            trackers = begin("wandb", tmp_path, resume_step=6, run_id="abc", config=config)
            assert (given["id"], given["resume"]) == ("abc", "allow")
            for step in (7, 8, 9):
                trackers.step({"step": step, "tokens": 8 * step, "train/loss": 1.0})
            assert [row["step"] for row in logged] == steps

    @pytest.mark.slow
    def test_a_resume_with_another_schedule_writes_its_own_rows(self, tmp_path: Path) -> None:
        offline = {"WANDB_MODE": "offline"}
        run_id, _ = self.run(tmp_path, offline, steps=list(range(1, 9)))
        again = {"run_id": run_id, "resume_step": 5, "steps": [6, 7, 8, 9], "other": True}
        self.run(tmp_path, offline, **again)
        second = [row["step"] for row in rows(offline_files(tmp_path)[1]) if "tokens" in row]
        assert second == [6, 6, 7, 8, 9, 9]

    def test_without_a_key_the_run_is_kept_offline_with_a_warning(self, tmp_path: Path) -> None:
        *_, said = self.run(tmp_path, {}, steps=[1])
        assert said.startswith("1 Weights & Biases: ")
        assert "wandb sync" in said
        assert offline_files(tmp_path)
