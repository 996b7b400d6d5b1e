"""Paths, globs, directories, Hub names and "sample" to sources: what is there, of which kind, and what was left out.

Kinds are found by looking at the files, those that are compressed as they are inside. Order is the order of the names given, and the
sorted order within a directory or glob.
"""

from __future__ import annotations

import codecs
import glob
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from consyn_jax.config import UserError, nearest
from consyn_jax.data import hub, huggingface, raw_tokens
from consyn_jax.data.byte_stream import ByteStream
from consyn_jax.data.store import PREPARING, is_store

SAMPLE = "sample"
TEXT_SUFFIXES = (".txt", ".md")
ROW_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSED_SUFFIXES = (".gz", ".zst")
FILE_SUFFIXES = (*TEXT_SUFFIXES, *ROW_SUFFIXES, ".json", *COMPRESSED_SUFFIXES, *huggingface.SUFFIXES, *raw_tokens.TOKEN_SUFFIXES)
NAMES = {"text": "text", "jsonl": "JSON rows", "huggingface": "a Hugging Face dataset", "sharded": "tokens"}
USABLE = "text, JSON rows, a Hugging Face dataset or tokens"
REMEDY = "Convert the file to UTF-8, leave it out, or give --invalid_utf8 replace."
HEAD_BYTES = 65_536


@dataclass(frozen=True)
class Source:
    """One input: a file, a dataset, a token store, or the sample.

    Attributes:
        name: the path; of a dataset of the Hub, its name with its commit; or "sample".
        kind: "text", "jsonl", "huggingface", "sharded" or "sample".
    """

    name: str
    kind: str

    @cached_property
    def num_bytes(self) -> int:
        """Size on disk, for progress; the sample counts its text, and a dataset that is not there yet nothing."""
        if self.kind == SAMPLE:
            return sum(len(text.encode()) for text in sample_texts())
        try:
            return huggingface.size(self.name) if self.kind == "huggingface" else Path(self.name).stat().st_size
        except OSError as error:
            raise UserError(f"{self.name} cannot be read: {error.strerror}. Leave the data alone while it is prepared.") from error

    @property
    def files(self) -> tuple[Path, ...]:
        """The files whose bytes decide what is read; none where the name decides."""
        if self.kind == "huggingface":
            return huggingface.files(Path(self.name)) if huggingface.look(Path(self.name)) else ()
        return () if self.kind == SAMPLE else (Path(self.name),)

    @property
    def is_store(self) -> bool:
        """A token store, and not a file of tokens."""
        return self.kind == "sharded" and Path(self.name).is_dir()


@dataclass(frozen=True)
class Corpus:
    """What `find_sources` found, in reading order, and the files of directories that it left out, each with the reason."""

    sources: tuple[Source, ...]
    left_out: tuple[tuple[str, str], ...]


# --------------------------------------------------------------------------------------------------------------------- finding


def find_sources(data: Sequence[str], dataset_type: str = "auto", flag: str = "data", invalid_utf8: str = "error") -> Corpus:
    """The sources behind `data`, each with its kind.

    Args:
        data: paths, directories, globs (`**` reaches into directories), names of Hub datasets, or "sample" (`./sample` for a file of
            that name).
        dataset_type: "auto" looks; "text", "jsonl", "huggingface" or "sharded" must be what is there.
        flag: what the user gave `data` to, for messages.
        invalid_utf8: "replace" takes text files that are not all UTF-8.

    Raises:
        UserError: nothing there, nothing usable, or not of the kind asked for.
    """
    used: dict[str, Source] = {}
    left_out: list[tuple[str, str]] = []
    for name in data:
        for item in _expand(name, dataset_type, flag):
            found = [(item, "")] if isinstance(item, Source) else list(_look_into(item, dataset_type, invalid_utf8))
            for source, reason in found:
                if source.name in used:
                    left_out.append((source.name, "is named twice"))
                elif reason:
                    left_out.append((source.name, reason))
                else:
                    used[source.name] = source
    if not used:
        raise UserError(f"--{flag} names nothing to read. Give a file, a directory, a glob or 'sample'.")
    kinds = {("a token store" if source.is_store else "a file of tokens" if source.kind == "sharded" else "text"): source.name for source in used.values()}
    if len(kinds) > 1:
        place, what = next((name, kind) for kind, name in kinds.items() if kind != "text")
        raise UserError(f"{place} in --{flag} is {what}, and the others are not. Give them apart, or mix them with --data_weights.")
    return Corpus(tuple(used.values()), tuple(left_out))


