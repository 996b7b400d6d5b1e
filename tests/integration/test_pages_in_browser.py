"""Every page in a real browser: nothing overlaps, is cut off, asks the network or is said on the
console, and the curves are the numbers of metrics.jsonl."""

import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consyn_jax.cli import evaluate, report
from consyn_jax.tuning.search_space import Dimension
from consyn_jax.tuning.study_page import study_page
from consyn_jax.tuning.study_results import StudyResults, TrialResult

from .conftest import MODEL, Run, cannot_run, start

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from browser import Browser, program
from page_geometry import faults

pytestmark = pytest.mark.slow

FLAGS: list[object] = [*MODEL, "--max_tokens", 32, "--batch_size", 8, "--logging_steps", 1]
FLAGS += ["--logging_backend", "none", "--validation_fraction", 0.2]
LOOKS = [(width, dark) for width in (390, 1280) for dark in (False, True)]
OF_RUN = {
    "Loss, nats per token": {"train": "train/loss", "eval": "eval/loss"},
    "Evaluation: accuracy": {"eval": "eval/accuracy"},
    "Learning rate": {"learning rate": "train/learning_rate"},
    "Gradient norm, before clipping": {"gradient norm": "train/grad_norm"},
    "Tokens per second": {"tokens per second": "throughput/tokens_per_s"},
    "Peak memory of a device": {"peak memory of a device": "memory/peak_bytes"},
}
OF_RUNS = {
    "Evaluation loss, nats per token": "eval/loss",
    "Learning rate": "train/learning_rate",
    "Gradient norm, before clipping": "train/grad_norm",
    "Tokens per second": "throughput/tokens_per_s",
}
# What the script has drawn: paths by the class of their line, and labels with their places.
DRAWN = """
figures.map(figure => ({
  title: figure.chart.title,
  paths: Object.fromEntries([...figure.querySelectorAll("svg.inner path")].map(path =>
    [path.getAttribute("class"), path.getAttribute("d")])),
  labels: [...figure.querySelectorAll("text[text-anchor=end]")].filter(text =>
    text.getAttribute("x") === "50").map(text => [text.textContent, text.getAttribute("y") - 4]),
}))
"""
STATE = "document.querySelector('.state b').textContent"
UNITS = {"k": 1e3, "M": 1e6, "%": 0.01, "MiB": 2**20, "GiB": 2**30}


@pytest.fixture
def browser() -> Iterator[Browser]:
    if program() is None:
        cannot_run("Chromium is not installed")
    with Browser() as browser:
        yield browser


def test_pages_of_runs(
    browser: Browser, process: Callable[..., Run], corpus: Path, tmp_path: Path
) -> None:
    live = tmp_path / "a run with a long name that says what it is for, and when it began"
    few = ["--max_steps", 30, "--eval_steps", 10]
    data = ["--data", corpus]
    with start([*FLAGS, *data, "--max_steps", 10**6, "--eval_steps", 100, "--output", live]) as run:
        try:
            done = process(tmp_path / "done", *FLAGS, *data, *few)
            assert done.code == 0, done.said
            _wait_for_curves(live / "report.html")
            _look(browser, live / "report.html", lambda: _run_curves(browser, live, total=None))
            assert browser.evaluate(STATE) == "Running"
            _reloads_itself(browser)
        finally:
            run.send_signal(signal.SIGINT)
        run.communicate(timeout=240)
    _look(browser, live / "report.html", lambda: _run_curves(browser, live, total=None))
    assert browser.evaluate(STATE) == "Stopped by SIGINT"
    _look(browser, done.path / "report.html", lambda: _run_curves(browser, done.path, total=30))
    _is_read_and_zoomed(browser, done.lines)
    assert browser.printed().startswith(b"%PDF")

    page = tmp_path / "comparison.html"
    assert report.main([str(live), str(done.path), "--output", str(page)]) == 0
    _look(browser, page, lambda: _compared_curves(browser, [live, done.path]))
    _is_sorted(browser)

    found = tmp_path / "evaluation.html"
    models = [str(done.path / "final"), str(done.path / "best")]
    assert evaluate.main([*models, "--data", str(corpus), "--page", str(found)]) == 0
    _look(browser, found, lambda: None)


def test_the_page_of_a_study(browser: Browser, tmp_path: Path) -> None:
    space = [Dimension("lr", 1e-4, 1e-2, True), Dimension("optimizer", choices=("adamw", "muon"))]
    space.append(Dimension("gradient_accumulation_steps", 1, 32))
    trials = [
        TrialResult(
            number,
            ("done", "pruned", "done")[number % 3],
            3 + np.sin(number) / 3,
            {
                "lr": 1e-4 * 1.1**number,
                "optimizer": ("adamw", "muon")[number % 2],
                "gradient_accumulation_steps": 1 + number % 32,
            },
            {},
            100,
            100,
        )
        for number in range(40)
    ]
    results = StudyResults(trials, space, "eval/bits_per_byte", False)
    shares = {"lr": 0.7, "optimizer": 0.2, "gradient_accumulation_steps": 0.1}
    page = tmp_path / "study.html"
    command = "consyn-train --config studies/of-the-learning-rate-and-the-optimizer/best.yaml"
    page.write_text(study_page(results, "Study of the learning rate", shares, command))
    _look(browser, page, lambda: None)
    dots = browser.evaluate("document.querySelectorAll('svg.chart circle').length")
    assert dots == 40 * (1 + len(space))


def _look(browser: Browser, page: Path, more: Callable[[], None]) -> None:
    """Check the page at every width, in light and dark."""
    for width, dark in LOOKS:
        assert faults(browser, page, width, dark=dark) == [], f"{page.name} {width} {dark}"
        more()


