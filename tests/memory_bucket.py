"""A bucket in memory, which can be made to fail, for tests of what is built on buckets."""

from __future__ import annotations

from collections.abc import Callable
from io import BufferedIOBase
from pathlib import Path

from consyn_jax.remote.bucket import BucketError, Sent, Stored


class MemoryBucket:
    """Objects by key.

    Attributes:
        before: called with the name and key of each request before it is done; may raise.
        requests: the names and keys of all requests that change something, in order.
    """

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.requests: list[tuple[str, str]] = []
        self.before: Callable[[str, str], None] = lambda name, key: None
        self.keeps_to_conditions = True
        self._writes = 0

    def _write(self, key: str, content: bytes) -> str:
        self._writes += 1
        self.objects[key] = content, f"v{self._writes}"
        return self.objects[key][1]

    def find(self, prefix: str) -> list[Stored]:
        self.before("list", prefix)
        found = [(key, *self.objects[key]) for key in sorted(self.objects)]
        return [Stored(k, len(c), version) for k, c, version in found if k.startswith(prefix)]

    def read(self, key: str) -> tuple[bytes, str] | None:
        self.before("read", key)
        return self.objects.get(key)

    def download(self, stored: Stored, path: Path) -> None:
        self.before("download", stored.key)
        content, version = self.objects[stored.key]
        if version != stored.version:
            raise BucketError("was changed while it was read")
        path.write_bytes(content)

    def upload(self, file: BufferedIOBase, key: str, sent: Sent = lambda total: None) -> None:
        self.before("upload", key)
        self.requests.append(("upload", key))
        self._write(key, file.read())
        sent(len(self.objects[key][0]))

    def put(self, key: str, content: bytes, expected: str | None) -> str | None:
        self.before("put", key)
        found = self.objects.get(key)
        if self.keeps_to_conditions and expected != (None if found is None else found[1]):
            return None
        return self._write(key, content)

    def delete(self, keys: list[str]) -> None:
        for key in keys:
            self.before("delete", key)
            self.requests.append(("delete", key))
            self.objects.pop(key, None)
