"""The callbacks of docs/callbacks.md, run as they stand there; MLflow and Aim are small fakes."""

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_trainer import STEPS, trainer

from consyn_jax.cli.train import main
from consyn_jax.errors import UserError
from consyn_jax.training.logging.metrics import read_metrics

PAGE = Path(__file__).parents[2] / "docs" / "callbacks.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def example(name: str) -> str:
    (block,) = (block for block in BLOCKS if f"class {name}:" in block)
    return block


def numbers(path: Path) -> list[tuple[str, int, float]]:
    """Every number of the log by name and step."""
    lines = [line for line in read_metrics(path / "metrics.jsonl") if "event" not in line]
    return sorted(
        (name, line["step"], value)
        for line in lines
        for name, value in line.items()
        if isinstance(value, float)
    )


class FakeMlflow(types.ModuleType):
    """The functions of MLflow that the example calls, as MLflow has them."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.runs: list[Any] = []
        self.active: Any = None

    def active_run(self) -> Any:
        return self.active

    def search_runs(self, filter_string: str, output_format: str) -> list[Any]:
        assert output_format == "list"
        match = re.fullmatch(r"tags\.consyn_run = '(\w+)'", filter_string)
        assert match is not None
        return [run for run in self.runs if run.tags["consyn_run"] == match[1]]

    def start_run(self, run_id: str | None = None, tags: dict[str, str] | None = None) -> None:
        assert self.active is None
        if run_id is None:
            self.active = types.SimpleNamespace(
                tags=tags, metrics=[], params={}, artifacts=[], status="RUNNING"
            )
            self.active.info = types.SimpleNamespace(run_id=str(len(self.runs)))
            self.runs.append(self.active)
        else:
            self.active = self.runs[int(run_id)]

    def log_params(self, params: dict[str, str]) -> None:
        assert not self.active.params, "MLflow refuses a parameter that changes"
        self.active.params = params

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        assert all(re.fullmatch(r"[\w\-. :/]+", name) for name in metrics)
        self.active.metrics += [(name, step, value) for name, value in metrics.items()]

    def log_artifacts(self, path: str, place: str) -> None:
        assert (Path(path) / "config.json").is_file()
        self.active.artifacts.append(place)

    def log_artifact(self, path: str) -> None:
        assert Path(path).is_file()
        self.active.artifacts.append(Path(path).name)

    def end_run(self, status: str) -> None:
        assert status in ("FINISHED", "KILLED")
        self.active.status, self.active = status, None


class FakeAim(types.ModuleType):
    """`aim.Run`, which refuses a hash that it has not given itself."""

    def __init__(self) -> None:
        super().__init__("aim")
        runs = self.runs = dict[str, Any]()

        class Run:
            def __init__(self, run_hash: str | None = None) -> None:
                assert run_hash is None or run_hash in runs
                self.hash = run_hash or f"hash{len(runs)}"
                self.kept = runs.setdefault(self.hash, {"metrics": [], "closed": 0})

            def __setitem__(self, key: str, value: Any) -> None:
                self.kept[key] = value

            def track(self, value: float, name: str, step: int) -> None:
                self.kept["metrics"].append((name, step, value))

            def close(self) -> None:
                self.kept["closed"] += 1

        self.Run = Run


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return fake


@pytest.fixture
def aim(monkeypatch: pytest.MonkeyPatch) -> FakeAim:
    fake = FakeAim()
    monkeypatch.setitem(sys.modules, "aim", fake)
    return fake


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the examples in my_trackers.py."""
    (tmp_path / "my_trackers.py").write_text(example("Mlflow") + example("Aim"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    sys.modules.pop("my_trackers", None)


def test_mlflow_and_aim_have_one_run_for_a_run_and_its_resume(
    here: Path, mlflow: FakeMlflow, aim: FakeAim, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"scheduler": "constant"}
    named = {"logging_backend": ["my_trackers:Mlflow", "my_trackers:Aim"]}
    trainer(here / "run", max_steps=5, **named, **settings).train()
    longer = {"max_steps": 7, "overwrite_schedule": True}
    trainer(here / "run", **longer, **named, **settings).train()
    assert "warning" not in capfd.readouterr().err
    (theirs,) = mlflow.runs
    expected = numbers(here / "run")
    assert sorted(theirs.metrics) == expected
    assert {step for _, step, _ in expected} == set(range(1, 8))
    assert theirs.params["lr"] == "0.003"
    assert theirs.artifacts == ["final", "report.html"] * 2
    assert (theirs.status, mlflow.active) == ("FINISHED", None)
    ((_, tracked),) = aim.runs.items()
    assert sorted(tracked["metrics"]) == expected
    assert (tracked["closed"], tracked["config"]["lr"]) == (2, "0.003")


def test_stop_below_ends_a_run(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(example("StopBelow").replace("1.5", "100"), names)
    run = trainer(tmp_path / "run", callbacks=[names["StopBelow"]()])
    assert run.train()["step"] == 4 < STEPS
    assert [line["by"] for line in run.history if line.get("event") == "stop"] == ["StopBelow"]


def test_the_template_is_a_callback(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(example("Watch"), names)
    trainer(tmp_path / "run", callbacks=[names["Watch"]()])
    with pytest.raises(UserError, match="is the class Watch"):
        trainer(tmp_path / "run", callbacks=[names["Watch"]])


def test_a_wrong_class_ends_the_command_before_slow_work(
    here: Path, mlflow: FakeMlflow, aim: FakeAim, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", "no/such/data", "--output", str(here / "run"), "--logging_backend"]
    assert main([*words, "my_trackers:Mlfow"]) == 2
    said = capfd.readouterr().err
    assert said == (
        f"consyn-train: --logging_backend my_trackers:Mlfow: {here / 'my_trackers.py'} has no class "
        "Mlfow; did you mean Mlflow?\n"
    )
    (here / "recipe.yaml").write_text("logging_backend: [my_trackers:Mlflow]\n")
    sys.modules.pop("my_trackers")
    assert main([*words[:-1], "--config", "recipe.yaml"]) == 2
    assert "a class named only in a file is not imported" in capfd.readouterr().err
    assert "my_trackers" not in sys.modules
    assert main([*words, "none", "wandb"]) == 2
    assert "--logging_backend none wandb: 'none' turns off all trackers" in capfd.readouterr().err
    assert main([*words, "tensorbord"]) == 2
    assert "did you mean tensorboard?" in capfd.readouterr().err
