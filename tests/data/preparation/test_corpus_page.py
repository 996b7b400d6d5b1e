"""The page of a preparation shows the content of report.json, and text from data stays text."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from consyn_jax.data.preparation import corpus_page
from consyn_jax.data.preparation.corpus_page import SHOWN
from consyn_jax.data.preparation.corpus_report import NOTICES, Report

HOSTILE = (
    "</pre><script>alert(1)</script><img src=x onerror=alert(1)>"
    '\x00\x1b[2J\ud800 & "quotes" {body} {style}'
)
SETTINGS = {
    "data": ("a.txt", "b.txt"),
    "near_duplicates": None,
    "deduplicate": True,
    "max_chars": 12_000,
}


def report() -> Report:
    """Ten documents read, four left out."""
    made = Report(documents=10, file_bytes=54_321)
    for rule, text in (
        ("duplicate", "the\r\nsame"),
        ("duplicate", "the same"),
        ("too short", "x"),
        ("empty", ""),
    ):
        made.drop(rule, "a.txt:3", text)
    made.add("changed", {"normalized": 2, "invalid_utf8": 7})
    made.keep(np.array([1, 3, 4, 5, 1000, 1_000_000]), np.array([0, 1, 1, 2, 300, 250_000]))
    made.splits = {
        "train": {"documents": 4, "tokens": 250_304, "target_tokens": 250_304, "bytes": 1_001_200},
        "validation": {"documents": 2, "tokens": 6, "target_tokens": 3, "bytes": 12},
    }
    made.sources = [
        {"name": "a.txt", "kind": "text", "documents": 9, "kept": 5},
        {"name": "b.txt", "kind": "text", "documents": 1, "kept": 1},
    ]
    made.left_out = [["c.png", "is binary: byte 4 is NUL"]]
    return made


class Reader(HTMLParser):
    """Collects tags, attributes and the cells of tables, and checks that tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def page(
    tmp_path: Path,
    made: Report,
    title: str = "Token store",
    settings: dict[str, object] | None = None,
) -> Reader:
    path = tmp_path / "report.html"
    path.write_text(
        corpus_page.page(made, title, SETTINGS if settings is None else settings), encoding="utf-8"
    )
    assert list(tmp_path.iterdir()) == [path]
    reader = Reader()
    reader.feed(path.read_text("utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def test_the_output_of_a_rule_is_the_input_of_the_next(tmp_path: Path) -> None:
    rows = page(tmp_path, report()).rows
    assert ["bad row", "10", "0", "0 %", "10"] in rows
    assert ["empty", "10", "1", "10.0 %", "9"] in rows
    assert ["too short", "9", "1", "10.0 %", "8"] in rows
    assert ["duplicate", "8", "2", "20.0 %", "6"] in rows
    assert ["near duplicate", "6", "0", "0 %", "6"] in rows


def test_splits_lengths_changes_sources_and_settings(tmp_path: Path) -> None:
    read = page(tmp_path, report())
    assert ["train", "4", "66.7 %", "250,304", "100 %", "1,001,200", "4.000"] in read.rows
    assert ["validation", "2", "33.3 %", "6", "50.0 %", "12", "3.000"] in read.rows
    assert ["all", "6", "100 %", "250,310", "> 99.9 %", "1,001,212", "4.000"] in read.rows
    assert ["2 to 3", "", "1"] in read.rows  # bytes
    assert ["4 to 7", "", "2"] in read.rows
    assert ["8 to 15", "", "0"] in read.rows, "empty ranges between others are shown"
    assert ["131,072 to 262,143", "", "1"] in read.rows  # tokens
    assert ["texts converted to the Unicode normal form", "2"] in read.rows
    assert ["places that were not UTF-8, replaced by U+FFFD", "7"] in read.rows
    assert ["a.txt", "text", "9", "5"] in read.rows
    assert ["c.png", "is binary: byte 4 is NUL"] in read.rows
    assert read.rows[-4:] == [
        ["data", "a.txt b.txt"],
        ["near_duplicates", "none"],
        ["deduplicate", "true"],
        ["max_chars", "12,000"],
    ]
    assert "duplicate: 2" in read.text
    assert "a.txt:3: the\nsame" in read.text


@pytest.mark.parametrize("made", [Report(), report()], ids=["nothing", "something"])
def test_the_page_loads_nothing_and_runs_nothing(made: Report, tmp_path: Path) -> None:
    read = page(tmp_path, made)
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(read.tags)
    assert not {"src", "href", "xlink:href"} & {name for name, _ in read.attributes}
    assert "://" not in (tmp_path / "report.html").read_text()


def test_hostile_text_is_shown_and_not_run(tmp_path: Path) -> None:
    made = report()
    made.drop(HOSTILE, HOSTILE, HOSTILE)
    made.add("changed", {HOSTILE: 1})
    made.splits[HOSTILE] = {"documents": 1}
    made.sources.append({"name": HOSTILE, "kind": HOSTILE, "documents": 1, "kept": 0})
    made.left_out.append([HOSTILE, HOSTILE])
    read = page(tmp_path, made, HOSTILE, {HOSTILE: HOSTILE})
    assert not {"script", "img"} & set(read.tags)
    assert not any(name.startswith("on") for name, _ in read.attributes)
    # title and heading, legend, rule in table, caption and (as "place: text") twice in the sample,
    # change, split, source 2, left out 2, setting 2
    assert read.text.count("<script>alert(1)</script>") == 15
    assert read.tags.count("html") == read.tags.count("style") == 1
    assert "\x00" not in (tmp_path / "report.html").read_text()
    assert any(
        name == "title" and value is not None and value.startswith(HOSTILE[:30])
        for name, value in read.attributes
    ), "the bar"


def test_only_the_first_of_thousands_of_sources_are_shown(tmp_path: Path) -> None:
    made = report()
    made.sources = [
        {"name": f"part-{i:05}.jsonl", "kind": "jsonl", "documents": 3, "kept": 3}
        for i in range(5000)
    ]
    made.left_out = [[f"image-{i}.png", "is binary"] for i in range(SHOWN)]
    read = page(tmp_path, made)
    assert len(re.findall(r"part-\d+", read.text)) == SHOWN
    assert "Sources: 5,000" in read.text
    assert "report.json lists all 5,000." in read.text
    assert read.text.count("are shown") == 1, "all of exactly the limit are shown"


def test_equal_reports_have_equal_pages(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    page(tmp_path / "a", report())
    page(tmp_path / "b", report())
    assert (tmp_path / "a/report.html").read_bytes() == (tmp_path / "b/report.html").read_bytes()


def test_an_existing_page_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    assert "documents kept" in page(tmp_path, report()).text


def test_the_formats_of_rows_the_first_one_and_what_was_noticed_are_shown() -> None:
    made = report()
    assert "Formats of the rows" not in corpus_page.page(made, "t", SETTINGS)
    made.add("formats", {"messages": 7, "text": 3})
    made.add("noticed", {"markers": 2})
    made.example = ["messages", "<user> why", "so </assistant>"]
    text = corpus_page.page(made, "t", SETTINGS)
    reader = Reader()
    reader.feed(text)
    assert ["messages", "7"] in reader.rows
    assert [NOTICES["markers"], "2"] in reader.rows
    assert "<user> why" in reader.text
    assert "so </assistant>" in reader.text