def _wait_for_curves(page: Path) -> None:
    until = time.monotonic() + 240
    while not (page.exists() and '"eval"' in page.read_text()):
        assert time.monotonic() < until, "the page of the live run got no curves"
        time.sleep(0.2)


def _lines(directory: Path) -> list[dict[str, Any]]:
    # A run that goes on may be writing the last one.
    text = (directory / "metrics.jsonl").read_text().rpartition("\n")[0]
    lines = [json.loads(line) for line in text.splitlines()]
    return [line for line in lines if "event" not in line]


def _run_curves(browser: Browser, directory: Path, total: int | None) -> None:
    """The page of a run has all curves, with the values of its log.

    Args:
        total: steps; None if the page may be older than the log, and leave out points.
    """
    known = {line["step"]: line for line in _lines(directory) if "train/loss" in line}
    known_evaluations = {line["step"]: line for line in _lines(directory) if "eval/loss" in line}
    charts = {chart["title"]: chart for chart in browser.evaluate("data")["charts"]}
    drawn = {chart["title"]: chart for chart in browser.evaluate(DRAWN)}
    for title, wanted in OF_RUN.items():
        for line in charts[title]["lines"]:
            if (key := wanted.get(line["name"])) is None:
                continue
            values = known_evaluations if key.startswith("eval/") else known
            steps = line["x"]["step"]
            assert line["y"] == pytest.approx([values[step][key] for step in steps], rel=1e-5)
            assert line["x"]["tokens"] == [values[step]["tokens"] for step in steps]
            if total is not None:
                assert steps == list(values)
            _is_drawn(drawn[title], line)
    assert {"Time by activity, as shares", *OF_RUN} == set(charts)


def _compared_curves(browser: Browser, directories: list[Path]) -> None:
    charts = {chart["title"]: chart for chart in browser.evaluate("data")["charts"]}
    drawn = {chart["title"]: chart for chart in browser.evaluate(DRAWN)}
    for title, key in OF_RUNS.items():
        for directory, line in zip(directories, charts[title]["lines"], strict=True):
            values = {at["step"]: at[key] for at in _lines(directory) if key in at}
            assert line["name"] == directory.name
            assert line["y"] == pytest.approx([values[n] for n in line["x"]["step"]], rel=1e-5)
            _is_drawn(drawn[title], line)


def _is_drawn(chart: dict[str, Any], line: dict[str, Any]) -> None:
    """The path has the points of the line at the heights that the labels of the axis name."""
    places = np.array(re.findall(r"([-\d.]+) ([-\d.]+)", chart["paths"][line["look"]]), float)
    assert len(places) == len(line["y"])
    for values, pixels in ((line["x"]["tokens"], places[:, 0]), (line["y"], places[:, 1])):
        if np.ptp(values) == 0:
            assert np.ptp(pixels) == 0
            continue
        slope, offset = np.polyfit(values, pixels, 1)
        assert np.abs(np.polyval((slope, offset), values) - pixels).max() < 0.2
    labels = [(_number(text), float(at)) for text, at in chart["labels"]]
    assert len(labels) >= 2
    if np.ptp(line["y"]):
        for value, at in labels:
            assert abs(np.polyval((slope, offset), value) - at) < 2, (chart["title"], value)


def _number(text: str) -> float:
    found = re.fullmatch(r"([-\d.e]+) ?(\D*)", text)
    assert found is not None, text
    return float(found[1]) * UNITS.get(found[2], 1)


def _mouse(browser: Browser, kind: str, x: float, y: float) -> None:
    pressed = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
    browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)


def _is_read_and_zoomed(browser: Browser, lines: list[dict[str, Any]]) -> None:
    """Pointing at a curve says its values there, and dragging shows a part of it."""
    at = "document.querySelector('figure svg')"
    box = browser.evaluate(f"{at}.scrollIntoView(), {at}.getBoundingClientRect().toJSON()")
    x, y = box["left"] + box["width"] / 2, box["top"] + box["height"] / 2
    _mouse(browser, "mouseMoved", x, y)
    text = browser.evaluate("document.querySelector('figure .read').textContent")
    found = re.match(r"step (\d+) · .* · train ([\d.]+) · ", text)
    assert found is not None, text
    loss = next(line["train/loss"] for line in lines if line["step"] == int(found[1]))
    assert found[2] == f"{loss:.4f}"
    _mouse(browser, "mousePressed", x, y)
    _mouse(browser, "mouseMoved", x + 200, y)
    _mouse(browser, "mouseReleased", x + 200, y)
    low, high = browser.evaluate("range()")
    assert 0 < low < high < lines[-1]["tokens"]
    assert browser.evaluate("document.querySelector('[data-all]').offsetParent !== null")


def _is_sorted(browser: Browser) -> None:
    """A click on the head of a column sorts the table."""
    browser.evaluate(
        "[...document.querySelectorAll('th')].find(h => h.textContent === 'of').click()"
    )
    column = (
        "[...document.querySelectorAll('table')[0].tBodies[0].rows].map(r => r.cells[3].innerText)"
    )
    assert browser.evaluate(column) == ["30", "1,000,000"]


def _is_old(browser: Browser) -> bool:
    """Whether the page has not been loaded again, which may be happening at this moment."""
    try:
        return bool(browser.evaluate("window.old === true"))
    except RuntimeError:
        return True


def _reloads_itself(browser: Browser) -> None:
    """After its time the page of a live run is loaded anew; that time is skipped here."""
    assert browser.evaluate("data.alive")
    browser.evaluate("window.old = true, loaded = Date.now(), Date.now = () => loaded + 70000, 0")
    until = time.monotonic() + 240
    while _is_old(browser):
        assert time.monotonic() < until, "the page was not loaded again"
        time.sleep(0.2)
