"""Paths, globs, directories and "sample" to documents: what is there, how it is read, and what was left out.

A text file is one document; a row of JSON Lines, or of one JSON array, is one document. Kinds are found by looking at the files.
Order is the order of the names given, and the sorted order within a directory or glob. JSON rows are streamed; a text file is
read whole, because it is one document.
"""

from __future__ import annotations

import codecs
import glob
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from consyn_jax.config import UserError, nearest

SAMPLE = "sample"
MANIFEST = "manifest.json"
TEXT_SUFFIXES = (".txt", ".md")
ROW_SUFFIXES = (".jsonl", ".ndjson")
NAMES = {"text": "text", "jsonl": "JSON rows", "sharded": "a token store"}
HEAD_BYTES = 65_536
CHUNK_BYTES = 1 << 20
SHOWN_BAD_ROWS = 5
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Source:
    """One input: a file, a token store, or the sample.

    Attributes:
        name: the path, or "sample".
        kind: "text", "jsonl", "sharded" or "sample".
    """

    name: str
    kind: str

    @property
    def num_bytes(self) -> int:
        """Size on disk, for progress; the sample counts its text."""
        if self.kind == SAMPLE:
            return sum(len(text.encode()) for text in sample_texts())
        return Path(self.name).stat().st_size


@dataclass(frozen=True)
class Corpus:
    """What `find_sources` found, in reading order, and the files of directories that it left out, each with the reason."""

    sources: tuple[Source, ...]
    left_out: tuple[tuple[str, str], ...]


@dataclass
class ReadReport:
    """Counts of one pass over a corpus, updated while `read_documents` runs.

    Attributes:
        documents: documents given out.
        empty: documents of nothing but white space, left out.
        bad_rows: JSON rows left out under `on_bad_rows="skip"`; `bad_row_examples` holds the first few messages.
        file_bytes: how far reading has come, in bytes of the files.
    """

    documents: int = 0
    empty: int = 0
    bad_rows: int = 0
    bad_row_examples: list[str] = field(default_factory=list)
    file_bytes: int = 0


class _BadRow(Exception):
    """What is wrong with one row; the reader adds the place and decides."""


# --------------------------------------------------------------------------------------------------------------------- finding


def find_sources(data: Sequence[str], dataset_type: str = "auto", flag: str = "data") -> Corpus:
    """The files behind `data`, each with its kind.

    Args:
        data: paths, directories, globs (`**` reaches into directories) or "sample" (`./sample` for a file of that name).
        dataset_type: "auto" looks; "text", "jsonl" or "sharded" must be what is there.
        flag: what the user gave `data` to, for messages.

    Raises:
        UserError: nothing there, nothing usable, or not of the kind asked for.
    """
    used: dict[str, Source] = {}
    left_out: list[tuple[str, str]] = []
    for name in data:
        for item in _expand(name, flag):
            for source, reason in _look_into(item, dataset_type):
                if source.name in used:
                    left_out.append((source.name, "is named twice"))
                elif reason:
                    left_out.append((source.name, reason))
                else:
                    used[source.name] = source
    if not used:
        raise UserError(f"--{flag} names nothing to read. Give a file, a directory, a glob or 'sample'.")
    if len(used) > 1 and any(source.kind == "sharded" for source in used.values()):
        store = next(source.name for source in used.values() if source.kind == "sharded")
        raise UserError(f"{store} is a token store, and a token store stands alone in --{flag}. Give it without the other paths.")
    return Corpus(tuple(used.values()), tuple(left_out))


def _expand(name: str, flag: str) -> list[str]:
    """The paths behind one item of `--data` or `--validation`, as the shell would give them."""
    if name == SAMPLE:
        return [name]
    path = Path(name).expanduser()
    try:
        exists = path.exists()
    except OSError as error:
        raise UserError(f"{name} in --{flag} cannot be read: {error.strerror}. Check the path and its permissions.") from error
    if exists:
        return [str(path)]
    if glob.has_magic(name):
        found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (patterns may be absolute)
        if not found:
            raise UserError(f"The pattern {name} in --{flag} matches no file. Check it, or quote it if the shell should not expand it.")
        return found
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"{name} in --{flag} does not exist{nearest(path.name, siblings)} Give a file, a directory, a glob or 'sample'.")


