"""Bytes of a file as they were before it was compressed."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from pathlib import Path
from typing import BinaryIO, cast

from consyn_jax.config import UserError

CHUNK_BYTES = 1 << 18
GZIP, ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class ByteStream:
    """The bytes of a file, decompressed where it is gzip or Zstandard, without a byte order mark.

    Raises:
        UserError: while reading, a file that is cut off or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = _open(path)
        magic = self.file.read(4)
        self.file.seek(0)
        self.compressed = magic[:2] == GZIP or magic == ZSTANDARD
        self._bytes: BinaryIO = self.file
        if magic[:2] == GZIP:
            self._bytes = cast(BinaryIO, gzip.GzipFile(fileobj=self.file))
        elif self.compressed:
            import pyarrow

            self._bytes = cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.PythonFile(self.file, "r"), "zstd"))
        try:
            self._ahead = self._read(3).removeprefix(codecs.BOM_UTF8)
        except UserError:
            self.file.close()
            raise

    def read(self, size: int) -> bytes:
        """The next bytes, fewer than `size` only in front of the end."""
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        while len(data) < size and (more := self._read(size - len(data))):
            data += more
        return data

    def skip(self, size: int) -> None:
        """Go on `size` bytes further."""
        if not self.compressed and size >= len(self._ahead):
            self.file.seek(size - len(self._ahead), io.SEEK_CUR)
            self._ahead = b""
            return
        while size and (data := self.read(min(size, CHUNK_BYTES))):
            size -= len(data)

    @property
    def file_bytes(self) -> int:
        """How far reading has come in the file as it lies on the disk."""
        return self.file.tell()

    def _read(self, size: int) -> bytes:
        try:
            return bytes(self._bytes.read(size))
        except (EOFError, zlib.error, OSError) as error:  # pyarrow's errors are OSErrors, and so is BadGzipFile
            if isinstance(error, OSError) and error.errno is not None:
                raise UserError(f"{self.path} cannot be read: {error.strerror}. Check the disk and its permissions.") from error
            raise UserError(f"{self.path} is cut off or damaged ({' '.join(str(error).split())[:100]}). Make or download the file again.") from error

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
