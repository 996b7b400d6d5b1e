"""Read text files: a file is one document, or several documents with separators between them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import pairwise, takewhile
from pathlib import Path

from consyn_jax.data.sources.byte_stream import CHUNK_BYTES, ByteStream
from consyn_jax.data.sources.chunking import LIMIT, parts
from consyn_jax.data.sources.reader import (
    BLOCK_BYTES,
    TEXT_SUFFIXES,
    Block,
    Candidate,
    Position,
    Reader,
    Reading,
)
from consyn_jax.data.split import SPLITS, torn
from consyn_jax.prepare_config import CorpusOptions


class TextReader(Reader):
    """UTF-8 text, which may be compressed."""

    kind, noun, unit = "text", "text", "text file"
    suffixes = TEXT_SUFFIXES

    def recognise(self, file: Candidate) -> str | None:
        """Recognise any file of UTF-8 text."""
        return file.text_fault()

    def is_one_document(self, options: CorpusOptions) -> bool:
        """Whether each file is one document, because there is no `--document_separator`."""
        return options.document_separator is None

    def blocks(self, name: str, start: Position, reading: Reading) -> Iterator[Block]:
        """Read whole documents, or parts of long documents."""
        with ByteStream(Path(name)) as stream:
            read = _whole if reading.options.document_separator is None else _separated
            yield from read(name, stream, start, reading)


def separator(options: CorpusOptions) -> bytes:
    r"""Return `--document_separator` as bytes; \n and \t in it mean newline and tab."""
    return (options.document_separator or "").replace("\\n", "\n").replace("\\t", "\t").encode()


# ----------------------------------------------------------------------------- one document a file


def _whole(name: str, stream: ByteStream, start: Position, reading: Reading) -> Iterator[Block]:
    """Yield the parts of a file without separators.

    The file is one document. If it is the whole corpus (`reading.single`), it is cut into one
    document for each split. Reading can resume after any part, because the division into parts
    does not depend on earlier text.

    Args:
        start: (bytes before the first part to read, number of finished documents). The number is 1
            at the end of the file, and 0 before that.
    """
    if start[1]:
        return
    spans = _spans(stream.path, reading)
    stream.skip(start[0])
    at = start[0]
    for split, first, stop in spans:
        if 0 <= stop <= at:
            continue
        begins = at == first
        chunks = _chunks(stream, stop - at if stop >= 0 else -1)
        for data, last in parts(chunks, reading.tokenizer):
            at_end = last and stop == spans[-1][2]
            end = (at + len(data), int(at_end))
            yield Block("part", name, data, 1, at, end, stream.file_bytes, begins, last, split)
            at, begins = at + len(data), False


def _spans(path: Path, reading: Reading) -> list[tuple[str | None, int, int]]:
    """List the documents of a file as (split, start, stop); stop -1 means the end of the file."""
    if not reading.single:
        return [(None, 0, -1)]
    with ByteStream(path) as stream:
        size = stream.num_bytes
        if size is None:
            size = sum(len(chunk) for chunk in _chunks(stream, -1))
    validation, test = reading.options.validation_fraction, reading.test_fraction
    cuts = [int((1 - (validation + test)) * size), int((1 - test) * size)]
    ends = [0, *(_character(path, at) for at in cuts), size]
    spans = zip(SPLITS, pairwise(ends), strict=True)
    return [(split, *span) for split, span in spans if span[0] < span[1]]


def _chunks(stream: ByteStream, length: int) -> Iterator[bytes]:
    """Read the next `length` bytes in chunks; all bytes if `length` is negative."""
    while length and (data := stream.read(CHUNK_BYTES if length < 0 else min(CHUNK_BYTES, length))):
        length -= len(data) if length > 0 else 0
        yield data


def _character(path: Path, at: int) -> int:
    """Return the start of the UTF-8 character that contains byte `at`."""
    with ByteStream(path) as stream:
        stream.skip(max(at - 3, 0))
        data = stream.read(min(at, 3) + 1)
    return at - torn(data) if len(data) == min(at, 3) + 1 else at


# ------------------------------------------------------------------------------------- separators


def _separated(name: str, stream: ByteStream, start: Position, reading: Reading) -> Iterator[Block]:
    """Read blocks of whole documents, each followed by its separator.

    A document of more than `LIMIT` bytes is split into several blocks.
    """
    stream.skip(start[0])
    at, number = start
    buffer, ends = b"", separator(reading.options)
    while True:
        more = stream.read(BLOCK_BYTES)
        buffer += more
        # Separators are found from left to right. If two separators overlap, as in three newlines,
        # the first one counts, also at the end of a block.
        documents = buffer.split(ends)
        if more or not documents[-1]:
            documents.pop()
        short = list(takewhile(lambda document: len(document) <= LIMIT, documents))
        if short:
            # The last document of a file may lack its separator.
            data = b"".join(document + ends for document in short)[: len(buffer)]
            buffer = buffer[len(data) :]
            end = (at + len(data), number + len(short))
            yield Block("text", name, data, number + 1, at, end, stream.file_bytes)
            at, number = end
        if len(short) < len(documents) or len(buffer) > LIMIT:
            document = _Document(stream, buffer, ends)
            at = yield from _long(name, document, number, at, reading)
            number, buffer = number + 1, document.rest
        elif not more:
            return


def _long(
    name: str, document: _Document, number: int, at: int, reading: Reading
) -> Generator[Block, None, int]:
    """Yield the parts of one long document; return the offset after its separator.

    Args:
        number: Number of documents before this one in the file.
        at: Byte offset of the document in the file.
    """
    begins = True
    for data, last in parts(document, reading.tokenizer):
        stop = at + len(data)
        end = (stop + document.separator_bytes, number + 1) if last else None
        read = document.stream.file_bytes
        yield Block("part", name, data, number + 1, at, end, read, begins, last)
        at, begins = stop, False
    return at + document.separator_bytes


class _Document:
    """Iterates over a document's bytes; the bytes after its separator go to `rest`."""

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