def _look_into(name: str, dataset_type: str) -> Iterator[tuple[Source, str]]:
    """The sources of one existing path, each with the reason why it is left out, or "". A named file is never left out."""
    path = Path(name)
    if name == SAMPLE:
        if dataset_type not in ("auto", "text"):
            raise UserError(f"--data sample is text, not {NAMES[dataset_type]} as --dataset_type {dataset_type} wants. Leave --dataset_type out.")
        yield Source(SAMPLE, SAMPLE), ""
    elif path.is_dir() and (path / MANIFEST).is_file():
        if dataset_type not in ("auto", "sharded"):
            raise UserError(f"{name} is a token store, not {NAMES[dataset_type]} as --dataset_type {dataset_type} wants. Leave --dataset_type out.")
        yield Source(name, "sharded"), ""
    elif dataset_type == "sharded":
        raise UserError(f"{name} is not a token store: there is no {MANIFEST} in it. Leave --dataset_type out to have it read as what it is.")
    elif path.is_dir():
        yield from _look_into_directory(path, dataset_type)
    else:
        kind, found = look(path, dataset_type)
        if not kind:
            raise UserError(f"{name} {found}. Give UTF-8 text or JSON rows, or the fitting --dataset_type.")
        yield Source(name, kind), ""


def _look_into_directory(path: Path, dataset_type: str) -> Iterator[tuple[Source, str]]:
    usable, reasons = 0, []
    for file in sorted(path.rglob("*")):
        if file.is_dir() or any(part.startswith(".") for part in file.relative_to(path).parts):
            continue
        kind, found = look(file, dataset_type)
        usable += bool(kind)
        reasons.append(f"{file.relative_to(path)} {found}")
        yield Source(str(file), kind), "" if kind else found
    if not usable:
        shown = "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "") if reasons else "it holds no files"
        wanted = "UTF-8 text or JSON rows" if dataset_type == "auto" else NAMES[dataset_type]
        raise UserError(f"Nothing in the directory {path} can be used: {shown}. Give a directory with {wanted}.")


def look(path: Path, dataset_type: str = "auto") -> tuple[str, str]:
    """The kind of a file and what was found: ("text", ""), ("jsonl", ""), or ("", "is empty") and the like.

    Only the beginning of the file is read; the name decides between text and rows where both would do.
    """
    if not path.is_file():
        return "", "is not a regular file"
    with _open(path) as file:
        head = file.read(HEAD_BYTES)
    fault = binary_fault(head, complete=len(head) < HEAD_BYTES)
    if not head or fault:
        return "", fault or "is empty"
    kind, found = _kind(path.suffix.lower(), head)
    if dataset_type == "jsonl" and head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"["):
        kind = "jsonl"
    if kind and dataset_type not in ("auto", kind):
        return "", f"holds {NAMES[kind]}, not {NAMES[dataset_type]} as --dataset_type {dataset_type} wants"
    return kind, found


def _kind(suffix: str, head: bytes) -> tuple[str, str]:
    if suffix in TEXT_SUFFIXES:
        return "text", ""
    if suffix in ROW_SUFFIXES:
        return "jsonl", ""
    body = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if suffix == ".json" and body[:1] == b"[":
        return "jsonl", ""
    if body[:1] == b"{":
        line, _, rest = body.partition(b"\n")
        try:
            # One object alone is somebody's settings rather than a corpus of one row.
            if isinstance(json.loads(line), dict) and rest.strip():
                return "jsonl", ""
        except (ValueError, RecursionError):
            pass  # not JSON Lines; what it is instead is decided below
    if suffix == ".json":
        return "", "is JSON but not rows (neither JSON Lines of two or more rows nor one array)"
    return "text", ""


def binary_fault(data: bytes, *, complete: bool) -> str:
    """What makes `data` not UTF-8 text, in words with the place, or "".

    >>> binary_fault(b"a\\x00", complete=True)
    'is binary: byte 1 is NUL'
    """
    nul = data.find(b"\0")
    if nul >= 0:
        return f"is binary: byte {nul} is NUL"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data, complete)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return f"is not UTF-8 text: byte {error.start} (line {line}) is 0x{data[error.start]:02x}"
    return ""


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error


# --------------------------------------------------------------------------------------------------------------------- reading


