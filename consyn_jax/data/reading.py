"""Files to blocks: runs of whole documents, or parts of a long one, each with the position behind it.

The main process reads, decompresses and finds the ends of documents; what a document says is the workers' matter. Reading goes on at
any position that a block gave, and holds a few megabytes whatever the input.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from consyn_jax.config import CorpusOptions, UserError
from consyn_jax.data import huggingface
from consyn_jax.data.byte_stream import CHUNK_BYTES, ByteStream
from consyn_jax.data.parts import LIMIT, parts
from consyn_jax.data.sources import SAMPLE, Source, is_array, sample_texts
from consyn_jax.data.split import SPLITS, torn
from consyn_jax.tokenization import BPETokenizer

BLOCK_BYTES = 1 << 20
# A row is parsed in one piece. No corpus for a language model has one of this size; a file without line ends may.
LONGEST_ROW = 64 << 20
SPACE, BETWEEN = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n]*[,\[]?[ \t\r\n]*")

Position = tuple[int, int]
"""Bytes of the decompressed file (rows of a Hugging Face dataset), and documents or lines, before the place."""
START: Position = (0, 0)


@dataclass(frozen=True)
class Block:
    """What one worker takes at a time.

    Attributes:
        kind: "text": documents between `separator`s; "part": a part of one document; "rows": JSON Lines.
        name: the source, for messages.
        first: number of the first document or line in the source, from 1.
        offset: where `data` begins in the source, for messages about bytes.
        end: where reading goes on behind the block; None within a document that does not fill a file.
        file_bytes: how far reading has come in the source's file.
        begins, last: of a part, whether the document begins and ends with it.
        side: the split that its documents belong to, where their text does not decide.
        numbers: of rows that were not lines, the number of each.
    """

    kind: str
    name: str
    data: bytes
    first: int
    offset: int
    end: Position | None
    file_bytes: int
    begins: bool = True
    last: bool = True
    side: str | None = None
    numbers: tuple[int, ...] = ()


def blocks(
    source: Source,
    start: Position,
    options: CorpusOptions,
    tokenizer: BPETokenizer,
    *,
    single: bool,
    columns: Sequence[str],
    test_fraction: float = 0.0,
    streaming: bool = False,
) -> Iterator[Block]:
    """The blocks of one source from `start` on.

    Args:
        single: the whole corpus is one document, which is cut by position: shares of its bytes are held out for validation and test.
        columns: what is read of a Hugging Face dataset.
        streaming: a dataset of the Hub is read over the network, and not downloaded first.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    if source.kind == SAMPLE:
        texts = sample_texts()[start[1] :]
        lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
        yield Block("rows", source.name, lines, start[1] + 1, 0, (0, start[1] + len(texts)), source.num_bytes)
    elif source.kind == "huggingface":
        yield from _dataset(source, start, columns, streaming)
    else:
        with ByteStream(Path(source.name)) as stream:
            if source.kind == "jsonl":
                yield from _array(source.name, stream, start) if is_array(Path(source.name)) else _lines(source.name, stream, start)
            elif options.document_separator is not None:
                yield from _separated(source.name, stream, start, separator(options), tokenizer)
            else:
                yield from _whole(source.name, stream, start, (options.validation_fraction, test_fraction) if single else None, tokenizer)


def separator(options: CorpusOptions) -> bytes:
    r"""`--document_separator` as bytes, its \n and \t read as newline and tab."""
    return (options.document_separator or "").replace("\\n", "\n").replace("\\t", "\t").encode()


def _whole(name: str, stream: ByteStream, start: Position, shares: tuple[float, float] | None, tokenizer: BPETokenizer) -> Iterator[Block]:
    """A file that is one document; with `shares`, its last bytes are documents of their own for validation and test.

    Reading may begin at any part: where one is cut depends on what comes behind the one before and on nothing else. A position within
    the file counts no documents, and the one at its end counts one.
    """
    if start[1]:
        return
    spans: list[tuple[str | None, int, int]] = [(None, 0, -1)]
    if shares is not None:
        size = _size(stream.path)
        ends = [0, _cut(stream.path, int((1 - sum(shares)) * size)), _cut(stream.path, int((1 - shares[1]) * size)), size]
        spans = [(side, *span) for side, span in zip(SPLITS, pairwise(ends), strict=True) if span[0] < span[1]]
    stream.skip(start[0])
    at = start[0]
    for side, first, stop in spans:
        if 0 <= stop <= at:
            continue
        begins = at == first
        for data, last in parts(_chunks(stream, stop - at if stop >= 0 else -1), tokenizer):
            at_end = last and stop == spans[-1][2]
            yield Block("part", name, data, 1, at, (at + len(data), int(at_end)), stream.file_bytes, begins, last, side)
            at, begins = at + len(data), False


