"""Read tables of comma- or tab-separated values; a row becomes an object with a key per column."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from consyn_jax.data.sources.byte_stream import CHUNK_BYTES, ByteStream
from consyn_jax.data.sources.reader import (
    Block,
    Candidate,
    Position,
    Reader,
    Reading,
    inner_suffix,
)
from consyn_jax.data.sources.row_formats.fields import FAULT
from consyn_jax.errors import UserError, brief
from consyn_jax.prepare_config import CorpusOptions

LONGEST_FIELD = 64 << 20
DELIMITERS = ",;\t|"
HEAD_ROWS = 100
HEADLESS = "; if the first line is a row of data, add a line of column names above it."


class CsvReader(Reader):
    """CSV and TSV files, which may be compressed; their first line has the column names.

    The delimiter is the most frequent character of `DELIMITERS` in the first line. In a .tsv file,
    a tab in the first line takes precedence. Fields in double quotes may contain line breaks. In a
    file with unpaired quotes, quotes are ordinary characters.
    """

    kind, noun, unit = "csv", "a table of columns", "table of columns"
    suffixes = (".csv", ".tsv")

    def recognise(self, file: Candidate) -> str | None:
        """Recognise a file by its suffix."""
        if file.suffix not in self.suffixes and file.dataset_type != self.kind:
            return None
        return file.text_fault()

    def blocks(self, name: str, start: Position, reading: Reading) -> Iterator[Block]:
        """Convert the rows to JSON objects, and yield them in blocks of JSON Lines."""
        csv.field_size_limit(LONGEST_FIELD)
        form = _Form(Path(name))
        with ByteStream(Path(name)) as stream:
            rows = (
                (number, json.dumps(form.row(fields), ensure_ascii=False), end)
                for number, fields, end in _records(name, stream, start, form)
                if number > 1  # line 1 has the column names
            )
            encoded = ((n, row.encode("utf-8", "surrogateescape"), end) for n, row, end in rows)
            yield from Block.each_of_rows(name, encoded, stream)


def is_table(name: str, options: CorpusOptions) -> bool:
    """Whether a source is read as a table."""
    kind = CsvReader.kind
    return options.dataset_type == kind or inner_suffix(Path(name)) in CsvReader.suffixes


class _Form:
    """Delimiter, quoting and columns of a table, detected from its beginning."""

    def __init__(self, path: Path) -> None:
        with ByteStream(path) as stream:
            head = stream.read(1 << 20).decode("utf-8", "surrogateescape")
        first = head.split("\n", 1)[0]
        is_tsv = inner_suffix(path) == ".tsv" and "\t" in first
        self.delimiter = "\t" if is_tsv else max(DELIMITERS, key=first.count)
        self.quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
        lines = head.splitlines(keepends=True)
        if not self._is_even(lines):
            self.quoting = csv.QUOTE_NONE
            if not self._is_even(lines):
                self.quoting = csv.QUOTE_MINIMAL
        self.columns = next(self.parsed(lines), [])
        twice = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if twice:
            raise UserError(f"{path} has several columns named {twice[0]!r}. Rename all but one.")

    def parsed(self, lines: Iterator[str] | Sequence[str]) -> Iterator[list[str]]:
        """Parse lines of text into records, each a list of fields."""
        return csv.reader(iter(lines), delimiter=self.delimiter, quoting=self.quoting, strict=True)

    def row(self, fields: Sequence[str]) -> dict[str, str] | str:
        """Convert a record into a JSON object, or into a message about its fault."""
        if len(fields) == len(self.columns):
            return dict(zip(self.columns, fields, strict=True))
        counts = f"{len(fields)} fields, but the first line has {len(self.columns)}"
        return f"{FAULT}has {counts}."

    def _is_even(self, lines: Sequence[str]) -> bool:
        """Whether the first records have as many fields as the header."""
        found: list[int] = []
        try:
            for fields in self.parsed(lines):
                found.append(len(fields))
                if len(found) == HEAD_ROWS:
                    break
        except csv.Error:
            # The part of the file that was read may end inside a field.
            return self.quoting == csv.QUOTE_MINIMAL and len(found) >= HEAD_ROWS // 2
        found = [count for count in found if count]
        return len(set(found[:-1])) <= 1


def _records(
    name: str, stream: ByteStream, start: Position, form: _Form
) -> Iterator[tuple[int, list[str], Position]]:
    """Yield (line number, fields, position after the record); a position is (bytes, lines)."""
    stream.skip(start[0])
    at, line = start
    taken: list[int] = []

    def lines() -> Iterator[str]:
        for data in _lines(stream):
            taken.append(len(data))
            yield data.decode("utf-8", "surrogateescape")

    reader = form.parsed(lines())
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{name}:{line + 1} is not a row of a table ({brief(error)}). Fix the quotes "
                "of the file, or read it as text with --dataset_type text."
            ) from None
        if fields is None:
            return
        first = line + 1
        at, line = at + sum(taken), line + len(taken)
        taken.clear()
        if fields:
            yield first, fields, (at, line)


def _lines(stream: ByteStream) -> Iterator[bytes]:
    """Iterate over the lines of a stream, each with its line end."""
    buffer = b""
    while data := stream.read(CHUNK_BYTES):
        *whole, buffer = (buffer + data).split(b"\n")
        yield from (part + b"\n" for part in whole)
        if len(buffer) > LONGEST_FIELD:
            raise UserError(
                f"{stream.path} has a line of more than {LONGEST_FIELD >> 20} MiB, which cannot be "
                "a row. Fix the file, or give --dataset_type text."
            )
    if buffer:
        yield buffer
