"""The trackers of docs/callbacks.md, word for word, with the programs that they are for."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from documented_commands import FENCE, ROOT

from .conftest import TRACKED

# The packages warn of what they use themselves.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PAGE = (ROOT / "docs" / "callbacks.md").read_text(encoding="utf-8")
# The first start ends by a signal, after a checkpoint; the second one resumes.
STOP = """

class Stop:
    def on_step(self, run, values):
        import os, signal
        if values["step"] == 3 and run.resumed_from is None:
            os.kill(os.getpid(), signal.SIGTERM)
"""


def installed(module: str) -> Any:
    """A package that only one environment of CI has, as it brings many others."""
    if os.environ.get("CONSYN_TEST_TRACKERS") == "required":
        return importlib.import_module(module)
    return pytest.importorskip(module, reason=f"needs {module}")


def tracker(name: str) -> str:
    """The Python of a tracker on the page."""
    return next(m["text"] for m in FENCE.finditer(PAGE) if f"class {name}:" in m["text"])


def trained(here: Path, corpus: Path, name: str, **env: str) -> list[dict[str, Any]]:
    """The lines of a run in two starts."""
    (here / "my_trackers.py").write_text(tracker(name) + STOP)
    own = ["--logging_backend", f"my_trackers:{name}", "my_trackers:Stop"]
    command = [sys.executable, "-m", "consyn_jax.cli.train", *TRACKED, *own]
    command += ["--data", str(corpus), "--validation_fraction", "0.2", "--output", "run"]
    path = os.environ.get("PYTHONPATH", str(ROOT))
    for code in (75, 0):
        done = subprocess.run(
            command,
            cwd=here,
            env={**os.environ, "PYTHONPATH": path, **env},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert "switched off" not in done.stderr
    lines = map(json.loads, (here / "run" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "event" not in line]


def numbers(lines: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """What the page's trackers take of the lines: by name, the steps with their values."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if isinstance(value, float):
                found.setdefault(name, []).append((line["step"], value))
    return found


def test_mlflow(corpus: Path, tmp_path: Path) -> None:
    mlflow = installed("mlflow")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    lines = trained(tmp_path, corpus, "Mlflow", MLFLOW_TRACKING_URI=store)
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert run.data.params["max_steps"] == "6"
    for name, expected in numbers(lines).items():
        history = client.get_metric_history(run.info.run_id, name)
        assert sorted((each.step, each.value) for each in history) == sorted(expected), name
    files = {each.path for each in client.list_artifacts(run.info.run_id)}
    assert files == {"final", "report.html"}


def test_aim(corpus: Path, tmp_path: Path) -> None:
    aim = installed("aim")
    lines = trained(tmp_path, corpus, "Aim")
    (own,) = aim.Repo.from_path(str(tmp_path)).list_all_runs()
    run = aim.Run(own, repo=str(tmp_path))  # to read only, it would have to be in Aim's index
    assert run["config"]["max_steps"] == "6"
    found = {
        metric.name: sorted(metric.dataframe()[["step", "value"]].itertuples(index=False))
        for metric in run.metrics()
        if not metric.name.startswith("__system")
    }
    run.close()
    # Aim has one value for a step: of a line and an evaluation, the later one's time.
    expected = {name: sorted(dict(pairs).items()) for name, pairs in numbers(lines).items()}
    assert {*found} == {*expected}
    for name, pairs in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in pairs], name
        values = [value for _, value in found[name]]
        assert values == pytest.approx([value for _, value in pairs], rel=1e-6), name