def sample_texts() -> list[str]:
    """The documents of `--data sample`: the language reference that Python carries for `help()`, in sorted order of its topics.

    Raises:
        UserError: this Python was installed without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise UserError("--data sample needs the module pydoc_data, which this Python lacks. Give --data a file.") from error
    return [topics[name] for name in sorted(topics)]


def read_documents(sources: Iterable[Source], report: ReadReport, *, text_key: str = "text", on_bad_rows: str = "error") -> Iterator[str]:
    """The texts of all sources in order, with `report` kept up to date.

    Args:
        text_key: the field of a JSON row that holds the text; `a.b` reaches into objects.
        on_bad_rows: "error" stops at a row that cannot be used; "skip" counts it and goes on.

    Raises:
        UserError: naming file and line, or byte.
    """
    for source in sources:
        before = report.file_bytes
        if source.kind == SAMPLE:
            texts: Iterable[str] = sample_texts()
        elif source.kind == "text":
            texts = [_read_text(Path(source.name))]
        else:
            texts = _row_texts(Path(source.name), report, text_key, on_bad_rows)
        for text in texts:
            if text.strip():
                report.documents += 1
                yield text
            else:
                report.empty += 1
        report.file_bytes = before + source.num_bytes


def _read_text(path: Path) -> str:
    with _open(path) as file:
        data = file.read()
    fault = binary_fault(data, complete=True)
    if fault:
        raise UserError(f"{path} {fault}. Convert the file to UTF-8, or leave it out.")
    return data.decode("utf-8-sig")


def _row_texts(path: Path, report: ReadReport, text_key: str, on_bad_rows: str) -> Iterator[str]:
    before = report.file_bytes
    with _open(path) as file:
        for line, row in _rows(path, file):
            report.file_bytes = before + file.tell()
            try:
                text = _row_text(row, text_key)
            except _BadRow as fault:
                message = f"{path}:{line} {fault}"
                if on_bad_rows != "skip":
                    raise UserError(f"{message} Mend the row, or give --on_bad_rows skip.") from None
                report.bad_rows += 1
                if len(report.bad_row_examples) < SHOWN_BAD_ROWS:
                    report.bad_row_examples.append(message)
            else:
                yield text


def _row_text(row: Any, text_key: str) -> str:
    if isinstance(row, _BadRow):
        raise row
    if not isinstance(row, dict):
        raise _BadRow(f"holds {_json_type(row)}, not an object with the key {text_key!r}.")
    value: Any = row
    for key in [text_key] if text_key in row else text_key.split("."):
        if not isinstance(value, dict) or key not in value:
            present = ", ".join(sorted(map(repr, row)))
            raise _BadRow(f"has no key {text_key!r}; its keys are {present or 'none'} (--text_key chooses).")
        value = value[key]
    if not isinstance(value, str):
        raise _BadRow(f"holds {_json_type(value)} under the key {text_key!r}, not a string.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadRow(f"holds half of a surrogate pair under the key {text_key!r}, which is no text.") from None
    return value


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _rows(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """(line number, row) of JSON Lines or of one array; a row that is not JSON is given as a `_BadRow`."""
    head = file.read(HEAD_BYTES)
    file.seek(0)
    if path.suffix.lower() not in ROW_SUFFIXES and head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        yield from _array_rows(path, file)
        return
    for number, line in enumerate(file, 1):
        body = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not body.strip():
            continue
        try:
            row = json.loads(body.rstrip(b"\r\n"))  # else the newline is blamed for what lacks before it
        except UnicodeDecodeError as error:
            row = _BadRow(f"is not UTF-8 (byte {error.start} of the line).")
        except (ValueError, RecursionError) as error:
            row = _BadRow(f"is broken JSON ({_fault(error)}).")
        yield number, row


def _fault(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _array_rows(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Elements of one JSON array with the line each begins at, decoded one at a time so that memory holds one chunk and one row.

    There is no way to find the next row behind broken JSON here, so `on_bad_rows` does not cover it.
    """
    text = codecs.getincrementaldecoder("utf-8-sig")()
    decoder, buffer, line, size, after = json.JSONDecoder(), "", 1, CHUNK_BYTES, "["
    while True:
        more = file.read(size)
        try:
            buffer += text.decode(more, final=not more)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text behind line {line} (byte 0x{error.object[error.start]:02x}). Convert the file to UTF-8.") from None
        position, size = 0, size * 2  # doubling keeps a row of any length linear
        while True:
            try:
                start, row, end = _element(decoder, buffer, position, after)
            except (ValueError, RecursionError) as error:
                if more and not isinstance(error, RecursionError):
                    break
                raise UserError(f"{path}:{line} is broken JSON ({error}). Mend the array; its rows cannot be skipped.") from None
            line += buffer.count("\n", position, start)
            if end < 0:
                return
            yield line, row
            line += buffer.count("\n", start, end)
            position, after, size = end, ",", CHUNK_BYTES
        buffer = buffer[position:]


def _element(decoder: json.JSONDecoder, buffer: str, position: int, after: str) -> tuple[int, Any, int]:
    """(start, value, end) of the next element behind the mark `after`; end is -1 behind the last one. ValueError: not there (yet)."""

    def skip(at: int) -> int:
        match = _SPACE.match(buffer, at)
        return match.end() if match else at

    start = skip(position)
    mark = buffer[start : start + 1]
    if mark == "]" and after == ",":
        return start, None, -1
    if mark != after:
        raise ValueError(f"{after!r} or ']' expected" if after == "," else "'[' expected")
    start = skip(start + 1)
    if after == "[" and buffer[start : start + 1] == "]":
        return start, None, -1
    value, end = decoder.raw_decode(buffer, start)
    if not buffer[skip(end) : skip(end) + 1]:
        raise ValueError("',' or ']' expected")  # a number could go on in the next chunk
    return start, value, end
