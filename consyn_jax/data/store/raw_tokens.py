"""Read token files of other programs in place, through the interface of a token store."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from consyn_jax.data.split import TEST, TRAIN, VALIDATION, split_of_name
from consyn_jax.data.store.file_hashes import FileHashes
from consyn_jax.data.store.manifest import token_dtype
from consyn_jax.data.store.number_file import NumberFile
from consyn_jax.data.store.shards import Tokens
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.data.store.token_files import UnusableError, read_head
from consyn_jax.errors import UserError
from consyn_jax.tokenization import BPETokenizer

SEARCH_TOKENS = 1 << 18
LOOK_S = 5.0  # seconds between two checks for changes of a file
FEWEST_WIDE = 16  # fewest numbers needed to recognise a wider type
SAMPLES, SAMPLE_TOKENS = (
    16,
    2048,
)  # number and size of the samples of a file, compared at every check


class _RawFile:
    """A token file; the first read checks the whole file, at about 3 GB/s.

    Such a file has no checksum. Changes during a run are detected by its size, its modification
    time, samples of its content, and ids outside the vocabulary.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        try:
            head = read_head(path)
        except UnusableError as fault:
            raise UserError(
                f"{path} {fault}. Give token files of nanoGPT, llm.c or NumPy."
            ) from None
        self.path, self.vocab_size, self._row_tokens = path, vocab_size, head.row_tokens
        dtype, count = head.dtype, head.count
        self._is_bare = dtype is None  # the file does not contain its dtype
        if dtype is None or count is None:
            dtype, size = token_dtype(vocab_size), path.stat().st_size
            count = size // dtype.itemsize
            if size % dtype.itemsize:
                raise UserError(
                    f"{path} has {size:,} bytes, which is not a multiple of 4, the size of a token "
                    f"id for a vocabulary of {vocab_size:,}. Give the --tokenizer that made the "
                    "file."
                )
        self.numbers = NumberFile(str(path), dtype, count, head.offset)
        self.verified = False
        self._lock = threading.Lock()
        self._state = self._looked_at()
        self._samples = b""
        self._looks_at = 0.0

    def verify(self) -> None:
        with self._lock:
            if self.verified:
                return
            place = 0
            for tokens in self.numbers.chunks():
                if place == 0 and self._is_bare and _is_wider(tokens):
                    raise UserError(
                        f"{self.path} contains numbers of 32 bits or more, but for a "
                        f"vocabulary of {self.vocab_size:,} tokens, a .bin file must have 16-bit "
                        "numbers. Write the file as uint16, or as .npy."
                    )
                if int(tokens.max()) >= self.vocab_size or int(tokens.min()) < 0:
                    wrong = (tokens < 0) | (tokens >= self.vocab_size)
                    at = int(wrong.argmax())
                    advice = "Give the --tokenizer that made the file."
                    if self._is_bare and tokens.dtype.itemsize == 4:
                        advice = f"{advice[:-1]}, or write it as uint32 for this tokenizer."
                    if tokens[at] < 0:
                        advice = "Write the file without this id, which may be padding."
                    raise UserError(
                        f"{self.path} has token id {tokens[at]} at {self._named(place + at)}, but "
                        f"the vocabulary has {self.vocab_size:,} tokens. {advice}"
                    )
                place += len(tokens)
            self._samples, self._looks_at = self._sampled(), time.monotonic() + LOOK_S
            self.verified = True

    def _named(self, place: int) -> str:
        """Describe a position for the user: row and column of a table, or position in a stream."""
        if self._row_tokens is None:
            return f"position {place:,}"
        row, column = divmod(place, self._row_tokens)
        return f"row {row:,}, column {column:,}"

    def read(self, start: int, out: np.ndarray) -> None:
        """Check the whole file on the first call, then fill `out` with the numbers from `start` on.

        Raises:
            UserError: the file has changed since the check.
        """
        if not self.verified:
            self.verify()
        if time.monotonic() >= self._looks_at:
            self._looks_at = time.monotonic() + LOOK_S
            self._look()
        self.numbers.read(start, out)
        if len(out) and not (int(out.min()) >= 0 and int(out.max()) < self.vocab_size):
            raise self._changed("it now has token ids outside the vocabulary")

    def _look(self) -> None:
        state = self._looked_at()
        if state[0] != self._state[0]:
            raise self._changed(f"it had {self._state[0]:,} bytes and now has {state[0]:,}")
        if state != self._state:
            raise self._changed("its modification time changed")
        if self._sampled() != self._samples:
            raise self._changed("its content changed")

    def _looked_at(self) -> tuple[int, int]:
        """Read the file's size in bytes and its modification time in ns."""
        try:
            status = self.path.stat()
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be read: {error.strerror}. Check the path, its "
                "permissions and the disk."
            ) from error
        return status.st_size, status.st_mtime_ns

    def _sampled(self) -> bytes:
        """Hash evenly spaced samples of the file."""
        content, count = hashlib.sha256(), self.numbers.count
        piece = np.empty(min(SAMPLE_TOKENS, count), self.numbers.dtype)
        for at in np.linspace(0, count - len(piece), SAMPLES).astype(np.int64):
            self.numbers.read(int(at), piece)
            content.update(piece.tobytes())
        return content.digest()

    def _changed(self, how: str) -> UserError:
        return UserError(
            f"{self.path} was changed while it was read: {how}. All steps of a run must read the "
            "same data: restore the file and run the same command again, or begin a new run."
        )


