"""Tables: any fields come back by column, from every position where reading can resume."""

import csv
import gzip
import io
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consyn_jax.data.preparation.workers.worker import Worker
from consyn_jax.data.sources import csv_reader, reader
from consyn_jax.data.sources.csv_reader import CsvReader
from consyn_jax.data.sources.discovery import find_sources
from consyn_jax.data.sources.reader import START, Position, Reading
from consyn_jax.errors import UserError
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.tokenization import BPETokenizer

BYTES = BPETokenizer.bytes()
READING = Reading(CorpusOptions(), BYTES)


def rows(path: Path, start: Position = START) -> list[tuple[int, dict]]:
    blocks = CsvReader().blocks(str(path), start, READING)
    return [
        (number, json.loads(line))
        for block in blocks
        for number, line in zip(block.numbers, block.data.splitlines(), strict=True)
    ]


def written(table: list[list[str]], **form: object) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, **form).writerows(table)  # type: ignore[arg-type]
    return file.getvalue().encode()


FIELDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=8)
FIELDS |= st.sampled_from(['"', 'say "yes"', "a,b", "two\nlines", "", "é"])


@given(st.lists(st.lists(FIELDS, min_size=2, max_size=2), min_size=1, max_size=20), st.data())
def test_any_fields_come_back(table: list[list[str]], data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "BLOCK_BYTES", 30)
        patch.setattr(csv_reader, "CHUNK_BYTES", 7)
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "t.csv"
            path.write_bytes(b"\xef\xbb\xbf" + written([["prompt", "completion"], *table]))
            expected = [{"prompt": a, "completion": b} for a, b in table]
            assert [row for _, row in rows(path)] == expected
            blocks = list(CsvReader().blocks(str(path), START, READING))
            block = data.draw(st.sampled_from(blocks))
            rest = [row for _, row in rows(path, block.end or START)]
            done = sum(len(b.numbers) for b in blocks[: blocks.index(block) + 1])
            assert rest == expected[done:]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"a,b\n1,2\n"),
        ("t.csv", b"a;b\r\n1;2\r\n"),
        ("t.tsv", b"a\tb\n1\t2\n"),
        ("t.tsv", b"a,b\n1,2\n"),
        ("t.csv", b"a|b\n\n1|2"),
        ("t.csv.gz", gzip.compress(b"a,b\n1,2\n", mtime=0)),
    ],
)
def test_delimiters_and_line_ends(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert [row for _, row in rows(tmp_path / name)] == [{"a": "1", "b": "2"}]
    (source,) = find_sources([str(tmp_path / name)]).sources
    assert source.kind == "csv"


def test_quotes_without_a_pair_are_text(tmp_path: Path) -> None:
    lines = "".join(f'"so it begins {i}\tno\n' for i in range(5))
    (tmp_path / "t.tsv").write_text(f"text\tlabel\n{lines}", encoding="utf-8")
    assert [row["text"] for _, row in rows(tmp_path / "t.tsv")][1] == '"so it begins 1'


def test_a_row_of_another_length_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text,label\n" + "a,1\n" * 3 + "b\n", encoding="utf-8")
    (block,) = CsvReader().blocks(str(path), START, READING)
    assert (
        f"{path}:5 has 1 fields, but the first line has 2."
        in Worker(READING.options, BYTES).work(block).fault
    )
    skipped = Worker(CorpusOptions(on_bad_rows="skip"), BYTES).work(block)
    assert (len(skipped.kept.numbers), len(skipped.dropped)) == (3, 1)


def test_a_table_without_names_of_columns_is_told_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("what is 1?,one\nwhat is 2?,two\n", encoding="utf-8")
    (block,) = CsvReader().blocks(str(path), START, READING)
    fault = Worker(READING.options, BYTES).work(block).fault
    assert fault.endswith(
        "if the first line is a row of data, add a line of column names above it."
    )
    path.write_text("question,answer\n" + path.read_text("utf-8"), encoding="utf-8")
    (block,) = CsvReader().blocks(str(path), START, READING)
    assert (
        "--prompt_key question --completion_key answer"
        in Worker(READING.options, BYTES).work(block).fault
    )


def test_faults_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,a\n1,2\n", encoding="utf-8")
    with pytest.raises(UserError, match="several columns named 'a'"):
        rows(path)
    path.write_text("a,b\n" + "1,2\n" * 200 + '"x"y,3\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"t\.csv:202 is not a row of a table"):
        rows(path)
