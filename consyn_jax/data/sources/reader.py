"""The interface of a dataset type. A `Reader` recognises files of its type and reads blocks.

A new type needs one module with a `Reader`, and one line in the table of `source.py`. The main
process reads, decompresses and finds the ends of documents. Worker processes clean and tokenise the
documents. Reading can resume at the end of any block, and needs only a few megabytes of memory.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from consyn_jax.data.sources.byte_stream import ByteStream
from consyn_jax.errors import UserError
from consyn_jax.files import LFS_POINTER
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.tokenization import BPETokenizer

# Files with these suffixes are recognised as text, even if they begin like JSON rows.
TEXT_SUFFIXES = (".txt", ".md")
COMPRESSED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
ARCHIVES = {b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a rar archive"}
# Office files, which are zip archives and are recognised by their suffix.
OFFICE = {
    ".xlsx": "an Excel workbook, which has to be exported as CSV",
    ".ods": "a spreadsheet, which has to be exported as CSV",
    ".docx": "a Word document, which has to be exported as text",
    ".odt": "a text document, which has to be exported as text",
    ".pptx": "a presentation, which has to be exported as text",
    ".epub": "a book, which has to be converted to text",
}
PDF = b"%PDF-"
UTF16_SHARE = 0.9  # share of ASCII characters from which text counts as UTF-16
FEWEST_UTF16 = 16  # bytes needed to recognise UTF-16
REMEDY = "Convert the file to UTF-8, leave it out, or give --invalid_utf8 replace."
HEAD_BYTES = 65_536
BLOCK_BYTES = 1 << 20

Position = tuple[int, int]
"""A position in a source, as two counts of what precedes it. The first counts bytes of the
decompressed file, or rows of a Hugging Face dataset. The second counts documents or lines.
"""
START: Position = (0, 0)


@dataclass(frozen=True)
class Block:
    """The unit of work for a worker process: several whole documents, or a part of a long document.

    Attributes:
        kind: "text" for documents with separators between them, "part" for a part of one document,
            "rows" for JSON Lines with one row per document (see `rows.py`).
        name: name of the source, for messages.
        first: number of the first document or line in the source, from 1.
        offset: position of `data` in the source in bytes, for messages.
        end: position at which reading can resume after the block. It is None inside a long document
            of a file with separators, where reading cannot resume.
        file_bytes: number of bytes of the source's file read so far, for progress.
        begins: whether a part is the first of its document.
        last: whether a part is the last of its document.
        split: the split of the documents; None if a hash of the text decides the split.
        numbers: number of each row in the source, if rows are not lines of a file.
        unread: columns of a table that were not read, because no option needs them.
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
    split: str | None = None
    numbers: tuple[int, ...] = ()
    unread: tuple[str, ...] = ()

    @classmethod
    def each_of_rows(
        cls, name: str, rows: Iterable[tuple[int, bytes, Position]], stream: ByteStream
    ) -> Iterator[Block]:
        """Group rows into blocks; a row is (number, JSON without newlines, end position)."""
        found: list[bytes] = []
        numbers: list[int] = []
        size, end = 0, START
        for number, row, end in rows:
            found.append(row)
            numbers.append(number)
            size += len(row) + 1
            if size >= BLOCK_BYTES:
                yield cls.of_rows(name, found, numbers, end, stream.file_bytes)
                found, numbers, size = [], [], 0
        if found:
            yield cls.of_rows(name, found, numbers, end, stream.file_bytes)

    @classmethod
    def of_rows(
        cls,
        name: str,
        rows: Sequence[bytes],
        numbers: Sequence[int],
        end: Position,
        file_bytes: int,
        unread: tuple[str, ...] = (),
    ) -> Block:
        """Build a block of one or more rows, each a JSON object without newlines."""
        data = b"".join(row + b"\n" for row in rows)
        return cls(
            *("rows", name, data, numbers[0], 0, end, file_bytes),
            numbers=tuple(numbers),
            unread=unread,
        )


@dataclass(frozen=True)
class Reading:
    """Settings for reading the sources of a preparation, the same for all sources.

    Attributes:
        options: the user's flags.
        tokenizer: the tokenizer. Long documents are cut only at positions where the cut does not
            change the token ids.
        single: whether the corpus is one document. Its last parts are then held out for validation
            and test.
        test_fraction: share of the text held out for test.
        streaming: whether to read Hub datasets over the network, without downloading them first.
    """

    options: CorpusOptions
    tokenizer: BPETokenizer
    single: bool = False
    test_fraction: float = 0.0
    streaming: bool = False


