"""What a worker does with a block: documents out of bytes, cleaned, measured, given a digest and a side, and tokenised.

A pure function of the block and the options, so that it does not matter which process does it, nor how many there are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from consyn_jax.config import CorpusOptions, UserError
from consyn_jax.data.byte_stream import CHUNK_BYTES, ByteStream
from consyn_jax.data.cleaning import clean
from consyn_jax.data.near_duplicates import PERMUTATIONS, signature
from consyn_jax.data.parts import LIMIT, parts
from consyn_jax.data.reading import Block, separator
from consyn_jax.data.report import EXAMPLE_CHARS
from consyn_jax.data.rows import BadRow, RowKeys, Segment, document
from consyn_jax.data.shards import token_dtype
from consyn_jax.data.sources import REMEDY, SAMPLE
from consyn_jax.data.split import DIGEST_BYTES, SPLITS, cut, digest, joined_digest, side_of
from consyn_jax.tokenization import BPETokenizer

# The tokenizer holds about a hundred bytes for each byte of a batch.
ENCODE_BYTES = 1 << 19


@dataclass
class Kept:
    """The documents of a block that go on: arrays by document, and the last two by token.

    Attributes:
        numbers: of the document or line in its source, int64 [n].
        lengths: tokens, int64 [n]; EOS is among them, except in a part that is not its document's last.
        num_bytes, num_chars: of the cleaned text, int64 [n].
        digests: uint8 [n, 16].
        sides: indices into `SPLITS`, uint8 [n].
        signatures: uint32 [n, 128]; [0, 128] where near duplicates are not looked for.
        ids: uint16 or uint32, one document behind the other.
        targets: uint8, 1 where a token is a target of the loss; empty where all are.
    """

    numbers: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray
    num_chars: np.ndarray
    digests: np.ndarray
    sides: np.ndarray
    signatures: np.ndarray
    ids: np.ndarray
    targets: np.ndarray

    def arrays(self) -> list[np.ndarray]:
        """In the order of the fields."""
        return [getattr(self, f.name) for f in fields(self)]


@dataclass
class Result:
    """What became of a block.

    Attributes:
        dropped: (rule, place, beginning of the text) of each document that was left out.
        changed: as in `Report`.
        fault: what stops the preparation, a message with the place; "" for nothing.
        is_blank: the part has nothing but white space.
        rows_not_utf8: as in `Report`.
    """

    kept: Kept
    dropped: list[tuple[str, str, str]] = field(default_factory=list)
    changed: dict[str, int] = field(default_factory=dict)
    fault: str = ""
    is_blank: bool = False
    rows_not_utf8: int = 0

    @property
    def documents(self) -> int:
        """Documents in the block, kept or not."""
        return len(self.kept.numbers) + len(self.dropped)


@dataclass
class _Cleaned:
    """A segment as it is tokenised: cleaned, in parts where it is long."""

    texts: list[str]
    trained: bool
    ends: bool


@dataclass
class _Document:
    number: int
    segments: list[_Cleaned]
    side: str | None = None

    @cached_property
    def text(self) -> str:
        return "".join([text for segment in self.segments for text in segment.texts])


_Found = tuple[int, tuple[Segment, ...], str | None]
"""Number, segments as they were found, and the side where the text does not decide it."""


class _Fault(Exception):
    """A message about a place where preparation has to stop."""


class Worker:
    """Turns blocks into tokens.

    Args:
        single: the corpus is one document; a row is then cut by position, and its last part held out.
    """

    def __init__(self, options: CorpusOptions, tokenizer: BPETokenizer, test_fraction: float = 0.0, single: bool = False) -> None:
        self.options, self.tokenizer, self.test_fraction, self.single = options, tokenizer, test_fraction, single
        self._keys = RowKeys(options.text_key, options.prompt_key, options.completion_key, options.messages_key)
        self._dtype = token_dtype(tokenizer.vocab_size)

    def work(self, block: Block) -> Result:
        """The documents of `block` as tokens."""
        result = Result(Kept(*[np.zeros(0)] * 9))
        kept = self._documents(block, result)
        result.kept = self._tokenise(block, kept)
        result.is_blank = block.kind == "part" and all(not d.text or d.text.isspace() for d in kept)
        return result

    def texts(self, block: Block) -> list[tuple[str, str]]:
        """(side, text) of the documents instead, for learning a tokenizer.

        Raises:
            UserError: what stops the preparation.
        """
        result = Result(Kept(*[np.zeros(0)] * 9))
        kept = self._documents(block, result)
        if result.fault:
            raise UserError(result.fault)
        return [(self._side(block, d, self._digests(d)), d.text) for d in kept]

    # ------------------------------------------------------------------------------------------------------------ documents

    def _documents(self, block: Block, result: Result) -> list[_Document]:
        """Those of the block that the rules about one document keep, cleaned."""
        kept = []
        try:
            for number, segments, side in self._rows(block, result) if block.kind == "rows" else self._texts(block, result):
                found = _Document(number, [self._clean(segment, result) for segment in segments], side)
                text = found.text
                rule = self._rule(text) if block.begins and block.last else ""
                if rule:
                    result.dropped.append((rule, f"{block.name}:{number}", text[:EXAMPLE_CHARS]))
                else:
                    kept.append(found)
        except (_Fault, UserError) as fault:  # the latter of a file that is gone when its line is looked up
            result.fault = str(fault)
        return kept

    def _rule(self, text: str) -> str:
        if not text or text.isspace():
            return "empty"
        if len(text) < self.options.min_chars:
            return "too short"
        return "too long" if self.options.max_chars is not None and len(text) > self.options.max_chars else ""

    def _clean(self, segment: Segment, result: Result) -> _Cleaned:
        texts = self._parts(segment.text)
        for at, text in enumerate(texts):
            texts[at], counts = clean(text, self.options.normalize, self.options.control_characters)
            for name, count in counts.items():
                result.changed[name] = result.changed.get(name, 0) + count
        return _Cleaned(texts, segment.trained, segment.ends)

    def _parts(self, text: str) -> list[str]:
        """A text as it was found, cut where a file with it would be: so equal documents have equal parts, whatever they come in."""
        if len(text) <= LIMIT // 4:  # a character has at most four bytes
            return [text]
        data = text.encode()
        return [part.decode() for part, _ in parts([data], self.tokenizer)] if len(data) > LIMIT else [text]

    def _texts(self, block: Block, result: Result) -> Iterator[_Found]:
        ends = separator(self.options)
        pieces = [block.data]
        if block.kind == "text":
            pieces = block.data.split(ends)
            if not pieces[-1]:
                pieces.pop()
        at = block.offset
        for number, data in enumerate(pieces, block.first):
            yield number, (Segment(self._decode_text(block, data, at, result)),), None
            at += len(data) + len(ends)

    def _decode_text(self, block: Block, data: bytes, at: int, result: Result) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            if self.options.invalid_utf8 == "replace":
                return _replaced(data, result)
            where = at + error.start
            raise _Fault(
                f"{block.name} is not UTF-8 text: byte {where} (line {_line(Path(block.name), where)}) is 0x{data[error.start]:02x}. "
                f"{REMEDY}"
            ) from None

    def _rows(self, block: Block, result: Result) -> Iterator[_Found]:
        keys = RowKeys() if block.name == SAMPLE else self._keys
        for at, line in enumerate(block.data.split(b"\n")):
            if not line or line.isspace():
                continue
            number = block.numbers[at] if block.numbers else block.first + at
            try:
                segments = document(self._parse(line, result), keys)
            except BadRow as fault:
                if self.options.on_bad_rows != "skip":
                    raise _Fault(f"{block.name}:{number} {fault} Mend the row, or give --on_bad_rows skip.") from None
                result.dropped.append(("bad row", f"{block.name}:{number}", str(fault)))
                continue
            if self.single and len(segments) == 1:
                data, test = segments[0].text.encode(), self.test_fraction
                ends = [0, cut(data, self.options.validation_fraction + test), cut(data, test), len(data)]
                for side, (start, stop) in zip(SPLITS, pairwise(ends), strict=True):
                    if start < stop:
                        yield number, (Segment(data[start:stop].decode()),), side
            else:
                yield number, segments, None

    def _parse(self, line: bytes, result: Result) -> object:
        try:
            text = line.rstrip(b"\r").decode()
        except UnicodeDecodeError as error:
            result.rows_not_utf8 += 1
            if self.options.invalid_utf8 != "replace":
                raise BadRow(f"is not UTF-8 (byte {error.start} of the row; --invalid_utf8 replace would take it).") from None
            text = _replaced(line, result)
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise BadRow(f"is broken JSON ({error.msg}, column {error.colno}).") from None
        except RecursionError:
            raise BadRow("is broken JSON (nested too deeply).") from None
        except ValueError as error:  # a number of thousands of digits
            raise BadRow(f"is broken JSON ({error}).") from None

    # -------------------------------------------------------------------------------------------------------------- tokens

    def _digests(self, found: _Document) -> list[bytes]:
        """The digests of a document's parts. What is trained on belongs to what it says, so it is hashed where it is not all."""
        if len(found.segments) == 1:
            return [digest(text.encode()) for text in found.segments[0].texts]
        return [digest(json.dumps([["".join(s.texts), s.trained, s.ends] for s in found.segments], ensure_ascii=False).encode())]

    def _side(self, block: Block, found: _Document, digests: Sequence[bytes]) -> str:
        return found.side or block.side or side_of(digests[0], self.options.validation_fraction, self.test_fraction)

    def _tokenise(self, block: Block, kept: list[_Document]) -> Kept:
        ids, targets, lengths = self._encode(kept, block.last)
        # A part's digest is that of the part; only the main process has seen the whole document.
        digests = [[digest(d.text.encode())] if block.kind == "part" else self._digests(d) for d in kept]
        texts = [d.text for d in kept]
        near = self.options.near_duplicates is not None
        return Kept(
            numbers=np.array([d.number for d in kept], np.int64),
            lengths=lengths,
            num_bytes=np.array([len(text.encode()) for text in texts], np.int64),
            num_chars=np.array([len(text) for text in texts], np.int64),
            digests=np.frombuffer(b"".join(joined_digest(of) for of in digests), np.uint8).reshape(-1, DIGEST_BYTES),
            sides=np.array([SPLITS.index(self._side(block, d, of)) for d, of in zip(kept, digests, strict=True)], np.uint8),
            signatures=np.array([self._signature(d) for d in kept] if near else [], np.uint32).reshape(-1, PERMUTATIONS),
            ids=ids,
            targets=targets,
        )

    def _signature(self, found: _Document) -> np.ndarray:
        """Of a long document the least of its parts' signatures, as where it is a file and comes in parts."""
        texts = found.segments[0].texts if len(found.segments) == 1 else [found.text]
        return np.minimum.reduce([signature(text) for text in texts])

    def _encode(self, kept: list[_Document], ended: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, targets, lengths) of the documents, each behind the other."""
        texts: list[str] = []
        trained: list[bool] = []
        first: list[int] = []
        stops: set[int] = set()
        for found in kept:
            first.append(len(texts))
            for number, segment in enumerate(found.segments, 1):
                texts += segment.texts
                if segment.ends or (number == len(found.segments) and ended):
                    stops.add(len(texts))
                    texts.append("")
                trained += [segment.trained] * (len(texts) - len(trained))
        sizes, arrays = np.zeros(len(texts), np.int64), [np.zeros(0, self._dtype)]
        for start, stop in _batches(texts):
            # Lists of numbers take five times the memory of the text, so no more of them are kept than a batch.
            ids = self.tokenizer.encode_batch(texts[start:stop])
            for at in range(start, stop):
                if at in stops:
                    ids[at - start] = [self.tokenizer.eos_token_id]
            sizes[start:stop] = list(map(len, ids))
            arrays.append(np.fromiter(chain.from_iterable(ids), self._dtype, int(sizes[start:stop].sum())))
        targets = np.zeros(0, np.uint8) if all(trained) else np.repeat(np.array(trained, np.uint8), sizes)
        return np.concatenate(arrays), targets, np.add.reduceat(sizes, first) if first else np.zeros(0, np.int64)


def _batches(texts: list[str]) -> Iterator[tuple[int, int]]:
    """Runs of about `ENCODE_BYTES` of text."""
    start = size = 0
    for stop, text in enumerate(texts, 1):
        size += len(text)
        if size >= ENCODE_BYTES or stop == len(texts):
            yield start, stop
            start, size = stop, 0


def _replaced(data: bytes, result: Result) -> str:
    text = data.decode(errors="replace")
    count = text.count("\ufffd") - data.count("\ufffd".encode())
    result.changed["invalid_utf8"] = result.changed.get("invalid_utf8", 0) + count
    return text


def _line(path: Path, at: int) -> int:
    """The line of a byte of a file, from 1."""
    line = 1
    with ByteStream(path) as stream:
        while at > 0 and (data := stream.read(min(CHUNK_BYTES, at))):
            line, at = line + data.count(b"\n"), at - len(data)
    return line
