"""Token files found in the wild, read in place: nanoGPT's and llm.c's `.bin`, and `.npy`.

Nothing is unpickled: what could hold a pickle is refused by its name, by its first bytes, or by the type in its header.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import threading
import tokenize
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from consyn_jax.config import UserError
from consyn_jax.data.digests import FileDigests
from consyn_jax.data.number_file import NumberFile
from consyn_jax.data.shards import StoreSplit, Tokens, token_dtype
from consyn_jax.data.split import TEST, TRAIN, VALIDATION
from consyn_jax.tokenization import BPETokenizer

PICKLES = (".npz", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
TOKEN_SUFFIXES = (".bin", ".npy")
_NPY_TYPES = ("uint16", "uint32", "int32", "int64")
# llm.c: magic number -> (version, type of tokens). dev/data/data_common.py of karpathy/llm.c writes both.
_LLM_C: dict[int, tuple[int, np.dtype]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
_LLM_C_HEADER_BYTES = 1024
_NPY_MAGIC = b"\x93NUMPY"
_NPY_HEADER_LIMIT = 10_000  # numpy's own: its header is Python text, which is slow to read when it is long
_SPLIT_PARTS = {"val": VALIDATION, "valid": VALIDATION, "validation": VALIDATION, "test": TEST}


class _Unusable(Exception):
    """What is wrong with a file, as the rest of a sentence that begins with its name."""


@dataclass(frozen=True)
class _Head:
    """What the beginning of a file tells.

    Attributes:
        dtype: None where only the vocabulary's size decides (nanoGPT).
        count: numbers in the file; None likewise.
        offset: bytes in front of them.
    """

    kind: str
    dtype: np.dtype | None
    count: int | None
    offset: int


# ------------------------------------------------------------------------------------------------------------------------ heads


def is_named_so(path: Path) -> bool:
    """Whether the name is that of a token file, or of a pickle, for which `look` gives the reason to refuse it."""
    return path.suffix.lower() in TOKEN_SUFFIXES + PICKLES


def look(path: Path) -> tuple[str, str]:
    """The kind of a token file, ("nanogpt" | "llm.c" | "npy", ""), or ("", why it is none). Only its beginning is read.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return _head(path).kind, ""
    except _Unusable as fault:
        return "", str(fault)


def _head(path: Path) -> _Head:
    suffix = path.suffix.lower()
    if path.name == "meta.pkl":
        raise _Unusable("is nanoGPT's vocabulary in a pickle, which could run code when it is opened, and is not needed")
    if suffix in PICKLES:
        raise _Unusable(f"is not opened, because a {suffix} file can hold a pickle, which could run code")
    if suffix not in TOKEN_SUFFIXES:
        raise _Unusable("is no token file by its name, which would end in .bin or .npy")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_NPY_HEADER_LIMIT + 16)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check that it is there and its permissions.") from error
    if not size:
        raise _Unusable("is empty")
    return _npy(head, size) if suffix == ".npy" else _bin(head, size)


def _bin(head: bytes, size: int) -> _Head:
    if _is_pickle(head):
        raise _Unusable("is not opened, because it is a PyTorch file or another pickle, which could run code")
    magic, version, count = struct.unpack("<3i", head[:12]) if len(head) >= 12 else (0, 0, 0)
    if magic not in _LLM_C:
        if size % 2:
            raise _Unusable(f"has {size:,} bytes, which are no whole number of tokens")
        return _Head("nanogpt", None, None, 0)
    expected, dtype = _LLM_C[magic]
    if version != expected:
        raise _Unusable(f"has llm.c's magic number {magic} and version {version}, and only version {expected} is known")
    found = size - _LLM_C_HEADER_BYTES
    if count < 1 or found != count * dtype.itemsize:
        raise _Unusable(f"has a header of llm.c that says {count:,} tokens of {dtype.itemsize} bytes, and {max(found, 0):,} bytes behind it")
    return _Head("llm.c", dtype, count, _LLM_C_HEADER_BYTES)


def _is_pickle(head: bytes) -> bool:
    """A zip (what torch.save writes), torch's older format, or the frame that opens a pickle of protocol 4 or 5."""
    framed = head[:3] in (b"\x80\x04\x95", b"\x80\x05\x95") and head[8:11] == b"\0\0\0"
    return head[:4] == b"PK\x03\x04" or head[:5] == b"\x80\x02\x8a\x0a\x6c" or framed


