"""Recognise token files of other programs: nanoGPT's and llm.c's `.bin`, and `.npy`.

Nothing is unpickled. A file that could contain a pickle is refused by its name, its first bytes or
the type in its header.
"""

from __future__ import annotations

import io
import struct
import tokenize
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from consyn_jax.errors import UserError

PICKLES = (".npz", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
TOKEN_SUFFIXES = (".bin", ".npy")
_NPY_TYPES = ("uint16", "uint32", "int32", "int64")
# llm.c: magic number -> (version, type of tokens), as dev/data/data_common.py of karpathy/llm.c
# writes them.
_LLM_C: dict[int, tuple[int, np.dtype]] = {
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}
_LLM_C_HEADER_BYTES = 1024
_NPY_MAGIC = b"\x93NUMPY"
# NumPy's own limit for the header. The header is a Python literal, and long literals are slow to
# parse.
_NPY_HEADER_LIMIT = 10_000


class UnusableError(Exception):
    """A fault of a file. The message completes a sentence that begins with the file's name."""


@dataclass(frozen=True)
class Head:
    """The content of a token file's header.

    Attributes:
        kind: "nanogpt", "llm.c" or "npy".
        dtype: the type of the numbers; None if it depends on the vocabulary size (nanoGPT).
        count: number of tokens in the file; None if it depends on the vocabulary size (nanoGPT).
        offset: number of bytes before the first token.
        row_tokens: number of tokens in a row of a table; None for a stream.
    """

    kind: str
    dtype: np.dtype | None
    count: int | None
    offset: int
    row_tokens: int | None = None


def read_head(path: Path) -> Head:
    """Read the header of a token file.

    Raises:
        UnusableError: the file is not a token file, or is damaged.
        UserError: the file cannot be read.
    """
    suffix = path.suffix.lower()
    if path.name == "meta.pkl":
        raise UnusableError(
            "is a pickle with nanoGPT's vocabulary, which is not needed and could run code when it "
            "is opened"
        )
    if suffix in PICKLES:
        raise UnusableError(
            f"is not opened, because a {suffix} file can contain a pickle, which could run code"
        )
    if suffix not in TOKEN_SUFFIXES:
        raise UnusableError("has no suffix of a token file (.bin or .npy)")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_NPY_HEADER_LIMIT + 16)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}. Check the path and its permissions."
        ) from error
    if not size:
        raise UnusableError("is empty")
    return _npy(head, size) if suffix == ".npy" else _bin(head, size)


def _bin(head: bytes, size: int) -> Head:
    if _is_pickle(head):
        raise UnusableError(
            "is not opened, because it is a PyTorch file or another pickle, which could run code"
        )
    magic, version, count = struct.unpack("<3i", head[:12]) if len(head) >= 12 else (0, 0, 0)
    if magic not in _LLM_C:
        if size % 2:
            raise UnusableError(f"has {size:,} bytes, an odd number, but tokens have 2 or 4 bytes")
        return Head("nanogpt", None, None, 0)
    expected, dtype = _LLM_C[magic]
    if version != expected:
        raise UnusableError(
            f"has llm.c's magic number {magic} and version {version}, "
            f"but only version {expected} is supported"
        )
    found = size - _LLM_C_HEADER_BYTES
    if count < 1 or found != count * dtype.itemsize:
        raise UnusableError(
            f"has an llm.c header for {count:,} tokens of {dtype.itemsize} bytes, "
            f"but {max(found, 0):,} bytes after it"
        )
    return Head("llm.c", dtype, count, _LLM_C_HEADER_BYTES)


def _is_pickle(head: bytes) -> bool:
    """Whether a file is a zip archive (as torch.save writes), torch's older format, or a pickle.

    A pickle of protocol 4 or 5 is recognised by its first frame.
    """
    framed = head[:3] in (b"\x80\x04\x95", b"\x80\x05\x95") and head[8:11] == b"\0\0\0"
    return head[:4] == b"PK\x03\x04" or head[:5] == b"\x80\x02\x8a\x0a\x6c" or framed


def _npy(head: bytes, size: int) -> Head:
    if head[:6] != _NPY_MAGIC:
        raise UnusableError("is not a NumPy file, although its name ends in .npy")
    shape, fortran_order, dtype, offset = _npy_header(head)
    if dtype.hasobject:
        raise UnusableError(
            "is not opened, because it contains pickled Python objects, which could run code"
        )
    if dtype.name not in _NPY_TYPES or dtype != dtype.newbyteorder("<"):
        raise UnusableError(f"has {dtype}, but token ids are little-endian {', '.join(_NPY_TYPES)}")
    if len(shape) not in (1, 2) or (len(shape) == 2 and fortran_order):
        order = " in Fortran order" if fortran_order else ""
        raise UnusableError(
            f"has the shape {tuple(shape)}{order}, but tokens need one dimension, or two in C order"
        )
    count, found = int(np.prod(shape, dtype=object)), size - offset
    if count < 1 or found != count * dtype.itemsize:
        raise UnusableError(
            f"has a header for {count:,} numbers of {dtype.itemsize} bytes, "
            f"but {found:,} bytes after it"
        )
    return Head("npy", dtype, count, offset, shape[1] if len(shape) == 2 else None)


def _npy_header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Read the header of a NumPy file: (shape, Fortran order, dtype, bytes of the header)."""
    file, formats = io.BytesIO(head), np.lib.format
    try:
        with warnings.catch_warnings(action="ignore"):  # for headers that Python 2 wrote
            version = formats.read_magic(file)
            read = (
                formats.read_array_header_1_0
                if version == (1, 0)
                else formats.read_array_header_2_0
            )
            return (*read(file, max_header_size=_NPY_HEADER_LIMIT), file.tell())
    except (
        ValueError,
        TypeError,
        SyntaxError,
        RecursionError,
        MemoryError,
        OverflowError,
        tokenize.TokenError,
    ) as error:
        raise UnusableError("has no readable NumPy header") from error
