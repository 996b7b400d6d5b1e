"""Runs read back from their directories, on one page."""

import errno
import json
import math
import os
import re
import shutil
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from consyn_jax.cli.report import main
from consyn_jax.errors import UserError
from consyn_jax.flags import flat
from consyn_jax.reporting.recorded_run import differing, read_run, read_runs
from consyn_jax.reporting.runs_page import MAX_DRAWN, runs_page
from consyn_jax.reporting.watch_server import find_runs, open_server
from consyn_jax.resolve import resolve
from consyn_jax.training.run.lock import RunLock

HOSTILE = "<img src=x onerror=alert(1)>'\" {body}"


def made(place: Path, end: str | None = "finish", **flags: Any) -> Path:
    """The directory of a run of 20 steps, as far as a report reads it."""
    place.mkdir(parents=True)
    config, _ = resolve({"model": "haiku", **flags})
    values = {n: list(v) if isinstance(v, tuple) else v for n, v in flat(config).items()}
    derived = {"total_steps": 20}
    (place / "config.yaml").write_text(yaml.safe_dump(values | {"derived": derived}))
    lines: list[dict[str, Any]] = [{"step": 0, "tokens": 0, "time_s": 0.0, "event": "start"}]
    for step in range(1, 21):
        at = {"step": step, "tokens": 512 * step, "time_s": 0.5 * step}
        loss = 3 + 5 * math.exp(-step * float(flags.get("lr", 1e-3)) * 100)
        lines.append(at | {"train/loss": loss, "throughput/tokens_per_s": 1024.0})
        if step % 5 == 0:
            lines.append(at | {"eval/loss": loss + abs(step - 15) / 10})
    if end is not None:
        lines.append(
            {"step": 20, "tokens": 10240, "time_s": 10.0, "event": end, "signal": "SIGTERM"}
        )
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


