import math
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.config import flat
from consyn_jax.resolve import resolve
from consyn_jax.training.report import Point, best, curve, smooth, thin, write_loss_plot, write_report

HOSTILE = '</pre><script>alert(1)</script><img src=x onerror=alert(1)>\x00\x1b[2J\ud800 & "quotes" {body} {style}'


def run(steps: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"step": 0, "tokens": 0, "time_s": 0.0, "event": "start"}]
    for step in range(1, steps + 1):
        at = {"step": step, "tokens": 512 * step, "time_s": 0.5 * step}
        loss = 3 + 5 * math.exp(-step / 10)
        speed = {"throughput/tokens_per_s": 1024.0, "throughput/mfu": 0.4, "memory/peak_bytes": 2**30}
        lines.append(at | {"train/loss": loss, "train/learning_rate": 1e-3 / step, "train/grad_norm": 1.0} | speed)
        if step % 5 == 0:
            lines.append(at | {"eval/loss": loss + abs(step - 15) / 10, "eval/perplexity": 30.0, "eval/bits_per_byte": 1.5, "eval/accuracy": 0.4})
    return [*lines, {"step": steps, "tokens": 512 * steps, "time_s": 0.5 * steps, "event": "resume", "why": HOSTILE, "eval/loss": 0.5}]


NOT_FINITE = [{"step": 1, "tokens": 5, "time_s": 1.0, "train/loss": math.nan, "eval/loss": math.inf, "throughput/tokens_per_s": None}]
CASES = {
    "none": [],
    "event": run(0),
    "one": run(1),
    "two": run(2),
    "some": run(30),
    "many": run(3000),
    "not finite": NOT_FINITE,
    "broken then fine": NOT_FINITE + run(9)[1:],
}


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that what is opened is closed."""

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
def test_the_plot_is_a_png_of_sane_size(tmp_path: Path, case: str) -> None:
    path = tmp_path / "loss.png"
    write_loss_plot(CASES[case], path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 1000 < width < 2000
    assert 600 < height < 1200
    assert 8_000 < len(data) < 500_000


def test_the_plot_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib

    matplotlib.rcParams["lines.linewidth"] = 7.0
    try:
        write_loss_plot(run(3), tmp_path / "loss.png")
        assert matplotlib.rcParams["lines.linewidth"] == 7.0
    finally:
        matplotlib.rcdefaults()


@pytest.mark.parametrize("case", CASES)
def test_the_report_is_one_small_well_formed_file_that_loads_nothing(tmp_path: Path, case: str) -> None:
    path = write_report(tmp_path, CASES[case], {}, [], {})
    page = read(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_size < 300_000
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
    assert not {"src", "href", "xlink:href"} & {name for name, _ in page.attributes}
    assert not any(word in path.read_text() for word in ("nan", "inf ", "inf<", "://"))


def test_hostile_text_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    directory = tmp_path / "<marquee>run {body}"
    directory.mkdir()
    path = write_report(directory, run(10), {"data": (HOSTILE,), HOSTILE: 1}, [(10, HOSTILE)], {HOSTILE: HOSTILE}, {"data": HOSTILE})
    page = read(path)
    assert not {"script", "img", "marquee"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.text.count("<script>alert(1)</script>") == 7
    assert page.text.count("{body} {style}") == 7
    assert page.tags.count("html") == page.tags.count("style") == 1
    assert "<marquee>run {body}" in page.text
    assert "\x00" not in path.read_text()
    assert "\x1b" not in path.read_text()


def test_the_report_says_what_happened(tmp_path: Path) -> None:
    resolved, origins = resolve({"model": "haiku", "lr": "0.002"})
    page = read(write_report(tmp_path, run(30), flat(resolved), [(30, "To be")], {"parameters": 3_145_728}, origins))
    lowest = 3 + 5 * math.exp(-1.5)
    for expected in (
        f"{lowest:.4f}",
        "step 15",
        "15.4k",
        "0:00:15",
        "3,145,728",
        "To be",
        "1,024",
        "40.0%",
        "1.00 GiB",
        "preset haiku",
        "0.002",
        "resumed at step 30",
    ):
        assert expected in page.text, expected


def test_smoothing_keeps_a_straight_line_and_evens_out_noise() -> None:
    line = [Point(i, i, 100.0 - i) for i in range(100)]
    assert all(abs(a.value - b.value) < 1e-9 for a, b in zip(smooth(line)[:97], line, strict=False))
    noise = [Point(i, i, float(i % 2)) for i in range(400)]
    assert all(abs(point.value - 0.5) < 0.06 for point in smooth(noise)[20:])
    assert smooth([]) == []


def test_thinning_keeps_spikes_and_order() -> None:
    points = [Point(i, i, 9.0 if i == 777 else 1.0 + i / 1e6) for i in range(10_000)]
    few = thin(points, 100)
    assert len(few) <= 200
    assert Point(777, 777, 9.0) in few
    assert [p.step for p in few] == sorted(p.step for p in few)
    assert thin(points[:5]) == points[:5]


def test_the_best_is_the_first_lowest_and_not_finite_values_are_no_points() -> None:
    assert best([]) is None
    assert best([Point(1, 1, 2.0), Point(2, 2, 1.0), Point(3, 3, 1.0)]) == Point(2, 2, 1.0)
    assert len(curve(run(10), "eval/loss")) == 2  # and not three: an event's details are no points
    assert curve(NOT_FINITE, "train/loss") == curve(NOT_FINITE, "eval/loss") == []
