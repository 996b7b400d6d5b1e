"""Find the sources that `--data` names: paths, globs, URLs, Hub names and "sample".

Files are recognised by their content, after decompression. Sources are in the order of the given
names, and sorted within a directory or glob.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from consyn_jax.data.sources.reader import COMPRESSED_SUFFIXES, REMEDY, Candidate, Reader
from consyn_jax.data.sources.recognition.companions import without_companions
from consyn_jax.data.sources.recognition.found import Found
from consyn_jax.data.sources.recognition.splits import by_split
from consyn_jax.data.sources.sample_reader import SAMPLE
from consyn_jax.data.sources.source import READERS, Source
from consyn_jax.data.sources.text_reader import TextReader
from consyn_jax.data.sources.token_reader import TokenReader
from consyn_jax.data.split import TRAIN
from consyn_jax.data.store.manifest import PREPARING, is_store
from consyn_jax.data.store.token_files import PICKLES, TOKEN_SUFFIXES
from consyn_jax.errors import UserError, listed, nearest
from consyn_jax.files import PARTIAL, leads_out
from consyn_jax.remote.local_copy import local_copy
from consyn_jax.remote.urls import is_bucket_url

TOKENS = TokenReader.kind
FILE_SUFFIXES = {*COMPRESSED_SUFFIXES, *(s for r in READERS.values() for s in r.suffixes)}
_NOUNS = [reader.noun for kind, reader in reversed(READERS.items()) if kind != SAMPLE]
# Words in the description of a file's fault, and the advice for this fault.
_REMEDIES = (
    ("UTF-16", "Convert the file to UTF-8, or write it with a byte order mark."),
    ("UTF-8", REMEDY),
    ("has to be", "Give the resulting files."),
    ("cut off", "Make or download the file again."),
    ("is JSON but not rows", "Write the rows as JSON Lines, or as one array."),
)
USABLE = f"{', '.join(_NOUNS[:-1])} or {_NOUNS[-1]}"


@dataclass(frozen=True)
class Corpus:
    """The sources in reading order, and the files that were left out, each with a reason.

    Attributes:
        validation: sources whose names say that they are validation data.
    """

    sources: tuple[Source, ...]
    left_out: tuple[tuple[str, str], ...]
    validation: tuple[Source, ...] = ()


def find_sources(
    data: Sequence[str], dataset_type: str = "auto", flag: str = "data", invalid_utf8: str = "error"
) -> Corpus:
    """Find the sources that `data` names, and their types.

    Args:
        data: paths, directories, globs (`**` also matches subdirectories), names of Hub datasets,
            or "sample" (`./sample` is a file of that name).
        dataset_type: the type that all sources must have, or "auto".
        flag: name of the flag that has the value `data`, for messages.
        invalid_utf8: "replace" to accept text files with invalid UTF-8, otherwise "error".

    Raises:
        UserError: a name does not exist, no file is usable, or a source has another type.
    """
    found: dict[str, Found] = {}
    twice: list[tuple[str, str]] = []
    for name in data:
        for item in _found_by(name, dataset_type, flag, invalid_utf8):
            if item.source.name in found:
                twice.append((item.source.name, "is named twice"))
            else:
                found[item.source.name] = item
    parted = by_split(without_companions(list(found.values())), flag)
    if not parted.train:
        raise UserError(f"--{flag} is empty. Give a file, a directory, a glob or 'sample'.")
    train, validation = (
        tuple(item.source for item in items) for items in (parted.train, parted.validation)
    )
    _check_alike((*train, *validation), flag)
    left_out = {item.source.name: item.reason for item in parted.rest}
    in_order = [(name, left_out[name]) for name in found if name in left_out]
    return Corpus(train, (*in_order, *twice), validation)


def _check_alike(sources: Iterable[Source], flag: str) -> None:
    """Refuse mixtures of tokens and documents, and of token files and token stores."""
    kinds = {
        source.reader.describe(source.name) if source.kind == TOKENS else "": source.name
        for source in sources
    }
    if len(kinds) > 1:
        found, name = next((found, name) for found, name in kinds.items() if found)
        raise UserError(
            f"{name} in --{flag} is {found}, but other items are not. Give items of one kind in "
            f"--{flag}, or mix training data with --data_weights."
        )


def _found_by(name: str, dataset_type: str, flag: str, invalid_utf8: str) -> Iterator[Found]:
    """Find the sources that `name` matches; an unusable source is included, with a `reason`."""
    if is_bucket_url(name):
        name = str(local_copy(name))
    if name == SAMPLE:
        if dataset_type not in ("auto", TextReader.kind):
            raise _wrong_type("--data sample", READERS[SAMPLE], SAMPLE, dataset_type)
        yield Found(Source(SAMPLE, SAMPLE), "", Path(SAMPLE), SAMPLE, is_named=True)
        return
    expanded = _expand(name, dataset_type, flag)
    for found in expanded:
        if isinstance(found, Source):
            # If a Hub dataset has several splits, the name of each source ends with its split.
            is_one = len(expanded) == 1
            inside = Path(found.name if is_one else found.name.rpartition(":")[2])
            yield Found(found, "", inside, name, is_named=is_one)
            continue
        place, is_named = _beginning(name), found == Path(name).expanduser()
        for source, reason in _look_into(found, dataset_type, invalid_utf8):
            inside = _inside(source.name, found, place)
            yield Found(source, reason, inside, name, is_named and not found.is_dir())


def _inside(name: str, found: Path, place: Path) -> Path:
    """Return the path of a source relative to `place`, or the name of a dataset's split."""
    if name == str(found) and any(r.other_splits(found) for r in READERS.values()):
        return Path(TRAIN)
    if name.startswith(f"{found}:"):
        return Path(name.removeprefix(f"{found}:"))
    path = Path(name)
    inside = path.relative_to(place) if path.is_relative_to(place) else Path(path.name)
    return inside if inside.name else Path(path.name)


