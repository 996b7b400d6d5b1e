"""Write one shard of a token store; its documents can be read before the shard is complete."""

from __future__ import annotations

import hashlib
import os
import threading
from contextlib import suppress
from io import BufferedRandom
from pathlib import Path
from typing import Any

import numpy as np

from consyn_jax.data.saved_values import fits
from consyn_jax.data.store.manifest import ORIGIN_BYTES, PREPARE_ANEW
from consyn_jax.data.store.number_file import NumberFile
from consyn_jax.data.store.shards import Shard, Tokens
from consyn_jax.errors import UserError
from consyn_jax.files import open_regular

ONES_BYTES = 1 << 20


class ShardWriter:
    """Appends documents to the files of one shard. Counts include only complete documents.

    Args:
        name: name of the shard's files, without the suffixes .tokens, .index, .targets and
            .origins.
        state: an earlier result of `state()`; the files are truncated to the sizes at that time.

    Raises:
        UserError: a file is shorter than `state` requires.
    """

    def __init__(
        self, directory: Path, name: str, dtype: np.dtype, state: dict[str, Any] | None = None
    ) -> None:
        if state is None:
            state = {
                **dict.fromkeys(("tokens", "documents", "bytes", "target_tokens"), 0),
                "pending": None,
                "has_targets": False,
                "has_origins": False,
            }
        self.directory, self.name, self.dtype = directory, name, dtype
        self.tokens, self.documents = state["tokens"], state["documents"]
        self.num_bytes, self.targets = state["bytes"], state["target_tokens"]
        # Number of tokens of the unfinished document; None if there is none.
        self.pending: int | None = state["pending"]
        self._paths = {
            kind: directory / f"{name}.{kind}" for kind in ("tokens", "index", "targets", "origins")
        }
        self._files: dict[str, BufferedRandom] = {}
        sizes = {
            "tokens": (self.tokens + (self.pending or 0)) * dtype.itemsize,
            "index": (self.documents + (self.pending is not None)) * 8,
        }
        sizes |= {"targets": self.tokens} if state["has_targets"] else {}
        if state.get("has_origins"):  # missing in states of versions without origins
            sizes["origins"] = self.documents * ORIGIN_BYTES
        try:
            for kind, size in sizes.items():
                self._files[kind] = self._open(kind, size)
        except BaseException:
            self.abandon()
            raise

    @staticmethod
    def check_state(state: dict[str, Any]) -> None:
        """Check a `state` that was read from a file.

        Raises:
            KeyError, TypeError: the value is not a result of `state()`.
        """
        hints: dict[str, Any] = {
            "name": str,
            **dict.fromkeys(("tokens", "documents", "bytes", "target_tokens"), int),
            "pending": int | None,
            "has_targets": bool,
        }
        for name, hint in hints.items():
            if not fits(state[name], hint):
                raise TypeError(f"{name} is {state[name]!r:.50}")

    @property
    def paths(self) -> list[Path]:
        """Paths of the shard's files."""
        return [self._paths[kind] for kind in self._files]

    def _open(self, kind: str, size: int) -> BufferedRandom:
        path = self._paths[kind]
        # Check the size, because `truncate` would extend a short file with zeros.
        if size and (not path.is_file() or path.stat().st_size < size):
            raise UserError(
                f"{path} was changed after the preparation was interrupted. {PREPARE_ANEW}"
            )
        file = open(path, "r+b" if size else "w+b", opener=open_regular)  # noqa: SIM115
        file.truncate(size)
        file.seek(size)
        return file

    def append(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        num_bytes: int,
        targets: np.ndarray | None,
        origins: np.ndarray | None = None,
    ) -> None:
        """Append complete documents, whose tokens are concatenated in `ids`.

        Args:
            lengths: number of tokens of each document.
            num_bytes: size of the texts of all documents, in bytes.
            targets: target value of each token; None if all tokens are targets.
            origins: origin of each document; None if unknown.
        """
        self._write_origins(origins)
        starts = self.tokens + np.cumsum(lengths) - lengths
        self._files["index"].write(starts.astype("<u8").tobytes())
        self._files["tokens"].write(np.ascontiguousarray(ids, self.dtype).data)
        if targets is not None and not (targets == 1).all() and "targets" not in self._files:
            self._files["targets"] = self._open("targets", 0)
            self._write_ones(self.tokens)
        if "targets" in self._files:
            marks = np.ones(len(ids), np.uint8) if targets is None else targets
            self._files["targets"].write(np.ascontiguousarray(marks).data)
        self.tokens += len(ids)
        self.documents += len(lengths)
        self.num_bytes += num_bytes
        self.targets += len(ids) if targets is None else int(np.count_nonzero(targets == 1))

    def append_part(self, ids: np.ndarray) -> None:
        """Append a part of an unfinished document."""
        if self.pending is None:
            self._files["index"].write(np.array([self.tokens], "<u8").tobytes())
            self.pending = 0
        self._files["tokens"].write(np.ascontiguousarray(ids, self.dtype).data)
        self.pending += len(ids)

    def end_document(self, num_bytes: int, origin: np.ndarray | None = None) -> None:
        """Complete the unfinished document; its text has `num_bytes` bytes."""
        self._write_origins(origin)
        length = self.pending or 0
        if "targets" in self._files:
            self._write_ones(length)
        self.tokens, self.targets, self.pending = self.tokens + length, self.targets + length, None
        self.documents += 1
        self.num_bytes += num_bytes

    def _write_origins(self, origins: np.ndarray | None) -> None:
        """Write the origins of documents. In a shard, all documents have origins or none has.

        Raises:
            ValueError: only some documents of the shard have origins.
        """
        if origins is not None and not self.documents and "origins" not in self._files:
            self._files["origins"] = self._open("origins", 0)
        if "origins" not in self._files:
            return
        if origins is None:
            raise ValueError(
                f"Some documents of {self.name} have origins and others have none. Give origins "
                "for all of them."
            )
        self._files["origins"].write(np.ascontiguousarray(origins, "<u8").data)

    def _write_ones(self, count: int) -> None:
        for start in range(0, count, ONES_BYTES):
            self._files["targets"].write(b"\1" * min(ONES_BYTES, count - start))

    def drop_document(self) -> None:
        """Remove the unfinished document from the files."""
        sizes = {"tokens": self.tokens * self.dtype.itemsize, "index": self.documents * 8}
        for kind, size in sizes.items():
            self._files[kind].truncate(size)
            self._files[kind].seek(size)
        self.pending = None

    def counts(self) -> dict[str, int]:
        """Return the counts of the complete documents, by their names in the manifest."""
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.num_bytes,
            "target_tokens": self.targets,
        }

    def state(self) -> dict[str, Any]:
        """Flush everything to the disk and return the state to resume from."""
        self.flush(sync=True)
        return {
            "name": self.name,
            **self.counts(),
            "pending": self.pending,
            "has_targets": "targets" in self._files,
            "has_origins": "origins" in self._files,
        }

    def flush(self, sync: bool = False) -> None:
        """Flush written data to the operating system, or to the disk if `sync` is true."""
        for file in self._files.values():
            file.flush()
            if sync:
                os.fsync(file.fileno())

    def written(self, begun: bool) -> Tokens:
        """Return the documents so far; include the unfinished document if `begun` is true."""
        counts = self.counts()
        if begun and self.pending:
            counts |= {
                "tokens": self.tokens + self.pending,
                "documents": self.documents + 1,
                "target_tokens": self.targets + self.pending,
            }
        return OpenShard(self._paths, counts, self.dtype, "targets" in self._files)

    def close(self) -> dict[str, Any] | None:
        """Close the files and return the shard's entry in the manifest.

        If the shard has no documents, delete its files and return None.
        """
        self.flush(sync=True)
        if not self.documents:
            self.abandon()
            for path in self.paths:
                path.unlink()
            return None
        entry: dict[str, Any] = {
            "file": self._paths["tokens"].name,
            "index": self._paths["index"].name,
            **self.counts(),
        }
        names = {"tokens": "sha256"}
        names |= {kind: f"{kind}_sha256" for kind in ("index", "origins", "targets")}
        if "targets" in self._files:
            entry["targets"] = self._paths["targets"].name
        else:
            del entry["target_tokens"]
        if "origins" in self._files:
            entry["origins"] = self._paths["origins"].name
        # The order is fixed here, because a resumed writer opens its files in another order.
        for kind in filter(self._files.__contains__, names):
            self._files[kind].seek(0)
            entry[names[kind]] = hashlib.file_digest(self._files[kind], "sha256").hexdigest()
            self._files[kind].close()
        return entry

    def abandon(self) -> None:
        """Close the files without completing the shard."""
        for file in self._files.values():
            with suppress(OSError):  # data that cannot be flushed is in no saved state
                file.close()


class OpenShard(Shard):
    """A snapshot of a shard that is still being written.

    Its content needs no checks, because this process has written it.
    """

    def __init__(
        self, paths: dict[str, Path], counts: dict[str, int], dtype: np.dtype, has_targets: bool
    ) -> None:
        self.num_tokens, self.num_documents = counts["tokens"], counts["documents"]
        self.num_bytes, self.num_targets = counts["bytes"], counts["target_tokens"]
        self.dtype = dtype
        self.verified = self._index_verified = True
        self._lock = threading.Lock()
        self._tokens = NumberFile(str(paths["tokens"]), dtype, self.num_tokens)
        self._index = NumberFile(str(paths["index"]), np.dtype("<i8"), self.num_documents)
        self._targets = self._origins = None
        if has_targets:
            self._targets = NumberFile(str(paths["targets"]), np.dtype("u1"), self.num_tokens)