def _expand(name: str, dataset_type: str, flag: str) -> list[str | Source]:
    """The paths behind one item of `--data` or `--validation`, as the shell would give them, or a dataset."""
    if name == SAMPLE:
        return [name]
    path = Path(name).expanduser()
    try:
        exists = path.exists()
    except OSError as error:
        raise UserError(f"{name} in --{flag} cannot be read: {error.strerror}. Check the path and its permissions.") from error
    if exists:
        return [str(path)]
    if dataset_type in ("auto", "huggingface") and huggingface.look(path):  # PATH:SPLIT
        return [Source(str(path), "huggingface")]
    if glob.has_magic(name):
        found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (patterns may be absolute)
        if not found:
            raise UserError(f"The pattern {name} in --{flag} matches no file. Check it, or quote it if the shell should not expand it.")
        return list(found)
    if _may_be_on_hub(name, dataset_type):
        try:
            return [Source(hub.identity(name), "huggingface")]
        except UserError as error:
            raise UserError(f"{name} in --{flag} is no path here. As a dataset of the Hugging Face Hub: {error}") from error
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"{name} in --{flag} does not exist{nearest(path.name, siblings)} Give a file, a directory, a glob, owner/name of a dataset, or 'sample'.")


def _may_be_on_hub(name: str, dataset_type: str) -> bool:
    """A word alone, the name of a file, or a path into a directory that exists is rather a slip of the pen, unless --dataset_type says otherwise."""
    named = hub.parse_hub_name(name)
    if named is None or dataset_type not in ("auto", "huggingface"):
        return False
    owner, slash, rest = named.repository.partition("/")
    is_file = Path(rest).suffix.lower() in FILE_SUFFIXES
    return dataset_type == "huggingface" or bool(slash and not is_file and not Path(owner).exists())


def _look_into(name: str, dataset_type: str, invalid_utf8: str) -> Iterator[tuple[Source, str]]:
    """The sources of one existing path, each with the reason why it is left out, or "". A named file is never left out."""
    path = Path(name)
    if name == SAMPLE:
        kind = SAMPLE if dataset_type in ("auto", "text") else ""
        if not kind:
            raise UserError(f"--data sample is text, not {NAMES[dataset_type]} as --dataset_type {dataset_type} wants. Leave --dataset_type out.")
        yield Source(SAMPLE, SAMPLE), ""
    elif path.is_dir() and (is_store(path) or huggingface.look(path)):
        kind = "sharded" if is_store(path) else "huggingface"
        if dataset_type not in ("auto", kind):
            found = "a token store" if kind == "sharded" else NAMES[kind]
            raise UserError(f"{name} is {found}, not {NAMES[dataset_type]} as --dataset_type {dataset_type} wants. Leave --dataset_type out.")
        yield Source(name, kind), ""
    elif path.is_dir() and (path / PREPARING).is_dir():
        raise UserError(f"{name} is a token store that is not finished. Run the consyn-prepare that began it again; it goes on where it was.")
    elif path.is_dir():
        yield from _look_into_directory(path, dataset_type, invalid_utf8)
    else:
        kind, found = look(path, dataset_type, invalid_utf8)
        if not kind:
            raise UserError(f"{name} {found}. {REMEDY if 'UTF-8' in found else f'Give {USABLE}.'}")
        yield Source(name, kind), ""


