"""One shard of a token store while it is being written, and what can be read of it meanwhile."""

from __future__ import annotations

import hashlib
import os
import threading
from contextlib import suppress
from io import BufferedRandom
from pathlib import Path
from typing import Any

import numpy as np

from consyn_jax.config import UserError
from consyn_jax.data.number_file import NumberFile
from consyn_jax.data.shards import AGAIN, Shard, Tokens


class ShardWriter:
    """One shard under way. Everything goes to the files as it comes; only whole documents count.

    Args:
        state: what `state` gave; the files are cut back to it.
    """

    def __init__(self, directory: Path, name: str, dtype: np.dtype, state: dict[str, Any] | None = None) -> None:
        state = state or {"tokens": 0, "documents": 0, "bytes": 0, "target_tokens": 0, "pending": None, "has_targets": False}
        self.directory, self.name, self.dtype = directory, name, dtype
        self.tokens, self.documents, self.num_bytes, self.targets = state["tokens"], state["documents"], state["bytes"], state["target_tokens"]
        self.pending: int | None = state["pending"]  # tokens of a document whose end has not come yet
        self._paths = {kind: directory / f"{name}.{kind}" for kind in ("tokens", "index", "targets")}
        self._files: dict[str, BufferedRandom] = {}
        sizes = {"tokens": (self.tokens + (self.pending or 0)) * dtype.itemsize, "index": (self.documents + (self.pending is not None)) * 8}
        sizes |= {"targets": self.tokens} if state["has_targets"] else {}
        try:
            for kind, size in sizes.items():
                self._files[kind] = self._open(kind, size)
        except BaseException:
            self.abandon()
            raise

    @property
    def paths(self) -> list[Path]:
        """Its files."""
        return [self._paths[kind] for kind in self._files]

    def _open(self, kind: str, size: int) -> BufferedRandom:
        path = self._paths[kind]
        if size and (not path.is_file() or path.stat().st_size < size):  # it would be filled up with zeros
            raise UserError(f"{path} is not what the preparation that was interrupted had made. {AGAIN}")
        file = path.open("r+b" if size else "w+b")
        file.truncate(size)
        file.seek(size)
        return file

    def append(self, ids: np.ndarray, lengths: np.ndarray, num_bytes: int, targets: np.ndarray | None) -> None:
        """Whole documents, as `TokenStoreWriter.append` takes them."""
        self._files["index"].write((self.tokens + np.cumsum(lengths) - lengths).astype("<u8").tobytes())
        self._files["tokens"].write(np.ascontiguousarray(ids, self.dtype).data)
        if targets is not None and not targets.all() and "targets" not in self._files:
            self._files["targets"] = self._open("targets", 0)
            for start in range(0, self.tokens, 1 << 20):
                self._files["targets"].write(b"\1" * min(1 << 20, self.tokens - start))
        if "targets" in self._files:
            self._files["targets"].write((np.ones(len(ids), np.uint8) if targets is None else np.ascontiguousarray(targets)).data)
        self.tokens += len(ids)
        self.documents += len(lengths)
        self.num_bytes += num_bytes
        self.targets += len(ids) if targets is None else int(np.count_nonzero(targets))

    def append_part(self, ids: np.ndarray) -> None:
        """More of a document whose end has not come."""
        if self.pending is None:
            self._files["index"].write(np.array([self.tokens], "<u8").tobytes())
            self.pending = 0
        self._files["tokens"].write(np.ascontiguousarray(ids, self.dtype).data)
        self.pending += len(ids)

    def end_document(self, num_bytes: int) -> None:
        """Its parts are a document."""
        length = self.pending or 0
        if "targets" in self._files:
            for start in range(0, length, 1 << 20):
                self._files["targets"].write(b"\1" * min(1 << 20, length - start))
        self.tokens, self.targets, self.pending = self.tokens + length, self.targets + length, None
        self.documents += 1
        self.num_bytes += num_bytes

    def drop_document(self) -> None:
        """Its parts are cut off again."""
        for kind, size in (("tokens", self.tokens * self.dtype.itemsize), ("index", self.documents * 8)):
            self._files[kind].truncate(size)
            self._files[kind].seek(size)
        self.pending = None

    def counts(self) -> dict[str, int]:
        """Of the whole documents, as the manifest names them."""
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.num_bytes, "target_tokens": self.targets}

    def state(self) -> dict[str, Any]:
        """Put everything on the disk; what it takes to go on from here."""
        self.flush(sync=True)
        return {"name": self.name, **self.counts(), "pending": self.pending, "has_targets": "targets" in self._files}

    def flush(self, sync: bool = False) -> None:
        """Give what was written to the system, and with `sync` to the disk."""
        for file in self._files.values():
            file.flush()
            if sync:
                os.fsync(file.fileno())

    def written(self, begun: bool) -> Tokens:
        """The whole documents so far, to read, and with `begun` what there is of the one that has begun."""
        counts = self.counts()
        if begun and self.pending:
            counts |= {"tokens": self.tokens + self.pending, "documents": self.documents + 1, "target_tokens": self.targets + self.pending}
        return OpenShard(self._paths, counts, self.dtype, "targets" in self._files)

    def close(self) -> dict[str, Any] | None:
        """The shard's entry in the manifest; None, and no files, where it has no documents."""
        self.flush(sync=True)
        if not self.documents:
            self.abandon()
            for path in self.paths:
                path.unlink()
            return None
        entry: dict[str, Any] = {"file": self._paths["tokens"].name, "index": self._paths["index"].name, **self.counts()}
        names = {"tokens": "sha256", "index": "index_sha256", "targets": "targets_sha256"}
        if "targets" in self._files:
            entry["targets"] = self._paths["targets"].name
        else:
            del entry["target_tokens"]
        for kind, file in self._files.items():
            file.seek(0)
            entry[names[kind]] = hashlib.file_digest(file, "sha256").hexdigest()
            file.close()
        return entry

    def abandon(self) -> None:
        """Close the files as they are."""
        for file in self._files.values():
            with suppress(OSError):  # what cannot be flushed any more has not counted yet
                file.close()


class OpenShard(Shard):
    """A shard that is still being written, as it was at one moment. What this process has just written needs no checking."""

    def __init__(self, paths: dict[str, Path], counts: dict[str, int], dtype: np.dtype, has_targets: bool) -> None:
        self.num_tokens, self.num_documents, self.num_bytes = counts["tokens"], counts["documents"], counts["bytes"]
        self.num_targets, self.dtype = counts["target_tokens"], dtype
        self.verified = self._index_verified = True
        self._lock = threading.Lock()
        self._tokens = NumberFile(str(paths["tokens"]), dtype, self.num_tokens)
        self._index = NumberFile(str(paths["index"]), np.dtype("<i8"), self.num_documents)
        self._targets = NumberFile(str(paths["targets"]), np.dtype("u1"), self.num_tokens) if has_targets else None
