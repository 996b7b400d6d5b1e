import json
from pathlib import Path

import pytest

from consyn_jax.data.sources.recognition.unread_structure import (
    unread_structure,
    unused_separator,
)
from consyn_jax.data.sources.source import Source
from consyn_jax.prepare_config import CorpusOptions

STORIES = [f"Once there was number {i}.\nIt ended well." for i in range(20)]


def sources(place: Path, *names: str) -> list[Source]:
    return [Source(str(place / name), "text") for name in names]


def noticed(path: Path, content: str, end_text: str | None = None, **options: str) -> list[str]:
    path.write_text(content, encoding="utf-8")
    return unread_structure([Source(str(path), "text")], CorpusOptions(**options), end_text)


@pytest.mark.parametrize(
    ("marker", "join"),
    [
        ("<|endoftext|>", "\n{}\n"),
        ("<|endoftext|>", "{}"),
        ("</s>", "{}<s>"),
        ("<eos>", "{}\n"),
        ("<|end|>", "{}"),
    ],
)
def test_ends_of_documents_are_counted_and_answered_with_the_flag(
    tmp_path: Path, marker: str, join: str
) -> None:
    text = join.format(marker).join(STORIES)
    (sentence,) = noticed(tmp_path / "a.txt", text, "<|end|>")
    assert "19 times" in sentence
    assert f"--document_separator '{marker}'" in sentence
    assert sentence.count(". ") <= 1
    assert not noticed(tmp_path / "a.txt", text, "<|end|>", document_separator=marker)


def test_a_text_that_names_a_marker_once_is_prose(tmp_path: Path) -> None:
    assert not noticed(tmp_path / "a.txt", "GPT-2 ends documents with <|endoftext|>.\n" * 1)
    assert not noticed(tmp_path / "a.txt", "\n\n".join(STORIES))


@pytest.mark.parametrize(
    ("content", "flag"),
    [
        ("\n".join(json.dumps({"text": s}) for s in STORIES), "--dataset_type jsonl"),
    ],
)
def test_rows_that_are_read_as_text_are_answered_with_the_flag(
    tmp_path: Path, content: str, flag: str
) -> None:
    (sentence,) = noticed(tmp_path / "a.txt", content)
    assert flag in sentence


def test_several_files_share_one_sentence(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / name).write_text("<|endoftext|>".join(STORIES))
    sources = [Source(str(tmp_path / name), "text") for name in "abcde"]
    (sentence,) = unread_structure(sources, CorpusOptions())
    assert "95 times" in sentence
    assert "and 2 more are read" in sentence


def test_one_file_is_one_document_and_several_are_one_each(tmp_path: Path) -> None:
    text = "</s>".join(STORIES)
    (sentence,) = noticed(tmp_path / "a.txt", text)
    assert sentence.startswith(f"{tmp_path / 'a.txt'} is read as one document, although '</s>' ")
    (tmp_path / "b.txt").write_text(text)
    (sentence,) = unread_structure(sources(tmp_path, "a.txt", "b.txt"), CorpusOptions())
    assert "b.txt are read as one document each, although '</s>' occurs 38 times" in sentence


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_table_that_is_read_as_text_is_answered_with_the_flag(
    tmp_path: Path, delimiter: str
) -> None:
    table = "\n".join(delimiter.join(("id", "title", f"line {i}")) for i in range(30))
    (sentence,) = noticed(tmp_path / "a.txt", table)
    assert sentence == (
        f"{tmp_path / 'a.txt'} is read as plain text and looks like a table of 3 columns. "
        "To read it, add --dataset_type csv."
    )
    (tmp_path / "b.txt").write_text(table.replace(delimiter, delimiter * 2))
    (sentence,) = unread_structure(sources(tmp_path, "a.txt", "b.txt"), CorpusOptions())
    assert "are read as plain text and look like tables of 3 or 5 columns. To read them" in sentence


def test_the_bars_of_markers_are_no_columns(tmp_path: Path) -> None:
    (sentence,) = noticed(
        tmp_path / "a.txt", "<|endoftext|>\n".join(f"Story {i}." for i in range(30))
    )
    assert "--document_separator" in sentence


def test_notebooks_are_read_as_text_which_is_said(tmp_path: Path) -> None:
    notebook = json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    (sentence,) = noticed(tmp_path / "a.ipynb", notebook)
    assert sentence == (
        f"{tmp_path / 'a.ipynb'} is read as plain text, with the JSON of a notebook. "
        "To train on the cells only, convert it to text or scripts."
    )
    (tmp_path / "b.ipynb").write_text(notebook)
    (sentence,) = unread_structure(sources(tmp_path, "a.ipynb", "b.ipynb"), CorpusOptions())
    assert "are read as plain text, with the JSON of notebooks" in sentence
    assert "convert them" in sentence


def test_a_separator_that_separates_nothing_is_named(tmp_path: Path) -> None:
    """Also why: line ends of another system."""
    (tmp_path / "a.txt").write_bytes(b"one\r\n---\r\ntwo\r\n")
    (tmp_path / "b.txt").write_bytes(b"one\n--\ntwo\n")
    a, b, gone = sources(tmp_path, "a.txt", "b.txt", "gone.txt")
    begins = "--document_separator $'\\n---\\n' separates no documents in "
    assert unused_separator([b], "\n---\n") == f"{begins}{b.name}"
    assert unused_separator([gone], "\n---\n") == f"{begins}{gone.name}"
    assert unused_separator([b, a], "\n---\n") == (
        f"{begins}{b.name}, {a.name}. Lines end with CRLF in {a.name}, so write the separator as "
        "$'\\r\\n---\\r\\n' there."
    )
    quoted = unused_separator([a], "it's\t\\\r\n")
    assert quoted == rf"--document_separator $'it\'s\t\\\r\n' separates no documents in {a.name}"
