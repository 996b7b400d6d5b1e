"""Read a split of a token store as one stream of documents."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np
from jaxtyping import Bool, Int64, Integer, UInt8

from consyn_jax.data.store.shards import Tokens


class StoreSplit:
    """The shards of one split, read as one token stream.

    The documents are in the order of the store, and each ends with EOS.

    Attributes:
        num_targets: number of tokens that are targets of the loss.
        num_documents: number of documents; None if unknown (raw token files).
        num_bytes: size of the documents' text in UTF-8 bytes; None if unknown for a shard.
        dtype: a number type that can represent the tokens of all shards.
    """

    def __init__(self, shards: Sequence[Tokens]) -> None:
        self.shards = tuple(shards)
        # Stream position of the start of each shard, followed by the end of the stream.
        self._offsets = [0, *accumulate(shard.num_tokens for shard in shards)]
        self.num_tokens = self._offsets[-1]
        self.num_targets = sum(shard.num_targets for shard in shards)
        self.num_documents = _sum(shard.num_documents for shard in shards)
        self.num_bytes = _sum(shard.num_bytes for shard in shards)
        self.dtype: np.dtype = (
            np.result_type(*{shard.dtype for shard in shards}) if shards else np.dtype(np.uint16)
        )

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from stream position `start` on.

        `out` is one-dimensional and contiguous.
        """
        if not len(out):
            return
        number = self._number(start)
        if start + len(out) <= self._offsets[number + 1]:
            self.shards[number].read(start - self._offsets[number], out)
            return
        for number, at, part in self._parts(start, out):
            self.shards[number].read(at, part)

    def read_targets(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the target values of the tokens from stream position `start` on.

        A value is 1 for a target of the loss and 0 for most other tokens; `Tokens.read_targets`
        describes two more values.
        """
        for number, at, part in self._parts(start, out):
            self.shards[number].read_targets(at, part)

    def windows(
        self, first: Int64[np.ndarray, " n"], width: int
    ) -> tuple[
        Integer[np.ndarray, "n width_and_1"],
        Bool[np.ndarray, "n width"],
        UInt8[np.ndarray, "n width"] | None,
    ]:
        """Read windows of the stream that start at positions `first`: (tokens, begins, targets).

        Each row of `tokens` starts with the token before the window, or 0 at the start of the
        stream. `begins` is true where a document starts. `targets` is None if all tokens are
        targets. Positions after the end of the stream are 0.
        """
        n, starts = len(first), first.tolist()
        stops = [min(start + width, self.num_tokens) for start in starts]
        touched = self.verify(starts, stops)
        tokens = np.empty((n, width + 1), self.dtype)
        for row, start, stop in zip(tokens, starts, stops, strict=True):
            if start > 0 and stop == start + width:
                self.read(start - 1, row)
            else:
                row[0] = 0
                row[1 + stop - start :] = 0
                known = row[: 1 + stop - start] if start else row[1 : 1 + stop]
                self.read(max(start - 1, 0), known)
        targets = None
        if self.num_targets < self.num_tokens:
            targets = np.zeros((n, width), np.uint8)
            for row, start, stop in zip(targets, starts, stops, strict=True):
                self.read_targets(start, row[: stop - start])
        return tokens, self._begins(first, touched, tokens), targets

    def verify(self, starts: Iterable[int], stops: Iterable[int]) -> list[int]:
        """Verify the shards that overlap the ranges start .. stop, and return their numbers.

        Shards are verified in parallel, because hashing releases the interpreter lock.

        Raises:
            UserError: a shard is damaged; the message names the first damaged shard.
        """
        numbers: set[int] = set()
        for start, stop in zip(starts, stops, strict=True):
            first, last = self._number(start), self._number(stop - 1)
            numbers.update((first,) if first == last else range(first, last + 1))
        touched = sorted(numbers)
        fresh = [self.shards[number] for number in touched if not self.shards[number].verified]
        if len(fresh) == 1:
            fresh[0].verify()
        elif fresh:
            with ThreadPoolExecutor(min(len(fresh), os.cpu_count() or 1)) as pool:
                for _ in pool.map(lambda shard: shard.verify(), fresh):
                    pass
        return touched

    def touched(self, start: int, stop: int) -> Iterator[tuple[int, int, Tokens]]:
        """Iterate over the shards that overlap a range: (number, stream position, shard)."""
        for number in range(self._number(start), self._number(stop - 1) + 1):
            yield number, self._offsets[number], self.shards[number]

    def document_starts(self) -> Iterator[Int64[np.ndarray, " _"]]:
        """Iterate over the stream positions of document starts, one array per shard."""
        for shard, offset in zip(self.shards, self._offsets, strict=False):
            yield shard.starts + offset

    def _number(self, position: int) -> int:
        return bisect_right(self._offsets, position) - 1

    def _parts(self, start: int, out: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield (shard number, position in the shard, part of `out`) for each shard to read."""
        number, length, done = self._number(start), len(out), 0
        while done < length:
            at = start + done - self._offsets[number]
            stop = min(length, self._offsets[number + 1] - start)
            yield number, at, out[done:stop]
            number, done = number + 1, stop

    def _begins(
        self, first: Int64[np.ndarray, " n"], touched: list[int], tokens: np.ndarray
    ) -> Bool[np.ndarray, "n width"]:
        width = tokens.shape[1] - 1
        delimiters = {self.shards[number].delimiter for number in touched}
        delimiter = delimiters.pop() if len(delimiters) == 1 else None
        if delimiter is not None:
            begins = tokens[:, :-1] == delimiter
            begins[first == 0, 0] = True
            return begins
        begins = np.zeros((len(first), width), bool)
        for number in touched:
            starts, local = self.shards[number].starts, first - self._offsets[number]
            low, high = np.searchsorted(starts, local), np.searchsorted(starts, local + width)
            counts = high - low
            row = np.repeat(np.arange(len(first)), counts)
            nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
            begins[row, starts[low[row] + nth] - local[row]] = True
        return begins


def _sum(numbers: Iterable[int | None]) -> int | None:
    """Sum the numbers; None if one of them is None."""
    known = list(numbers)
    return None if None in known else sum(number for number in known if number is not None)
