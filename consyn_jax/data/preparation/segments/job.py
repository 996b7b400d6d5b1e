"""A job: the settings of a preparation with `--shared_directory`, and the files of its tasks.

A task is a phase and a number. Its result is a directory ROOT/GENERATION/PHASE/NUMBER with
`result.json` and arrays. The directory gets this name when it is complete, so a finished task is
not repeated after an interruption. Two processes may run the same task, because both write the same
bytes.

Each command draws a new generation. To continue the work of an earlier command, it renames the
directory of that command's results. So if a task of a killed command is still running, it can no
longer write a result.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from consyn_jax.data.preparation.preparation_spec import Spec
from consyn_jax.data.preparation.workers.messages import WorkerSettings
from consyn_jax.data.sources.reader import Position
from consyn_jax.data.sources.source import Source
from consyn_jax.data.store.manifest import PREPARING, SHARD_DRAFTS, token_dtype
from consyn_jax.errors import UserError
from consyn_jax.files import aside, flush, write_whole
from consyn_jax.tokenization import BPETokenizer

JOB, STARTS = "job.json", "starts.json"
RESULT, ARRAYS = "result.json", "arrays.bin"  # files of a task
ALIGNED = 64

Start = tuple[int, Position]
"""The beginning of a segment: the number of a source, and a position in this source."""


@dataclass(frozen=True)
class Job:
    """A preparation in which all nodes write.

    Attributes:
        root: directory of the files that tasks exchange.
        output: directory of the store.
        settings: settings of the workers.
        sources: all sources, as in `Spec`.
        num_validation: number of sources from `--validation`.
        working_directory: working directory of the command, for relative names of sources.
        segment_bytes: bytes of text after which a segment ends.
        partitions: number of ranges into which digests and band keys are divided.
        shard_tokens: number of tokens after which a shard ends.
        generation: random name of the directories with the results of this command.
    """

    root: Path
    output: Path
    settings: WorkerSettings
    sources: tuple[Source, ...]
    num_validation: int
    working_directory: str
    segment_bytes: int
    partitions: int
    shard_tokens: int
    generation: str

    def to_json(self) -> str:
        """The content of the file `JOB`."""
        values = {
            **vars(self),
            "root": str(self.root),
            "output": str(self.output),
            "settings": self.settings.to_json(),
            "sources": [[source.name, source.kind] for source in self.sources],
        }
        values = {name: value for name, value in values.items() if name in _FIELDS}
        return json.dumps(values)

    @cached_property
    def identity(self) -> str:
        """Hash of the file `JOB`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str | bytes) -> Job:
        """The inverse of `to_json`."""
        values = json.loads(text)
        given = {
            "root": Path(values["root"]),
            "output": Path(values["output"]),
            "settings": WorkerSettings.from_json(values["settings"]),
            "sources": tuple(Source(name, kind) for name, kind in values["sources"]),
        }
        return cls(**{**values, **given})

    @cached_property
    def spec(self) -> Spec:
        """The specification, with only the fields that are needed to read and write documents."""
        settings = self.settings
        return Spec(
            self.sources,
            self.num_validation,
            (),
            settings.options,
            settings.test_fraction,
            settings.tokenizer,
            lambda stage, done, total: None,
            chat_template=settings.chat_template,
            tool_template=settings.tool_template,
        )

    @property
    def tokenizer(self) -> BPETokenizer:
        """The tokenizer of the store."""
        return self.settings.tokenizer

    @property
    def dtype(self) -> np.dtype:
        """The type of the store's tokens."""
        return token_dtype(self.tokenizer.vocab_size)

    @property
    def drops_duplicates(self) -> bool:
        """Whether exact duplicates are left out."""
        return self.settings.options.deduplicate in (None, True)

    @property
    def threshold(self) -> float | None:
        """The similarity at which a document is a near duplicate; None to keep near duplicates."""
        return self.settings.options.near_duplicates

    @property
    def results(self) -> Path:
        """The directory of the results of all tasks."""
        return self.root / self.generation

    @property
    def shard_drafts(self) -> Path:
        """The directory in the store for shards that are being written."""
        return self.output / PREPARING / f"{self._shard_drafts}{self.generation}"

    @property
    def earlier_shard_drafts(self) -> list[Path]:
        """Directories for shards that earlier commands with the same `root` have left.

        The list is empty if a command with another `root`, or without --shared_directory, has
        changed the store since then.
        """
        return list((self.output / PREPARING).glob(f"{self._shard_drafts}*"))

    @property
    def _shard_drafts(self) -> str:
        return f"{SHARD_DRAFTS}{hashlib.sha256(str(self.root).encode()).hexdigest()[:8]}-"

    # --------------------------------------------------------------------------- segments

    def write_starts(self, starts: list[Start]) -> None:
        """Record where segments begin."""
        write_whole(self.results / STARTS, json.dumps(starts))

    @cached_property
    def starts(self) -> list[Start]:
        """The beginnings of all segments."""
        saved = json.loads((self.results / STARTS).read_bytes())
        return [(source, (position[0], position[1])) for source, position in saved]

    @property
    def num_segments(self) -> int:
        """Number of segments."""
        return len(self.starts)

    # --------------------------------------------------------------------------- results of tasks

    def place(self, phase: str, number: int) -> Path:
        """The directory of a task's result."""
        return self.results / phase / f"{number:07d}"

    def done(self, phase: str) -> set[int]:
        """Numbers of the finished tasks of a phase."""
        place = self.results / phase
        names = [path.name for path in place.iterdir()] if place.is_dir() else []
        return {int(name) for name in names if name.isdigit()}

    def result(self, phase: str, number: int) -> Any:
        """The content of the `result.json` that a task wrote."""
        return json.loads((self.place(phase, number) / RESULT).read_bytes())

    def array(self, phase: str, number: int, name: str) -> np.ndarray:
        """An array that a task wrote, as a memory map."""
        path = self.place(phase, number) / ARRAYS
        status = path.stat()
        dtype, shape, offset = _contents(path, status.st_ino, status.st_mtime_ns)[name]
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, "r", offset, tuple(shape)).view(np.ndarray)

    @contextmanager
    def writing(self, phase: str, number: int) -> Iterator[Draft]:
        """Yield a draft for the files of a task; at the end, rename it to the task's directory."""
        place = self.place(phase, number)
        if not place.parent.is_dir():
            # Do not make the parents: they are missing if a later command has renamed them.
            place.parent.mkdir(exist_ok=True)
            flush(self.results)
        draft = Draft(aside(place))
        draft.path.mkdir()
        try:
            yield draft
            draft.finish()
            try:
                draft.path.rename(place)
            except OSError:
                if not (place / RESULT).exists():
                    raise
                shutil.rmtree(draft.path)  # another process was faster
            flush(place.parent)
        except BaseException:
            with suppress(OSError):
                shutil.rmtree(draft.path)
            raise

    def remove_drafts(self) -> None:
        """Remove the files that killed tasks left behind."""
        for path in (*self.results.glob("*/.*.new"), *self.shard_drafts.glob("*")):
            shutil.rmtree(path, ignore_errors=True)


