"""Files as other programs write them, read as UTF-8."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from consyn_jax.data.sources.byte_stream import ByteStream
from consyn_jax.data.sources.discovery import find_sources
from consyn_jax.errors import UserError

TEXT = "Zwölf Boxkämpfer jagen Viktor 🥊 quer über den großen Sylter Deich.\r\n" * 50
UTF8 = TEXT.encode()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress, bz2.compress])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_every_encoding_and_compression_gives_the_same_bytes(
    tmp_path: Path, encoding: str, compress: object, size: int
) -> None:
    mark = "" if encoding in ("utf-8-sig", "utf-16", "utf-32") else "\ufeff"
    path = tmp_path / "a.txt"
    path.write_bytes(compress((mark + TEXT).encode(encoding)))  # type: ignore[operator]
    with ByteStream(path) as stream:
        assert stream.read(size) + stream.read(len(UTF8) + 10) == UTF8
    with ByteStream(path) as stream:
        stream.skip(7)
        assert stream.read(20) == UTF8[7:27]
    (source,) = find_sources([str(path)]).sources
    assert source.kind == "text"


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, bz2.compress])
@pytest.mark.parametrize("filling", [0, 4, 400_000])
def test_streams_one_after_another_are_one_text(
    tmp_path: Path, compress: Callable[[bytes], bytes], filling: int
) -> None:
    """As `cat` and parallel compressors leave them, with zeros between and at the end."""
    path = tmp_path / "a.txt"
    path.write_bytes((compress(UTF8) + bytes(filling)) * 2)
    with ByteStream(path) as stream:
        assert stream.read(3 * len(UTF8)) == UTF8 * 2


def test_a_file_that_only_begins_like_utf_16_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe" + b"\x00\xdc" * 9)
    (tmp_path / "b.txt").write_bytes("abc".encode("utf-16")[:-1])
    (tmp_path / "c.txt.xz").write_bytes(lzma.compress(UTF8)[:-20])
    with pytest.raises(UserError, match="has the byte order mark of utf-16-le, but"):
        find_sources([str(tmp_path / "b.txt")])
    with pytest.raises(UserError, match=r"c\.txt\.xz is cut off or damaged"):
        find_sources([str(tmp_path / "c.txt.xz")])
    with pytest.raises(UserError, match="is not UTF-8 text"):
        find_sources([str(tmp_path / "a.txt")])


def test_archives_are_named_and_not_read_as_text(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a.txt", "text")
    for name, mode in (("b.tar", "w"), ("b.tar.gz", "w:gz"), ("b.tar.xz", "w:xz")):
        with tarfile.open(tmp_path / name, mode) as file:  # type: ignore[call-overload]
            entry = tarfile.TarInfo("a.txt")
            entry.size = 4
            file.addfile(entry, io.BytesIO(b"text"))
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=r"is a (zip|tar) archive, and has to be unpacked"):
            find_sources([str(path)])