def _chunks(stream: ByteStream, length: int) -> Iterator[bytes]:
    """The next `length` bytes (all when negative)."""
    while length and (data := stream.read(CHUNK_BYTES if length < 0 else min(CHUNK_BYTES, length))):
        length -= len(data) if length > 0 else 0
        yield data


def _size(path: Path) -> int:
    with ByteStream(path) as stream:
        return sum(len(chunk) for chunk in _chunks(stream, -1))


def _cut(path: Path, at: int) -> int:
    """`at`, or the beginning of the character that it would tear."""
    with ByteStream(path) as stream:
        stream.skip(max(at - 3, 0))
        data = stream.read(min(at, 3) + 1)
    return at - torn(data) if len(data) == min(at, 3) + 1 else at


def _separated(name: str, stream: ByteStream, start: Position, separator: bytes, tokenizer: BPETokenizer) -> Iterator[Block]:
    """Blocks of whole documents, each with its separator behind it; a document above `LIMIT` in parts, as if it were a file of its own."""
    stream.skip(start[0])
    at, number = start
    buffer = b""
    while True:
        more = stream.read(BLOCK_BYTES)
        buffer += more
        # From the left: where separators overlap, as in three newlines, the first counts, and where blocks end must not change that.
        documents = buffer.split(separator)
        if more or not documents[-1]:
            documents.pop()
        short = list(takewhile(lambda document: len(document) <= LIMIT, documents))
        if short:
            data = b"".join(document + separator for document in short)[: len(buffer)]  # the last one of a file may lack it
            buffer = buffer[len(data) :]
            yield Block("text", name, data, number + 1, at, (at + len(data), number + len(short)), stream.file_bytes)
            at, number = at + len(data), number + len(short)
        if len(short) < len(documents) or len(buffer) > LIMIT:
            document, begins = _Document(stream, buffer, separator), True
            for data, last in parts(document, tokenizer):
                end = (at + len(data) + document.separator_bytes, number + 1) if last else None
                yield Block("part", name, data, number + 1, at, end, stream.file_bytes, begins, last)
                at, begins = at + len(data), False
            at, number, buffer = at + document.separator_bytes, number + 1, document.rest
        elif not more:
            return


class _Document:
    """The bytes up to the next separator; afterwards `rest` is what was read behind it."""

    def __init__(self, stream: ByteStream, begun: bytes, separator: bytes) -> None:
        self.stream, self.begun, self.separator = stream, begun, separator
        self.rest, self.separator_bytes = b"", 0

    def __iter__(self) -> Iterator[bytes]:
        buffer, keep = self.begun, len(self.separator) - 1
        while True:
            found = buffer.find(self.separator)
            if found >= 0:
                self.separator_bytes = len(self.separator)
                self.rest = buffer[found + len(self.separator) :]
                yield buffer[:found]
                return
            more = self.stream.read(BLOCK_BYTES)
            if not more:
                yield buffer
                return
            yield buffer[: len(buffer) - keep]
            buffer = buffer[len(buffer) - keep :] + more


def _lines(name: str, stream: ByteStream, start: Position) -> Iterator[Block]:
    stream.skip(start[0])
    at, number = start
    buffer = b""
    while True:
        more = stream.read(BLOCK_BYTES)
        buffer += more
        end = buffer.rfind(b"\n") + 1 if more else len(buffer)
        if end:
            data, buffer = buffer[:end], buffer[end:]
            count = data.count(b"\n") + (not data.endswith(b"\n"))
            yield Block("rows", name, data, number + 1, at, (at + end, number + count), stream.file_bytes)
            at, number = at + end, number + count
        if not more:
            return
        if len(buffer) > LONGEST_ROW:
            # What a row says of itself is not known yet, so it is no case for --on_bad_rows.
            raise UserError(f"{name}:{number + 1} is a line of more than {LONGEST_ROW >> 20} MiB, which is no row. Mend the file, or read it as text.")


def _array(name: str, stream: ByteStream, start: Position) -> Iterator[Block]:
    """The elements of one JSON array as rows. There is no way to find the next row behind broken JSON, so `on_bad_rows` does not cover it."""
    rows: list[bytes] = []
    numbers: list[int] = []
    size = 0
    for line, row, end in _elements(name, stream, start):
        # A JSON string holds no newline as it is, so these are white space.
        rows.append(row.replace("\n", " ").encode("utf-8", "surrogateescape") + b"\n")
        numbers.append(line)
        size += len(rows[-1])
        if size >= BLOCK_BYTES:
            yield Block("rows", name, b"".join(rows), numbers[0], 0, end, stream.file_bytes, numbers=tuple(numbers))
            rows, numbers, size = [], [], 0
    if rows:
        yield Block("rows", name, b"".join(rows), numbers[0], 0, end, stream.file_bytes, numbers=tuple(numbers))


