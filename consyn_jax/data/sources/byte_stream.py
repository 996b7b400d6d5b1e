"""Read the bytes of a file, decompressed, and converted to UTF-8 from UTF-16 or UTF-32."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

from consyn_jax.errors import UserError, brief

CHUNK_BYTES = 1 << 18
GZIP, ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
XZ, BZIP2 = b"\xfd7zXZ\0", b"BZh"
MAGIC_BYTES = 6
# The order matters: UTF-32's byte order mark begins with UTF-16's.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


class ByteStream:
    """The bytes of a file, decompressed, in UTF-8 and without a byte order mark.

    Gzip, Zstandard, xz and bzip2 are decompressed. A file with a UTF-16 or UTF-32 byte order mark
    is converted to UTF-8. A lone surrogate becomes invalid UTF-8.

    Raises:
        UserError: the file cannot be read, is truncated or is damaged. All methods may raise this.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = _open(path)
        try:
            self._bytes = _decompressed(self.file)
            self._decoder: codecs.IncrementalDecoder | None = None
            self._ahead = self._read(4)
            self._take_mark()
        except UserError:
            self.file.close()
            raise
        self.is_plain = self._bytes is self.file and self._decoder is None

    def _take_mark(self) -> None:
        """Remove the byte order mark, and choose the decoder that it indicates."""
        for mark, encoding in MARKS.items():
            if self._ahead.startswith(mark):
                self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
                self._ahead = self._decode(self._ahead.removeprefix(mark))
                return
        self._ahead = self._ahead.removeprefix(codecs.BOM_UTF8)

    def read(self, size: int) -> bytes:
        """Read the next `size` bytes; fewer only at the end of the file."""
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        while len(data) < size and (more := self._read(size - len(data))):
            data += more
        return data

    def skip(self, size: int) -> None:
        """Skip the next `size` bytes."""
        if self.is_plain and size >= len(self._ahead):
            self.file.seek(size - len(self._ahead), io.SEEK_CUR)
            self._ahead = b""
            return
        while size and (data := self.read(min(size, CHUNK_BYTES))):
            size -= len(data)

    @property
    def num_bytes(self) -> int | None:
        """Number of bytes left in the stream; None if the file is compressed, UTF-16 or UTF-32."""
        if not self.is_plain:
            return None
        return os.fstat(self.file.fileno()).st_size - self.file.tell() + len(self._ahead)

    @property
    def file_bytes(self) -> int:
        """Number of bytes read so far from the file on disk, which may be compressed."""
        return self.file.tell()

    def _read(self, size: int) -> bytes:
        try:
            data = bytes(self._bytes.read(size))
            if self._decoder is None:
                return data
            while data and not (decoded := self._decode(data)):
                data = bytes(self._bytes.read(size))  # the bytes so far are an incomplete character
            return decoded if data else self._decode(b"")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path} has the byte order mark of {error.encoding}, but cannot be decoded "
                f"({error.reason}). Convert the file to UTF-8."
            ) from error
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            # Errors of pyarrow and gzip.BadGzipFile are OSErrors as well, but without an errno.
            if isinstance(error, OSError) and error.errno is not None:
                raise UserError(
                    f"{self.path} cannot be read: {error.strerror}. "
                    "Check the disk and its permissions."
                ) from error
            raise UserError(
                f"{self.path} is cut off or damaged ({brief(error)}). "
                "Make or download the file again."
            ) from error

    def _decode(self, data: bytes) -> bytes:
        assert self._decoder is not None
        text = self._decoder.decode(data, final=not data)
        return text.encode("utf-8", "surrogatepass")

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


class _Streams:
    """Decompress a file of consecutive xz or bzip2 streams.

    Python's own file objects end silently if the bytes after a stream are not another stream.
    """

    def __init__(
        self, file: BinaryIO, start: Callable[[], lzma.LZMADecompressor | bz2.BZ2Decompressor]
    ) -> None:
        self._file, self._start, self._stream = file, start, start()

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes; the result is empty only at the end of the file."""
        data = b""
        while not data:
            more = b""
            if self._stream.eof:
                more = self._stream.unused_data.lstrip(b"\0")  # xz streams may be padded with zeros
                while not more and (chunk := self._file.read(CHUNK_BYTES)):
                    more = chunk.lstrip(b"\0")
                if not more:
                    return b""
                self._stream = self._start()
            elif self._stream.needs_input and not (more := self._file.read(CHUNK_BYTES)):
                raise EOFError("it ends inside a compressed stream")
            data = self._stream.decompress(more, size)
        return data


def _decompressed(file: BinaryIO) -> BinaryIO:
    """Return the file itself, or a stream of its decompressed content."""
    magic = file.read(MAGIC_BYTES)
    file.seek(0)
    if magic.startswith(GZIP):
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if magic.startswith(XZ):
        return cast(BinaryIO, _Streams(file, lzma.LZMADecompressor))
    if magic.startswith(BZIP2):
        return cast(BinaryIO, _Streams(file, bz2.BZ2Decompressor))
    if magic.startswith(ZSTANDARD):
        import pyarrow

        source = pyarrow.PythonFile(file, "r")
        return cast(BinaryIO, pyarrow.CompressedInputStream(source, "zstd"))
    return file


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}. Check its permissions."
        ) from error
