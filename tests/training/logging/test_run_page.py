import json
import math
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from logged_runs import CASES, HOSTILE, run

from consyn_jax.flags import flat
from consyn_jax.resolve import resolve
from consyn_jax.training.logging.live.history import History
from consyn_jax.training.logging.live.page_header import command_rows
from consyn_jax.training.logging.run_page import Status, write_report

DONE, RUNNING = Status("complete", False, 30), Status("running", True, 40, left_s=75.0)


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text("utf-8"))
    reader.close()
    assert reader.open == []
    return reader


@pytest.mark.parametrize("case", CASES)
def test_the_report_is_one_small_well_formed_file_that_loads_nothing(
    tmp_path: Path, case: str
) -> None:
    path = write_report(tmp_path, History(CASES[case]), {}, [], DONE)
    page = read(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_size < 700_000
    assert not {"link", "iframe", "img", "object", "embed", "base", "form"} & set(page.tags)
    assert page.tags.count("script") == 2, "the points, and the one that draws them"
    assert not {"src", "href", "xlink:href"} & {name for name, _ in page.attributes}
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert "://" not in text
    lines = [line for chart in points_of(path)["charts"] for line in chart["lines"]]
    values = [value for line in lines for value in line["y"]]
    assert all(math.isfinite(value) for value in values)


def test_hostile_text_is_shown_and_not_executed(tmp_path: Path) -> None:
    directory = tmp_path / "<marquee>run {body}"
    directory.mkdir()
    path = write_report(
        directory,
        History([*run(10), {"step": 10, "tokens": 1, "time_s": 1.0, f"eval/{HOSTILE}": 1.0}] * 2),
        {"data": (HOSTILE,), HOSTILE: 1},
        [(10, HOSTILE)],
        RUNNING,
        summary={HOSTILE: HOSTILE},
        origins={"data": HOSTILE},
        about=[("model", HOSTILE)],
    )
    page = read(path)
    assert not {"img", "marquee"} & set(page.tags)
    assert page.tags.count("script") == 2
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.text.count("<script>alert(1)</script>") == 13
    assert page.text.count("{body} {style}") == 14
    assert page.tags.count("html") == page.tags.count("style") == 1
    assert "<marquee>run {body}" in page.text
    assert "\x00" not in path.read_text()
    assert "\x1b" not in path.read_text()


def test_the_command_is_what_was_typed() -> None:
    given = {"model": "haiku", "data": ["a b.txt", "c.txt"], "qk_norm": True, "lr": "0.002"}
    resolved, origins = resolve(given, {"max_steps": 5}, file_name="recipe.yaml")
    command = (
        "consyn-train --config recipe.yaml --model haiku --qk_norm true --data 'a b.txt' c.txt"
    )
    assert command_rows(flat(resolved), origins) == [("command", f"{command} --lr 0.002")]
    resolved, origins = resolve({"lr": 0.1}, given_as="keyword")
    assert command_rows(flat(resolved), origins) == []


def test_the_report_says_what_happened(tmp_path: Path) -> None:
    resolved, origins = resolve({"model": "haiku", "lr": "0.002"})
    page = read(
        write_report(
            tmp_path,
            History(run(30)),
            flat(resolved),
            [(15, "To be"), (30, "or not")],
            DONE,
            summary={"parameters": 3_145_728},
            activities=lambda: {"time/compute_s": 12.0, "time/data_s": 3.0},
            origins=origins,
            about=[("devices", "8 x cpu")],
        )
    )
    lowest = 3 + 5 * math.exp(-1.5)
    for expected in (
        f"{lowest:.4f}",
        "step 15",
        "15.4k",
        "0:00:15",
        "3,145,728",
        "To be",
        "or not",
        "Complete: step 30 of 30 (100%)",
        "12.0 s",
        "80.0%",
        "8 x cpu",
        "1,024",
        "40.0%",
        "1.00 GiB",
        "preset haiku",
        "0.002",
        "resumed at step 30",
    ):
        assert expected in page.text, expected


def points_of(path: Path) -> dict[str, Any]:
    text = path.read_text("utf-8").partition('id="points">')[2].partition("</script>")[0]
    found: dict[str, Any] = json.loads(text)
    return found


def test_the_page_reloads_itself_only_while_the_run_is_alive(tmp_path: Path) -> None:
    history = History(run(30))
    path = write_report(tmp_path, history, {}, [], RUNNING)
    assert "<noscript><meta" in path.read_text()
    assert points_of(path)["alive"] is True
    assert points_of(path)["reload_s"] == 10
    assert "Running: step 30 of 40 (75%), about 0:01:15 left" in read(path).text
    path = write_report(tmp_path, history, {}, [], DONE)
    assert "refresh" not in path.read_text()
    assert points_of(path)["alive"] is False


def test_every_curve_has_the_numbers_of_the_log(tmp_path: Path) -> None:
    lines = run(30)
    charts = points_of(write_report(tmp_path, History(lines), {}, [], DONE))["charts"]
    found = {(chart["title"], line["name"]): line for chart in charts for line in chart["lines"]}
    for title, name, key in (
        ("Loss, nats per token", "train", "train/loss"),
        ("Loss, nats per token", "eval", "eval/loss"),
        ("Learning rate", "learning rate", "train/learning_rate"),
        ("Gradient norm, before clipping", "gradient norm", "train/grad_norm"),
        ("Tokens per second", "tokens per second", "throughput/tokens_per_s"),
        ("Model FLOP/s utilisation (MFU)", "model flop/s utilisation (mfu)", "throughput/mfu"),
        ("Peak memory of a device", "peak memory of a device", "memory/peak_bytes"),
        ("Evaluation: accuracy", "eval", "eval/accuracy"),
    ):
        line, wanted = found[title, name], [x for x in lines if key in x and "event" not in x]
        assert line["y"] == pytest.approx([x[key] for x in wanted], rel=1e-5)
        assert line["x"]["step"] == [x["step"] for x in wanted]
        assert line["x"]["tokens"] == [x["tokens"] for x in wanted]
        assert line["x"]["time"] == [x["time_s"] for x in wanted]


def test_a_page_of_many_steps_is_small_and_soon_written(tmp_path: Path) -> None:
    history = History()
    names = ("train/loss", "train/learning_rate", "train/grad_norm", "throughput/tokens_per_s")
    names += ("throughput/mfu", "memory/peak_bytes", "throughput/step_time_s")
    times = {f"time/{name}_s": 0.123456 for name in ("compute", "data", "saving")}
    for step in range(1, 6_001):
        place = {"step": step, "tokens": 524_288 * step, "time_s": 0.731 * step}
        loss = 99.0 if step == 4_321 else 1.0 + step % 977 / 977
        history.add(place | dict.fromkeys(names, loss) | times)
    began = time.thread_time()
    path = write_report(tmp_path, history, {}, [], RUNNING)
    assert time.thread_time() - began < 2
    assert path.stat().st_size < 3_000_000
    assert "lowest and the highest point of each" in read(path).text
    loss = points_of(path)["charts"][0]["lines"][0]
    assert (max(loss["y"]), loss["x"]["step"][loss["y"].index(99.0)]) == (99.0, 4_321)