class Reader(HTMLParser):
    """Tags, and the cells of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.cell = tag in ("td", "th") or (self.cell and tag == "i")
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.rows[-1][-1] += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


def test_results_and_differences_of_two_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "a")
    made(tmp_path / "b", lr=0.002, optimizer="lion", output="elsewhere")
    monkeypatch.chdir(tmp_path)
    assert main(["a", "b"]) == 0
    out, err = capsys.readouterr()
    page = read(Path("comparison.html").read_text())
    best = 3 + 5 * math.exp(-1.5)
    assert page.rows[1][:7] == ["a", "complete", "20", "20", "10,240", f"{best:.4f}", "15"]
    flags = next(row for row in page.rows if "lr" in row)
    assert {"run", "lr", "optimizer"} <= set(flags)
    assert "output" not in flags
    assert page.rows[page.rows.index(flags) + 2][flags.index("lr")] == "0.002"
    assert page.tags.count("svg") >= 3 * 2  # an inner one cuts the lines off
    assert re.search(rf"^a +complete +20 +20 +10,240 +{best:.4f}", out, re.MULTILINE)
    assert re.search(r"^b +0\.002 +lion +0\.5$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 80
    assert err == "The page is comparison.html.\n"


def test_the_page_loads_nothing_and_shows_hostile_names_as_text(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "")
    runs = read_runs([made(tmp_path / name), made(tmp_path / "b", data=[HOSTILE])])
    text = runs_page(runs, HOSTILE, [HOSTILE])
    page = read(text)
    assert "img" not in page.tags
    assert page.tags.count("script") == 2, "the points, and the one that draws them"
    assert not {"src", "href", "onerror"} & {name for name, _ in page.attributes}
    assert "script-src 'sha256-" in text
    assert 'http-equiv="refresh"' not in text
    assert page.rows[1][0] == name


def test_the_state_of_a_run(tmp_path: Path) -> None:
    assert read_run(made(tmp_path / "a")).state == "complete"
    assert read_run(made(tmp_path / "b", "signal")).state == "stopped by SIGTERM"
    halted = made(tmp_path / "d", None)
    with (halted / "metrics.jsonl").open("a") as log:
        log.write(
            '{"step": 20, "tokens": 1, "time_s": 1.0, "event": "nonfinite", "action": "halt"}\n'
        )
    assert read_run(halted).state == "diverged"
    killed = made(tmp_path / "c", None)
    assert read_run(killed).state == "ended without a record"
    lock = RunLock(killed)
    assert read_run(killed).state == "running"
    lock.release()


def test_a_run_that_has_logged_nothing_yet(tmp_path: Path) -> None:
    run = made(tmp_path / "a", None)
    (run / "metrics.jsonl").unlink()
    found = read_run(run)
    assert found.results["step"] is None
    assert "ended without" in runs_page([found], "one")
    assert differing([found, read_run(made(tmp_path / "b"))]) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "No run is given"),
        (["--watch", ".", "--output", "x"], "--watch writes no file"),
        (["a", "--port", "1"], "--port is for --watch"),
        (["a", "--watch", "."], "--run and --watch do not work together"),
        (["a", "a/../a"], "is given twice"),
        (["nothing"], "nothing is not the directory of a run: it has no config.yaml"),
        (["broken"], "broken/config.yaml is not YAML"),
        (["a", "--output", "no/page.html"], "in a directory that does not exist"),
        (["a", "--output", "a"], "is a directory"),
        (["--watch", "nowhere"], "--watch nowhere is not a directory"),
        (["--watch", ".", "--port", "70000"], "--port 70000 is not in 0 to 65535"),
    ],
)
def test_wrong_input(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made(tmp_path / "a")
    (tmp_path / "nothing").mkdir()
    (made(tmp_path / "broken") / "config.yaml").write_text("a: [")
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert not Path("comparison.html").exists()


def test_many_runs_are_listed_and_the_first_drawn(tmp_path: Path) -> None:
    runs = read_runs([made(tmp_path / f"{i}/run") for i in range(MAX_DRAWN + 1)])
    assert [run.name for run in runs][:2] == ["0/run", "1/run"]
    text = runs_page(runs, "many")
    assert f"The first {MAX_DRAWN} runs are drawn." in text
    assert f">{MAX_DRAWN}/run</td>" in text


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of the page of two runs, a damaged one, and a link out of the directory."""
    made(tmp_path / "runs/old")
    made(tmp_path / "runs/deep/er/new", None)
    (made(tmp_path / "runs/bad") / "config.yaml").write_text("a: [")
    made(tmp_path / "outside")
    (tmp_path / "runs/link").symlink_to(tmp_path / "outside")
    with open_server(tmp_path / "runs", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def get(address: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
        found: str = answer.read().decode()
        return found


def test_a_watched_directory(address: str, tmp_path: Path) -> None:
    faults: list[str] = []
    assert sorted(find_runs(tmp_path / "runs", faults)) == ["bad", "deep/er/new", "old"]
    assert faults == []
    text = get(address)
    page = read(text)
    assert [row[:2] for row in page.rows[1:3]] in (
        [["deep/er/new", "ended without a record"], ["old", "complete"]],
        [["old", "complete"], ["deep/er/new", "ended without a record"]],
    )
    assert "bad/config.yaml is not YAML" in text
    assert '<meta http-equiv="refresh" content="10">' in text
    with (tmp_path / "runs/old/metrics.jsonl").open("a") as log:
        log.write('{"step": 21, "tokens": 11000, "time_s": 11.0, "event": "resume"}\n')
    assert read(get(address)).rows[1][:3] == ["old", "ended without a record", "21"]
    shutil.rmtree(tmp_path / "runs/old")
    assert read(get(address)).rows[1][0] == "deep/er/new"


@pytest.mark.parametrize(
    ("path", "headers", "code"),
    [
        ("/old/config.yaml", {}, 404),
        ("/../outside/config.yaml", {}, 404),
        ("/", {"Host": "elsewhere.example"}, 403),
    ],
)
def test_nothing_but_the_page_is_served(
    address: str, path: str, headers: dict[str, str], code: int
) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(address + path, **headers)
    with refused.value as answer:
        assert answer.code == code


def test_a_lock_that_is_a_link_hides_nothing(address: str, tmp_path: Path) -> None:
    (tmp_path / "runs/old/lock").symlink_to(tmp_path / "outside")
    assert "old" in [row[0] for row in read(get(address)).rows[1:3]]


def test_a_directory_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "a")
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", refused)
    faults: list[str] = []
    assert list(find_runs(tmp_path, faults)) == ["a"]
    assert faults == [f"{tmp_path / 'closed'} cannot be read: Permission denied."]


def test_ctrl_c_ends_the_watch_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(server: ThreadingHTTPServer) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", pressed)
    assert main(["--watch", str(tmp_path), "--port", "0"]) == 0
    assert capsys.readouterr().err.count("\n") == 1


def test_a_port_that_is_taken(address: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--port \d+ cannot be used: Address already in use"):
        open_server(tmp_path, int(address.rsplit(":", 1)[1]))


@pytest.mark.parametrize("key", ["step", "tokens", "time_s"])
@pytest.mark.parametrize("value", ["-1", "1e999", "1" + "0" * 400])
def test_numbers_that_no_run_logs(key: str, value: str, tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    log = run / "metrics.jsonl"
    first, rest = log.read_text().split("\n", 1)
    log.write_text(re.sub(rf'"{key}": [^,]+', f'"{key}": {value}', first) + "\n" + rest)
    with pytest.raises(UserError, match=r"metrics\.jsonl:1 is damaged"):
        read_run(run)


@pytest.mark.parametrize("value", ["1e999", "1e308", "1" + "0" * 400, "1e299", "-1e20", "1e17"])
@pytest.mark.parametrize("key", ["train/loss", "eval/loss", "throughput/tokens_per_s"])
def test_values_of_any_size_are_drawn_or_left_out(key: str, value: str, tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    log = run / "metrics.jsonl"
    log.write_text(re.sub(rf'"{key}": [^,}}]+', f'"{key}": {value}', log.read_text()))
    assert "<h2>Results</h2>" in runs_page([read_run(run)], "Runs")