def _is_wider(tokens: np.ndarray) -> bool:
    """Whether numbers read as uint16 are probably wider on disk, because every second one is 0."""
    return tokens.dtype.itemsize == 2 and len(tokens) >= FEWEST_WIDE and not tokens[1::2].any()


class RawShard(Tokens):
    """The tokens start .. stop of a token file as a shard; a document begins after every EOS.

    Args:
        follows: the previous shard in the split; None for the first shard, which always begins a
            document.
    """

    def __init__(
        self, file: _RawFile, start: int, stop: int, eos_id: int, follows: RawShard | None
    ) -> None:
        self._file, self._start, self._follows, self.delimiter = file, start, follows, eos_id
        self.dtype, self.num_documents, self.num_bytes = file.numbers.dtype, None, None
        self.num_tokens = self.num_targets = stop - start

    @property
    def verified(self) -> bool:  # type: ignore[override]
        """Whether the file has been checked."""
        return self._file.verified

    @property
    def starts(self) -> Int64[np.ndarray, " documents"]:
        """Start of each document; every call searches the tokens, at about 1 GB/s."""
        self.verify()
        found, base = [np.zeros(1 if self.begins_document else 0, np.int64)], 1
        for tokens in self._file.numbers.chunks(self._start, self._start + self.num_tokens - 1):
            found.append(np.flatnonzero(tokens == self.delimiter) + base)
            base += len(tokens)
        return np.concatenate(found)

    @property
    def path(self) -> Path:
        """Path of the token file."""
        return self._file.path

    @property
    def first(self) -> int:
        """Index of the shard's first token in the file."""
        return self._start

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary; all ids are below this number."""
        return self._file.vocab_size

    def byte_range(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of bytes in the file that contains the tokens start .. stop."""
        numbers = self._file.numbers
        places = (
            numbers.offset + (self._start + at) * numbers.dtype.itemsize for at in (start, stop)
        )
        return next(places), next(places)

    @property
    def begins_document(self) -> bool:
        """Whether the first token begins a document.

        Otherwise the document began in an earlier file.
        """
        return self._follows is None or self._follows.ends_document

    @property
    def ends_document(self) -> bool:
        """Whether the last token is EOS."""
        last = np.empty(1, self.dtype)
        self.read(self.num_tokens - 1, last)
        return bool(last[0] == self.delimiter)

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from `start` on."""
        self._file.read(self._start + start, out)

    def verify(self) -> None:
        """Check the file for ids outside the vocabulary, on the first call only.

        Raises:
            UserError: an id is outside the vocabulary; the message names the file and the id.
        """
        self._file.verify()


class RawTokens:
    """Token files with the interface of a `TokenStore`, without index and checksums.

    Documents end with the tokenizer's EOS, which for GPT-2 is `<|endoftext|>`. llm.c puts EOS
    before documents instead of after them. In its files, the first "document" is therefore only an
    EOS, and the last document has no EOS. A document may continue in the next file. The rows of a
    two-dimensional `.npy` are read as one stream, because rows of equal length are usually pieces
    of a stream and not documents. nanoGPT's `meta.pkl` is not read.

    Args:
        paths: files in order. The name of a file decides its split (`data.split.split_of_name`; by
            default "train"). If `validation` is given, all files in `paths` are in "train".
        tokenizer: the tokenizer that made the ids. If it has more than 65,536 tokens, files of
            nanoGPT are read as uint32.
        validation: files for the split "validation".
        validation_fraction: share of the tokens to hold out if there are no validation files. The
            tail of the stream is held out, from token `int((1 - fraction) * tokens)` on. If a
            document starts there or later, the tail begins with the first such document.

    Attributes:
        paths: files by split.
        splits: the splits by name; their `num_documents` and `num_bytes` are None.

    Raises:
        UserError: a file has an unsupported type or is damaged, or no file is left to train on.
    """

    holds_pairs = False

    def __init__(
        self,
        paths: Sequence[Path],
        tokenizer: BPETokenizer,
        validation: Sequence[Path] = (),
        validation_fraction: float = 0.01,
    ) -> None:
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size
        self.paths: dict[str, list[Path]] = {TRAIN: [], VALIDATION: list(validation), TEST: []}
        for path in paths:
            split = None if validation else split_of_name(path.name)
            self.paths[split or TRAIN].append(path)
        if not self.paths[TRAIN]:
            raise UserError(
                "The names of all token files mark them as validation or test data (for example "
                f"{paths[0]}). Give files to train on as well."
            )
        files = {
            name: [_RawFile(path, self.vocab_size) for path in paths]
            for name, paths in self.paths.items()
        }
        whole = {
            name: self._split([(file, 0, file.numbers.count) for file in part])
            for name, part in files.items()
            if part
        }
        self._cut: int | None = None
        if VALIDATION not in whole:
            self._cut = _cut(whole[TRAIN], validation_fraction, tokenizer.eos_token_id)
            train, held_out = _parts_around(files[TRAIN], self._cut)
            whole |= {TRAIN: self._split(train), VALIDATION: self._split(held_out)}
        self.splits = {name: split for name, split in whole.items() if split.num_tokens}

    def split(self, name: str) -> StoreSplit:
        """Return the split `name`; an empty split if there is none."""
        return self.splits.get(name, StoreSplit([]))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the tokenizer, and of the content, order and splits of the files.

        The hash does not depend on the paths of the files.
        """
        with FileHashes() as file_hash:
            content: dict[str, Any] = {
                name: [file_hash(path) for path in paths] for name, paths in self.paths.items()
            }
        content |= {"tokenizer": self.tokenizer.sha256, "cut": self._cut}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _split(self, parts: Sequence[tuple[_RawFile, int, int]]) -> StoreSplit:
        return _joined(parts, self.tokenizer.eos_token_id)