def _elements(name: str, stream: ByteStream, start: Position) -> Iterator[tuple[int, str, Position]]:
    """(line, element as it is written, position behind it): position counts bytes, and lines before it."""
    stream.skip(start[0])
    at, line = start[0], start[1] + 1
    # Bytes that are not UTF-8 stay as they are, for whoever reads the row to judge.
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    decoder, buffer, size = json.JSONDecoder(), "", CHUNK_BYTES
    after = "," if start[0] else "["
    while True:
        more = stream.read(size)
        buffer += text.decode(more, final=not more)
        position, size = 0, max(min(size * 2, LONGEST_ROW - len(buffer)), CHUNK_BYTES)  # doubling keeps a row of any length linear
        while True:
            try:
                begin, end = _element(decoder, buffer, position, after)
            except (ValueError, RecursionError) as error:
                too_deep, too_long = isinstance(error, RecursionError), len(buffer) - position > LONGEST_ROW
                if more and not (too_deep or too_long):
                    break
                reason = "nested too deeply" if too_deep else f"no row ends within {LONGEST_ROW >> 20} MiB" if more else str(error)[:200]
                line += buffer[position : BETWEEN.match(buffer, position).end()].count("\n")  # type: ignore[union-attr]
                raise UserError(f"{name}:{line} is broken JSON ({reason}). Mend the array; its rows cannot be skipped.") from None
            line += buffer.count("\n", position, begin)
            if end < 0:
                _check_rest(name, line, stream, buffer[begin + 1 :])
                return
            first = line
            line += buffer.count("\n", begin, end)
            at += len(buffer[position:end].encode("utf-8", "surrogateescape"))
            yield first, buffer[begin:end], (at, line - 1)
            position, after, size = end, ",", CHUNK_BYTES
        buffer = buffer[position:]


def _check_rest(name: str, line: int, stream: ByteStream, text: str) -> None:
    """What follows the array must be nothing: what would be left out without a word may be half the data."""
    rest = text.encode("utf-8", "surrogateescape")
    while rest.isspace() or not rest:
        rest = stream.read(CHUNK_BYTES)
        if not rest:
            return
    raise UserError(f"{name}:{line} ends its array of rows, and more follows it. Give a file with one array, or JSON Lines.")


def _element(decoder: json.JSONDecoder, buffer: str, position: int, after: str) -> tuple[int, int]:
    """(start, end) of the next element behind the mark `after`; end is -1 behind the last one. ValueError: not there (yet)."""

    def skip(at: int) -> int:
        match = SPACE.match(buffer, at)
        return match.end() if match else at

    start = skip(position)
    mark = buffer[start : start + 1]
    if mark == "]" and after == ",":
        return start, -1
    if mark != after:
        raise ValueError(f"{after!r} or ']' expected" if after == "," else "'[' expected")
    start = skip(start + 1)
    if after == "[" and buffer[start : start + 1] == "]":
        return start, -1
    end = decoder.raw_decode(buffer, start)[1]
    if not buffer[skip(end) : skip(end) + 1]:
        raise ValueError("',' or ']' expected")  # a number could go on in the next chunk
    return start, end


def _dataset(source: Source, start: Position, columns: Sequence[str], streaming: bool) -> Iterator[Block]:
    """Rows of a Hugging Face dataset, written as the JSON Lines that they would be."""
    number = start[1]
    for batch in huggingface.rows(source.name, start[0], columns, streaming=streaming):
        lines = b"".join(json.dumps(row, ensure_ascii=False, default=_in_json).encode("utf-8", "surrogateescape") + b"\n" for row in batch.rows)
        numbers = tuple(range(number + 1, number + len(batch.rows) + 1))
        number += len(batch.rows)
        yield Block("rows", source.name, lines, numbers[0], 0, (batch.position, number), batch.bytes_done, numbers=numbers)


def _in_json(value: Any) -> str:
    r"""What JSON has no value for: binary columns hold text, whose bytes stay as they are; the rest is written as Python shows it.

    >>> _in_json("é".encode()), _in_json(b"\xff"), _in_json(3 + 4j)
    ('é', '\udcff', '(3+4j)')
    """
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