_FIELDS = set(Job.__dataclass_fields__)


class Draft:
    """The directory of an unfinished task."""

    def __init__(self, path: Path) -> None:
        self.path, self.result = path, dict[str, Any]()
        self._contents: dict[str, Any] = {}

    def save(self, **arrays: np.ndarray) -> None:
        """Append arrays to the file of arrays; `finish` writes their names."""
        with (self.path / ARRAYS).open("ab") as file:
            for name, array in arrays.items():
                file.write(bytes(-file.tell() % ALIGNED))
                self._contents[name] = [array.dtype.str, array.shape, file.tell()]
                file.write(np.ascontiguousarray(array).data)

    def finish(self) -> None:
        """Write the end of the file of arrays, and `result.json`; flush both files to the disk.

        After the arrays, the file has a JSON object with the dtype, shape and offset of each array
        by name. The last eight bytes of the file are the size of this object.
        """
        if self._contents:
            listed = json.dumps(self._contents).encode()
            with (self.path / ARRAYS).open("ab") as file:
                file.write(listed + struct.pack("<Q", len(listed)))
                file.flush()
                os.fsync(file.fileno())
        write_whole(self.path / RESULT, json.dumps(self.result))


@lru_cache(maxsize=1 << 12)
def _contents(path: Path, inode: int, changed_ns: int) -> dict[str, Any]:
    """Read the JSON object at the end of a file of arrays.

    The inode and the time are used only by the cache, as parts of the key.
    """
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        (size,) = struct.unpack("<Q", file.read(8))
        file.seek(-8 - size, os.SEEK_END)
        return json.loads(file.read(size))


def document_ids(segment: int, rows: np.ndarray) -> np.ndarray:
    """Ids of documents: the segment in the upper 32 bits, the row within it in the lower 32."""
    return (np.uint64(segment) << np.uint64(32)) | np.asarray(rows).astype(np.uint64)


def edges(segment: int) -> np.ndarray:
    """The smallest document ids of a segment and of the next segment."""
    return np.array([segment, segment + 1], np.uint64) << np.uint64(32)


def among(ids: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Whether each of `ids` is in the sorted array `found`."""
    if not len(found):
        return np.zeros(len(ids), bool)
    return found[np.minimum(np.searchsorted(found, ids), len(found) - 1)] == ids


def segment_of(ids: np.ndarray) -> np.ndarray:
    """The segment of each document id."""
    return (ids >> np.uint64(32)).astype(np.int64)


def rows_of(ids: np.ndarray) -> np.ndarray:
    """The row of each document id in its segment."""
    return (ids & np.uint64(0xFFFFFFFF)).astype(np.int64)


def of_segment(ids: np.ndarray, segment: int) -> np.ndarray:
    """The rows of the documents in a segment, selected from the sorted `ids`."""
    low, high = np.searchsorted(ids, edges(segment))
    return rows_of(np.asarray(ids[low:high]))


def unseen(what: str) -> UserError:
    """Return the error for a path that does not exist on this node."""
    return UserError(
        f"{what} is not visible on node {socket.gethostname()} under this path. Give paths on "
        "storage that all nodes share, or leave --shared_directory out."
    )


def check_seen(source: Source) -> None:
    """Check that the files of a source exist on this node.

    Raises:
        UserError: a file is missing.
    """
    if not all(file.exists() for file in source.files):
        raise unseen(f"--data {source.name}")