class Reader(ABC):
    """The interface of a dataset type.

    A source of this type has a string as its name, usually its path.

    Attributes:
        kind: name of the type, a value of `--dataset_type` and part of cache keys.
        noun: description of the content of a source in messages, as in "holds NOUN".
        unit: name of one source in reports, as in "2 UNITs".
        suffixes: suffixes of file names of this type.
    """

    kind: ClassVar[str]
    noun: ClassVar[str]
    unit: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()

    def recognise(self, file: Candidate) -> str | None:
        """Recognise a regular file.

        Returns:
            None if the file has another type, "" if it is usable, otherwise its fault. A fault,
            such as "is empty", completes a sentence that begins with the name of the file.
        """
        return None

    def is_source(self, path: Path) -> bool:
        """Whether a directory or a name PATH:SPLIT is one source of this type."""
        return False

    def other_splits(self, path: Path) -> tuple[str, ...]:
        """List the non-default splits of a directory that is read as one source."""
        return ()

    def remote_name(self, name: str) -> str | None:
        """Return the name of remote data with its current version; None if `name` is not remote.

        Raises:
            UserError: `name` has the form of a remote name, but cannot be found.
        """
        return None

    def remote_splits(self, name: str, remote: str) -> tuple[str, ...]:
        """List the non-default splits of remote data, as names of sources.

        The list is empty if `name` already selects a split.

        Args:
            remote: the result of `remote_name`.

        Raises:
            UserError: the data cannot be found.
        """
        return ()

    def describe(self, name: str) -> str:
        """Describe a source for messages, such as "a token store"."""
        return self.noun

    def files(self, name: str) -> tuple[Path, ...]:
        """List the files whose bytes determine the data; empty if the name alone identifies it."""
        return (Path(name),)

    def size(self, name: str) -> int:
        """Return the number of bytes to read, for progress; 0 if unknown.

        Raises:
            OSError: a file cannot be read.
        """
        return Path(name).stat().st_size

    def identity(self, name: str, file_hash: Callable[[Path], str]) -> list[Any]:
        """Return the source's entry in the cache key: [kind, is_json_array, file_hashes]."""
        return [self.kind, False, [file_hash(file) for file in self.files(name)] or [name]]

    def is_one_document(self, options: CorpusOptions) -> bool:
        """Whether each source of this type is exactly one document."""
        return False

    def can_seek(self, name: str) -> bool:
        """Whether reading can start at a position without reading everything before it.

        Raises:
            UserError: the source cannot be read.
        """
        with ByteStream(Path(name)) as stream:
            return stream.is_plain

    @abstractmethod
    def blocks(self, name: str, start: Position, reading: Reading) -> Iterator[Block]:
        """Read the blocks of a source from position `start` on.

        Raises:
            UserError: the source cannot be read; the message names the file and the fault.
        """


class Candidate:
    """A file whose type is not known yet.

    Attributes:
        path: path of the file.
        dataset_type: the value of `--dataset_type`.
        suffix: the file's suffix in lower case, without a compression suffix.
    """

    def __init__(self, path: Path, dataset_type: str = "auto", invalid_utf8: str = "error") -> None:
        self.path, self.dataset_type, self._invalid_utf8 = path, dataset_type, invalid_utf8
        self.suffix = inner_suffix(path)

    @property
    def head(self) -> bytes:
        """The first `HEAD_BYTES` bytes after decompression; empty if the file cannot be read."""
        return self._beginning[0]

    def text_fault(self, *, check_utf8: bool = True) -> str:
        """Return the reason why the file cannot be read as text, or ""."""
        head, fault = self._beginning
        if not head:
            return fault or "is empty"
        if head.startswith(LFS_POINTER):
            return "is a Git LFS pointer, not the data; git lfs pull fetches the data"
        if head.startswith(PDF):
            return "is a PDF, which has to be converted to text"
        if head.startswith(b"PK") and self.suffix in OFFICE:
            return f"is {OFFICE[self.suffix]}"
        archive = next((what for magic, what in ARCHIVES.items() if head.startswith(magic)), "")
        if archive or head[257:262] == b"ustar":
            return f"is {archive or 'a tar archive'}, and has to be unpacked first"
        is_text = b"\0" not in head and (not check_utf8 or self._invalid_utf8 == "replace")
        return "" if is_text else binary_fault(head, complete=len(head) < HEAD_BYTES)

    @cached_property
    def _beginning(self) -> tuple[bytes, str]:
        """The head of the file, and the reason why it cannot be read; "" if there is none."""
        try:
            with ByteStream(self.path) as stream:
                return stream.read(HEAD_BYTES), ""
        except UserError as error:  # remove the name of the file, which a fault must not contain
            return b"", str(error).removeprefix(f"{self.path} ").split(". ")[0].rstrip(".")


def inner_suffix(path: Path) -> str:
    """Return the suffix of a file in lower case, ignoring a compression suffix.

    >>> inner_suffix(Path("a.JSONL.gz")), inner_suffix(Path("a.txt"))
    ('.jsonl', '.txt')
    """
    is_compressed = path.suffix.lower() in COMPRESSED_SUFFIXES
    return (Path(path.stem) if is_compressed else path).suffix.lower()


def binary_fault(data: bytes, *, complete: bool) -> str:
    r"""Say at which position and why `data` is not UTF-8 text; "" if it is text.

    Args:
        data: the beginning of a file.
        complete: whether `data` is the whole file. If not, its last character may be incomplete.

    >>> binary_fault(b"a\x00", complete=True)
    'is binary: byte 1 is NUL'
    """
    nul = data.find(b"\0")
    if nul >= 0:
        if _is_utf16(data):
            return "is UTF-16 text without a byte order mark, and has to be converted"
        return f"is binary: byte {nul} is NUL"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data, complete)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return f"is not UTF-8 text: byte {error.start} (line {line}) is 0x{data[error.start]:02x}"
    return ""


def _is_utf16(data: bytes) -> bool:
    """Whether nearly all pairs of bytes are an ASCII character and a zero byte."""
    if len(data) < FEWEST_UTF16:
        return False
    halves = sorted((data[::2], data[1::2]), key=lambda half: half.count(0))
    text = sum(byte in b"\t\n\r" or 32 <= byte < 127 for byte in halves[0])
    return min(text, halves[1].count(0)) >= UTF16_SHARE * len(halves[1])
