"""Read files of JSON rows: JSON Lines, or one array."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from consyn_jax.data.sources.byte_stream import CHUNK_BYTES, ByteStream
from consyn_jax.data.sources.reader import (
    BLOCK_BYTES,
    HEAD_BYTES,
    TEXT_SUFFIXES,
    Block,
    Candidate,
    Position,
    Reader,
    Reading,
    inner_suffix,
)
from consyn_jax.errors import TOO_LONG, UserError, parse_fault

LINES_SUFFIXES = (".jsonl", ".ndjson")
# Largest size of a row in bytes, because a row is parsed in memory. No text corpus has longer rows,
# but a file without line ends may look like one long row.
LONGEST_ROW = 64 << 20
# Matches an object that begins with a key whose value is an array of objects.
INNER_ROWS = re.compile(rb'\{\s*"([^"\\]{1,60})"\s*:\s*\[\s*\{')
SPACE, BETWEEN = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n]*[,\[]?[ \t\r\n]*")


class JsonReader(Reader):
    """Files of JSON rows, which may be compressed."""

    kind, noun, unit = "jsonl", "JSON rows", "file of JSON rows"
    suffixes = (*LINES_SUFFIXES, ".json")

    def recognise(self, file: Candidate) -> str | None:
        """Recognise a file of rows by its suffix or its first lines.

        Invalid UTF-8 does not make the file unusable, because single rows can be left out.
        """
        if _has_rows(file):
            return file.text_fault(check_utf8=False)
        if file.suffix != ".json":
            return None
        no_rows = "is JSON but not rows (neither JSON Lines of two or more rows nor one array)"
        if found := INNER_ROWS.match(file.head.lstrip()):
            no_rows += f"; its rows may be the array under {found[1].decode(errors='replace')!r}"
        return file.text_fault() or no_rows

    def identity(self, name: str, file_hash: Callable[[Path], str]) -> list[Any]:
        """Return [kind, True if the file is read as one array, hashes of the file]."""
        kind, _, hashes = super().identity(name, file_hash)
        return [kind, is_array(Path(name)), hashes]

    def blocks(self, name: str, start: Position, reading: Reading) -> Iterator[Block]:
        """Yield the rows of the file, as JSON Lines or as an array, in blocks."""
        with ByteStream(Path(name)) as stream:
            read = _array if is_array(Path(name)) else _lines
            yield from read(name, stream, start)


def is_array(path: Path) -> bool:
    """Whether a file of JSON rows is one array and not JSON Lines."""
    with ByteStream(path) as stream:
        head = stream.read(HEAD_BYTES).lstrip()
    # A .jsonl file may be one array of objects. In other .jsonl files, an array is a faulty row.
    begins = b"[" if inner_suffix(path) not in LINES_SUFFIXES else b"[{"
    return b"".join(head[:100].split()).startswith(begins)


def _has_rows(file: Candidate) -> bool:
    body = file.head.lstrip()
    if file.dataset_type == JsonReader.kind and body[:1] in (b"{", b"["):
        return True
    if file.suffix in LINES_SUFFIXES or (file.suffix == ".json" and body[:1] == b"["):
        return True
    if file.suffix in TEXT_SUFFIXES or body[:1] != b"{":
        return False
    line, _, rest = body.partition(b"\n")
    try:
        # A single object is more likely a settings file than a corpus of one row.
        return isinstance(json.loads(line), dict) and bool(rest.strip())
    except (ValueError, RecursionError):
        return False


# ------------------------------------------------------------------------------------------- lines


def _lines(name: str, stream: ByteStream, start: Position) -> Iterator[Block]:
    stream.skip(start[0])
    at, number = start
    buffer = b""
    while True:
        more = stream.read(BLOCK_BYTES)
        buffer += more
        stop = buffer.rfind(b"\n") + 1 if more else len(buffer)
        if stop:
            data, buffer = buffer[:stop], buffer[stop:]
            count = data.count(b"\n") + (not data.endswith(b"\n"))
            end = (at + stop, number + count)
            yield Block("rows", name, data, number + 1, at, end, stream.file_bytes)
            at, number = end
        if not more:
            return
        if len(buffer) > LONGEST_ROW:
            # The end of the row is not known, so --on_bad_rows cannot skip it.
            raise UserError(
                f"{name}:{number + 1} is a line of more than {LONGEST_ROW >> 20} MiB, which cannot "
                "be a row. Fix the file, or give --dataset_type text."
            )


# ------------------------------------------------------------------------------------------- array


def _array(name: str, stream: ByteStream, start: Position) -> Iterator[Block]:
    """Read the elements of one JSON array as rows.

    After broken JSON, the start of the next row is unknown, so `--on_bad_rows` does not apply.
    """
    rows = (
        # A JSON string cannot contain a raw newline, so all newlines are white space.
        (line, row.replace("\n", " ").encode("utf-8", "surrogateescape"), end)
        for line, row, end in _elements(name, stream, start)
    )
    yield from Block.each_of_rows(name, rows, stream)


def _elements(
    name: str, stream: ByteStream, start: Position
) -> Iterator[tuple[int, str, Position]]:
    """Yield (line, element as text, end position); positions count bytes and lines."""
    stream.skip(start[0])
    at, line = start[0], start[1] + 1
    # Keep invalid UTF-8 here; the workers repair or refuse the row.
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    decoder, buffer, size = json.JSONDecoder(), "", CHUNK_BYTES
    mark = "," if start[0] else "["
    while True:
        more = stream.read(size)
        buffer += text.decode(more, final=not more)
        # Double the size, so that the time is linear in the length of a row.
        size = max(min(size * 2, LONGEST_ROW - len(buffer)), CHUNK_BYTES)
        position = 0
        while True:
            try:
                begin, end = _element(decoder, buffer, position, mark)
            except (ValueError, RecursionError) as error:
                fault = _fault(error, len(buffer) - position, bool(more))
                if not fault:
                    break
                between = BETWEEN.match(buffer, position)
                line += between[0].count("\n") if between else 0
                raise UserError(
                    f"{name}:{line} is broken JSON ({fault}). "
                    "Fix the array; its rows cannot be skipped."
                ) from None
            line += buffer.count("\n", position, begin)
            if end < 0:
                _check_rest(name, line, stream, buffer[begin + 1 :])
                return
            first = line
            line += buffer.count("\n", begin, end)
            at += len(buffer[position:end].encode("utf-8", "surrogateescape"))
            yield first, buffer[begin:end], (at, line - 1)
            position, mark, size = end, ",", CHUNK_BYTES
        buffer = buffer[position:]


def _fault(error: Exception, length: int, more: bool) -> str:
    """Describe why an element does not parse; "" if more data may complete it.

    Args:
        length: number of characters after the previous element.
        more: whether the file continues.
    """
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if TOO_LONG in (fault := parse_fault(error)):
        return f"it {fault}"
    if not more:
        return str(error)[:200]
    return f"no row ends within {LONGEST_ROW >> 20} MiB" if length > LONGEST_ROW else ""


def _check_rest(name: str, line: int, stream: ByteStream, text: str) -> None:
    """Refuse text after the array, because ignoring it could lose half of the data."""
    rest = text.encode("utf-8", "surrogateescape")
    while rest.isspace() or not rest:
        rest = stream.read(CHUNK_BYTES)
        if not rest:
            return
    raise UserError(
        f"{name}: the array of rows ends in line {line}, and more text follows it. "
        "Give a file with one array, or JSON Lines."
    )


def _element(decoder: json.JSONDecoder, buffer: str, position: int, mark: str) -> tuple[int, int]:
    """Find (start, end) of the element after `mark`; end is -1 if no element is left.

    Raises:
        ValueError: the element is broken or incomplete.
    """

    def skip(at: int) -> int:
        match = SPACE.match(buffer, at)
        return match.end() if match else at

    start = skip(position)
    found = buffer[start : start + 1]
    if found == "]" and mark == ",":
        return start, -1
    if found != mark:
        raise ValueError(f"{mark!r} or ']' expected" if mark == "," else "'[' expected")
    start = skip(start + 1)
    if mark == "[" and buffer[start : start + 1] == "]":
        return start, -1
    end = decoder.raw_decode(buffer, start)[1]
    if not buffer[skip(end) : skip(end) + 1]:
        raise ValueError("',' or ']' expected")  # a number may continue in the next chunk
    return start, end