def _joined(parts: Sequence[tuple[_RawFile, int, int]], eos_id: int) -> StoreSplit:
    shards: list[RawShard] = []
    for file, start, stop in parts:
        shards.append(RawShard(file, start, stop, eos_id, shards[-1] if shards else None))
    return StoreSplit(shards)


def raw_split(parts: Sequence[tuple[Path, int, int]], vocab_size: int, eos_id: int) -> StoreSplit:
    """Build a split from the tokens start .. stop of each file, in order.

    Raises:
        UserError: a file is missing, has an unsupported type, or is damaged.
    """
    opened = [(_RawFile(path, vocab_size), start, stop) for path, start, stop in parts]
    return _joined(opened, eos_id)


def _cut(split: StoreSplit, fraction: float, eos_id: int) -> int:
    """Choose where the held-out tail of a stream starts."""
    at = int((1 - fraction) * split.num_tokens)
    position = max(at - 1, 0)  # a document starts at `at` if the token before it is EOS
    buffer = np.empty(SEARCH_TOKENS, split.dtype)
    while position < split.num_tokens - 1:
        tokens = buffer[: split.num_tokens - 1 - position]
        split.read(position, tokens)
        found = np.flatnonzero(tokens == eos_id)
        if len(found):
            return position + int(found[0]) + 1
        position += len(tokens)
    return at


def _parts_around(
    files: Sequence[_RawFile], cut: int
) -> tuple[list[tuple[_RawFile, int, int]], list[tuple[_RawFile, int, int]]]:
    """Divide the stream at `cut`; return (file, start, stop) of the parts before and after it."""
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