def _look_into_directory(path: Path, dataset_type: str, invalid_utf8: str) -> Iterator[tuple[Source, str]]:
    found = []
    for file in _files_in(path):
        kind, reason = ("", _passed_over(file)) if file.is_dir() else look(file, dataset_type, invalid_utf8)
        found.append((Source(str(file), kind), reason))
    kinds = {source.kind for source, reason in found if not reason}
    if not kinds:
        reasons = [f"{Path(source.name).relative_to(path)} {reason}" for source, reason in found]
        shown = "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "") if reasons else "it holds no files"
        wanted = USABLE if dataset_type == "auto" else NAMES[dataset_type]
        raise UserError(f"Nothing in the directory {path} can be used: {shown}. Give a directory with {wanted}.")
    for source, reason in found:
        if source.kind == "sharded" and kinds != {"sharded"}:
            reason = "is a file of tokens among others; name it by itself"
        yield source, reason


def _files_in(directory: Path) -> list[Path]:
    """The files of a directory, sorted, and of directories in it that are passed over their names. Hidden ones do not count."""
    found: list[Path] = []
    for place, directories, names in os.walk(directory):
        inner = [Path(place) / name for name in directories if not name.startswith(".")]
        ours = {path.name for path in inner if _passed_over(path)}
        directories[:] = [path.name for path in inner if path.name not in ours]  # of which links are not followed
        found += [Path(place) / name for name in (*ours, *names) if not name.startswith(".")]
    return sorted(found)


def _passed_over(directory: Path) -> str:
    """Why a directory in another is not looked into, or "": one of our commands made it, or it lies elsewhere."""
    if directory.is_symlink():
        return "is a link to a directory; name it by itself"
    if is_store(directory) or (directory / PREPARING).is_dir():
        return "is a token store; name it by itself"
    return "is a run of consyn-train" if (directory / "config.yaml").is_file() and (directory / "metrics.jsonl").is_file() else ""


def look(path: Path, dataset_type: str = "auto", invalid_utf8: str = "error") -> tuple[str, str]:
    """The kind of a file and what was found: ("text", ""), ("jsonl", ""), or ("", "is empty") and the like.

    Only the beginning of the file is read; the name decides between text and rows where both would do.
    """
    if not path.is_file():
        return "", "is not a regular file"
    kind, found = _look_at_name(path)
    if not kind and not found:
        kind, found = _look_at_content(path, dataset_type, invalid_utf8)
    if kind and dataset_type not in ("auto", kind):
        return "", f"holds {NAMES[kind]}, not {NAMES[dataset_type]} as --dataset_type {dataset_type} wants"
    return kind, found


def _look_at_name(path: Path) -> tuple[str, str]:
    """The kind of a file that its suffix tells, checked by its head; ("", "") for any other."""
    if huggingface.look(path):
        return "huggingface", ""
    if raw_tokens.is_named_so(path):
        kind, found = raw_tokens.look(path)
        return "sharded" if kind else "", found
    return "", ""


def _look_at_content(path: Path, dataset_type: str, invalid_utf8: str) -> tuple[str, str]:
    try:
        with ByteStream(path) as stream:
            head = stream.read(HEAD_BYTES)
    except UserError as error:  # names the file, which what is found does not
        return "", str(error).removeprefix(f"{path} ").split(". ")[0].rstrip(".")
    fault = binary_fault(head, complete=len(head) < HEAD_BYTES)
    suffix = Path(path.stem).suffix if path.suffix.lower() in COMPRESSED_SUFFIXES else path.suffix
    is_rows = dataset_type == "jsonl" and head.lstrip()[:1] in (b"{", b"[")
    kind, found = ("jsonl", "") if is_rows else _kind(suffix.lower(), head)
    # Of rows, those that are not UTF-8 can be left out one by one.
    if not head or b"\0" in head or (fault and invalid_utf8 != "replace" and kind != "jsonl"):
        return "", fault or "is empty"
    return kind, found


def is_array(path: Path) -> bool:
    """Whether a file of JSON rows is one array, and not JSON Lines."""
    suffix = Path(path.stem).suffix if path.suffix.lower() in COMPRESSED_SUFFIXES else path.suffix
    if suffix.lower() in ROW_SUFFIXES:
        return False
    with ByteStream(path) as stream:
        return stream.read(HEAD_BYTES).lstrip()[:1] == b"["


def _kind(suffix: str, head: bytes) -> tuple[str, str]:
    if suffix in TEXT_SUFFIXES:
        return "text", ""
    if suffix in ROW_SUFFIXES:
        return "jsonl", ""
    body = head.lstrip()
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