def _npy(head: bytes, size: int) -> _Head:
    if head[:6] != _NPY_MAGIC:
        raise _Unusable("is no NumPy file, though its name ends in .npy")
    file = io.BytesIO(head)
    try:
        with warnings.catch_warnings(action="ignore"):  # that Python 2 wrote it
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(file, max_header_size=_NPY_HEADER_LIMIT)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, OverflowError, tokenize.TokenError) as error:
        raise _Unusable("has no NumPy header that can be read") from error
    if dtype.hasobject:
        raise _Unusable("is not opened, because it holds Python objects, which are a pickle, which could run code")
    if dtype.name not in _NPY_TYPES or dtype != dtype.newbyteorder("<"):
        raise _Unusable(f"holds {dtype}, and tokens are {', '.join(_NPY_TYPES)}, little-endian")
    if len(shape) not in (1, 2) or (len(shape) == 2 and fortran_order):
        raise _Unusable(f"has the shape {tuple(shape)}{' in Fortran order' if fortran_order else ''}, and tokens are one row, or rows")
    count, found = int(np.prod(shape, dtype=object)), size - file.tell()
    if count < 1 or found != count * dtype.itemsize:
        raise _Unusable(f"has a header that says {count:,} numbers of {dtype.itemsize} bytes, and {found:,} bytes behind it")
    return _Head("npy", dtype, count, file.tell())


# ----------------------------------------------------------------------------------------------------------------------- reading


class _RawFile:
    """A token file, checked as a whole when any of it is first read: about a third of a second a gigabyte."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        try:
            head = _head(path)
        except _Unusable as fault:
            raise UserError(f"{path} {fault}. Give token files of nanoGPT, llm.c or NumPy.") from None
        self.path, self._vocab_size = path, vocab_size
        dtype, count = head.dtype, head.count
        if dtype is None or count is None:
            dtype, size = token_dtype(vocab_size), path.stat().st_size
            count = size // dtype.itemsize
            if size % dtype.itemsize:
                raise UserError(f"{path} has {size:,} bytes, not a multiple of the 4 of a vocabulary of {vocab_size:,}. Give the --tokenizer that made it.")
        self.numbers = NumberFile(str(path), dtype, count, head.offset)
        self.verified = False
        self._lock = threading.Lock()

    def verify(self) -> None:
        with self._lock:
            if self.verified:
                return
            signed = self.numbers.dtype.kind == "i"
            for tokens in self.numbers.chunks():
                worst = max(int(tokens.max()), 0)
                if signed and int(tokens.min()) < 0:
                    worst = int(tokens.min())
                if not 0 <= worst < self._vocab_size:
                    raise UserError(
                        f"{self.path} has token id {worst}, and the vocabulary has {self._vocab_size:,} tokens. Give the --tokenizer that made the file."
                    )
            self.verified = True


class RawShard(Tokens):
    """The tokens start .. stop of a file. Documents begin behind EOS, wherever it stands.

    Args:
        follows: what stands in front of it in its split; None at the beginning, where a document begins in any case.
    """

    def __init__(self, file: _RawFile, start: int, stop: int, eos_id: int, follows: RawShard | None) -> None:
        self._file, self._start, self._follows, self.delimiter = file, start, follows, eos_id
        self.dtype, self.num_documents, self.num_bytes = file.numbers.dtype, None, None
        self.num_tokens = self.num_targets = stop - start

    @property
    def verified(self) -> bool:  # type: ignore[override]
        return self._file.verified

    @property
    def starts(self) -> Int64[np.ndarray, " documents"]:
        """Where documents begin: looked for each time, at about a gigabyte a second."""
        self.verify()
        begins_here = self._follows is None or self._follows.ends_document
        found, base = [np.zeros(1 if begins_here else 0, np.int64)], 1
        for tokens in self._file.numbers.chunks(self._start, self._start + self.num_tokens - 1):
            found.append(np.flatnonzero(tokens == self.delimiter) + base)
            base += len(tokens)
        return np.concatenate(found)

    @property
    def ends_document(self) -> bool:
        """Whether the last token is EOS."""
        last = np.empty(1, self.dtype)
        self.read(self.num_tokens - 1, last)
        return bool(last[0] == self.delimiter)

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from `start` on."""
        if not self._file.verified:
            self.verify()
        self._file.numbers.read(self._start + start, out)

    def verify(self) -> None:
        """Look for ids outside the vocabulary, the first time.

        Raises:
            UserError: naming the file and the id.
        """
        self._file.verify()