def _beginning(name: str) -> Path:
    """Return the path before the first wildcard of a pattern; return an existing path unchanged.

    The split of a file is recognised only by the names below this path.

    >>> _beginning("test/*/a.txt"), _beginning("corpus")
    (PosixPath('test'), PosixPath('corpus'))
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    plain = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
    return Path(*plain)


def _expand(name: str, dataset_type: str, flag: str) -> Sequence[Path | Source]:
    """Expand a name to paths, as a shell does; the name of a dataset gives a `Source` instead."""
    path = Path(name).expanduser()
    try:
        exists = path.exists()
    except OSError as error:
        raise UserError(
            f"{name} in --{flag} cannot be read: {error.strerror}. "
            "Check the path and its permissions."
        ) from error
    if exists:
        return [path]
    readers = [reader for reader in READERS.values() if dataset_type in ("auto", reader.kind)]
    for reader in readers:
        if reader.is_source(path):
            return [Source(str(path), reader.kind)]
    if glob.has_magic(name):
        # Not `Path.glob`, because the pattern may be absolute.
        found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
        if not found:
            raise UserError(
                f"The pattern {name} in --{flag} matches no file. Correct it; a pattern without "
                "a leading / is relative to the current directory."
            )
        return [Path(match) for match in found]
    if dataset_type != "auto" or _may_be_remote(name):
        for reader in readers:
            if remote := _remote_names(reader, name, flag):
                return [Source(one, reader.kind) for one in remote]
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(
        f"{name} in --{flag} does not exist{nearest(path.name, siblings)} "
        "Give a file, a directory, a glob, owner/name of a dataset, or 'sample'."
    )


def _may_be_remote(name: str) -> bool:
    """Whether a name that is not an existing path may be owner/name of a Hub dataset.

    A single word, the name of a file, and a path into an existing directory are more likely
    mistyped paths.
    """
    owner, slash, rest = re.split("[@:]", name)[0].partition("/")
    is_file = Path(rest).suffix.lower() in FILE_SUFFIXES
    return bool(slash) and not is_file and not Path(owner).exists()


def _remote_names(reader: Reader, name: str, flag: str) -> tuple[str, ...]:
    """List the splits of a remote dataset, the default split first; () if `name` is not remote."""
    try:
        remote = reader.remote_name(name)
        return () if remote is None else (remote, *reader.remote_splits(name, remote))
    except UserError as error:
        raise UserError(
            f"{name} in --{flag} is not an existing path, and cannot be read as {reader.noun}: "
            f"{str(error)[:1].lower()}{str(error)[1:]}"
        ) from error


def _look_into(path: Path, dataset_type: str, invalid_utf8: str) -> Iterator[tuple[Source, str]]:
    """Find the sources at an existing path; raise an error if the path is an unusable file."""
    if not path.is_dir():
        kind, fault = recognise(path, dataset_type, invalid_utf8)
        if fault:
            raise UserError(f"{path} {fault}. {_remedy(path, fault, dataset_type)}")
        # A file named `sample` is not the built-in sample.
        yield Source(f"./{SAMPLE}" if str(path) == SAMPLE else str(path), kind), ""
        return
    reader = next((reader for reader in READERS.values() if reader.is_source(path)), None)
    if reader is not None:
        if dataset_type not in ("auto", reader.kind):
            raise _wrong_type(str(path), reader, str(path), dataset_type)
        yield Source(str(path), reader.kind), ""
        for split in reader.other_splits(path):
            yield Source(f"{path}:{split}", reader.kind), ""
    elif (path / PREPARING).is_dir():
        raise UserError(
            f"{path} is an unfinished token store. Run its consyn-prepare command again to "
            "complete it."
        )
    else:
        yield from _look_into_directory(path, dataset_type, invalid_utf8)


def _remedy(path: Path, fault: str, dataset_type: str) -> str:
    """Return a sentence of advice about an unusable file."""
    if fault.endswith(f"--dataset_type {dataset_type} wants"):
        return "Leave --dataset_type out."
    if path.suffix.lower() in (*TOKEN_SUFFIXES, *PICKLES) and fault != "is empty":
        return "Save the token ids with numpy.save, as uint16, uint32, int32 or int64."
    return next((remedy for words, remedy in _REMEDIES if words in fault), f"Give {USABLE}.")


def _wrong_type(place: str, reader: Reader, name: str, dataset_type: str) -> UserError:
    return UserError(
        f"{place} is {reader.describe(name)}, not {READERS[dataset_type].noun} "
        f"as --dataset_type {dataset_type} wants. Leave --dataset_type out."
    )


def _look_into_directory(
    path: Path, dataset_type: str, invalid_utf8: str
) -> Iterator[tuple[Source, str]]:
    found = []
    for file in _files_in(path):
        if file.is_dir():
            kind, reason = "", _passed_over(file)
        elif file.is_file() and (target := leads_out(file, path)):
            kind, reason = (
                "",
                f"is a link to {target}, outside the directory; give the link's target to use it",
            )
        elif file.name.endswith(PARTIAL):
            kind, reason = "", "is an unfinished file; give its path to use it"
        else:
            kind, reason = recognise(file, dataset_type, invalid_utf8)
        found.append((Source(str(file), kind), reason))
    kinds = {source.kind for source, reason in found if not reason}
    if not kinds:
        reasons = [f"{Path(source.name).relative_to(path)} {reason}" for source, reason in found]
        wanted = USABLE if dataset_type == "auto" else READERS[dataset_type].noun
        shown = listed(reasons) or "it holds no files"
        raise UserError(
            f"Nothing in the directory {path} can be used: {shown}. Give a directory with {wanted}."
        )
    for source, reason in found:
        if source.kind == TOKENS and kinds != {TOKENS}:
            reason = "is a token file among other files; give its path to use it"
        yield source, reason


def _files_in(directory: Path) -> list[Path]:
    """List, sorted, all files below a directory.

    If a subdirectory is not searched, it is listed in place of its files. Hidden files and
    directories are left out.
    """
    found: list[Path] = []
    for place, directories, names in os.walk(directory):
        inner = [Path(place) / name for name in directories if not name.startswith(".")]
        passed_over = [path for path in inner if _passed_over(path)]
        directories[:] = [path.name for path in inner if path not in passed_over]
        found += passed_over
        found += [Path(place) / name for name in names if not name.startswith(".")]
    return sorted(found)


def _passed_over(directory: Path) -> str:
    """Return the reason not to search a subdirectory (a link, a token store, a run), or ""."""
    if directory.is_symlink():
        return "is a link to a directory; give its path to use it"
    if is_store(directory) or (directory / PREPARING).is_dir():
        return "is a token store; give its path to use it"
    is_run = (directory / "config.yaml").is_file() and (directory / "metrics.jsonl").is_file()
    return "is a run of consyn-train" if is_run else ""


def recognise(
    path: Path, dataset_type: str = "auto", invalid_utf8: str = "error"
) -> tuple[str, str]:
    """Recognise a file by its beginning: (type, ""), or ("", reason) if the file is unusable."""
    if not path.is_file():
        return "", "is not a regular file"
    file = Candidate(path, dataset_type, invalid_utf8)
    found = ((reader, reader.recognise(file)) for reader in READERS.values())
    reader, fault = next((reader, fault) for reader, fault in found if fault is not None)
    if not fault and dataset_type not in ("auto", reader.kind):
        wanted = READERS[dataset_type].noun
        fault = f"holds {reader.noun}, not {wanted} as --dataset_type {dataset_type} wants"
    return ("", fault) if fault else (reader.kind, "")