class RawTokens:
    """Token files as a token store: the same interface as `store.TokenStore`, without an index and without checksums.

    Documents end behind the tokenizer's EOS, which is also where GPT-2's `<|endoftext|>` stands if the tokenizer has it as EOS. llm.c
    puts it in front of documents and not behind, which comes to the same stream: only the first "document" is then EOS alone, and the
    last lacks its own. A document goes on from one file to the next, as llm.c cuts them. Rows of a two-dimensional `.npy` are read one
    after the other as pieces of one stream, because rows of one length are cut from a stream more often than they are documents.
    nanoGPT's `meta.pkl` is not read.

    Args:
        paths: files in order. Those with val, valid or validation as a part of their names are the split "validation", those with test
            the split "test", the rest "train"; with `validation`, all are "train".
        tokenizer: the one that made the ids. Above 65,536 tokens, nanoGPT's files are read as uint32.
        validation: files for the split "validation".
        validation_fraction: without any, the stream from `int((1 - fraction) * tokens)` on, moved to the next document start if there
            is one, is held out.

    Attributes:
        splits: by name; `num_documents` and `num_bytes` are None there, because nobody has counted.

    Raises:
        UserError: a file is none of these, or damaged; no file is left to train on.
    """

    def __init__(self, paths: Sequence[Path], tokenizer: BPETokenizer, validation: Sequence[Path] = (), validation_fraction: float = 0.01) -> None:
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size
        self._paths: dict[str, list[Path]] = {TRAIN: [], VALIDATION: list(validation), TEST: []}
        for path in paths:
            self._paths[TRAIN if validation else split_of_name(path)].append(path)
        if not self._paths[TRAIN]:
            raise UserError(f"All token files are validation or test data by their names ({paths[0]} for one). Name those to train on too.")
        files = {name: [_RawFile(path, self.vocab_size) for path in paths] for name, paths in self._paths.items()}
        whole = {name: StoreSplit(self._shards([(file, 0, file.numbers.count) for file in part])) for name, part in files.items() if part}
        self._cut: int | None = None
        if VALIDATION not in whole:
            self._cut = _cut(whole[TRAIN], validation_fraction, tokenizer.eos_token_id)
            sides = _sides(files[TRAIN], self._cut)
            whole |= {name: StoreSplit(self._shards(parts)) for name, parts in zip((TRAIN, VALIDATION), sides, strict=True)}
        self.splits = {name: split for name, split in whole.items() if split.num_tokens}

    def split(self, name: str) -> StoreSplit:
        """The split of that name; one without tokens where there is none."""
        return self.splits.get(name, StoreSplit([]))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the files' bytes in order, of how they are split and of the tokenizer; wherever the files lie."""
        with FileDigests() as digest:
            content: dict[str, Any] = {name: [digest(path) for path in paths] for name, paths in self._paths.items()}
        content |= {"tokenizer": self.tokenizer.sha256, "cut": self._cut}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _shards(self, parts: Sequence[tuple[_RawFile, int, int]]) -> list[RawShard]:
        shards: list[RawShard] = []
        for file, start, stop in parts:
            shards.append(RawShard(file, start, stop, self.tokenizer.eos_token_id, shards[-1] if shards else None))
        return shards


def split_of_name(path: Path) -> str:
    """The split that a token file belongs to by its name.

    >>> [split_of_name(Path(name)) for name in ("train.bin", "val.bin", "fineweb_val_000000.bin", "tests.npy", "evaluation.npy")]
    ['train', 'validation', 'validation', 'train', 'train']
    """
    parts = (_SPLIT_PARTS.get(part) for part in re.split(r"[^a-z]+", path.stem.lower()))
    return next((split for split in parts if split), TRAIN)


def _cut(split: StoreSplit, fraction: float, eos_id: int) -> int:
    """Where the held-out tail of a stream begins."""
    at = int((1 - fraction) * split.num_tokens)
    position = max(at - 1, 0)  # a document starts at `at` if EOS stands in front of it
    buffer = np.empty(1 << 18, split.dtype)
    while position < split.num_tokens - 1:
        tokens = buffer[: split.num_tokens - 1 - position]
        split.read(position, tokens)
        found = np.flatnonzero(tokens == eos_id)
        if len(found):
            return position + int(found[0]) + 1
        position += len(tokens)
    return at


def _sides(files: Sequence[_RawFile], cut: int) -> tuple[list[tuple[_RawFile, int, int]], list[tuple[_RawFile, int, int]]]:
    """(file, start, stop) of the stream in front of `cut`, and from there on."""
    front, tail, offset = [], [], 0
    for file in files:
        count = file.numbers.count
        here = min(max(cut - offset, 0), count)
        if here:
            front.append((file, 0, here))
        if here < count:
            tail.append((file, here, count))
        offset += count
    return front, tail
