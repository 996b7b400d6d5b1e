"""What a worker does with a block: documents out of bytes, cleaned, measured, given a digest and a side, and tokenised.

A pure function of the block and the options, so that it does not matter which process does it, nor how many there are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path

import numpy as np

from consyn_jax.config import CorpusOptions
from consyn_jax.data.byte_stream import CHUNK_BYTES, ByteStream
from consyn_jax.data.cleaning import Cleaning, clean
from consyn_jax.data.near_duplicates import PERMUTATIONS, signature
from consyn_jax.data.parts import LIMIT, parts
from consyn_jax.data.reading import Block, separator
from consyn_jax.data.report import EXAMPLE_CHARS
from consyn_jax.data.rows import BadRow, RowKeys, Segment, document
from consyn_jax.data.shards import token_dtype
from consyn_jax.data.sources import SAMPLE
from consyn_jax.data.split import DIGEST_BYTES, SPLITS, TRAIN, VALIDATION, cut, digest, joined_digest, side_of
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
    """

    kept: Kept
    dropped: list[tuple[str, str, str]] = field(default_factory=list)
    changed: dict[str, int] = field(default_factory=dict)
    fault: str = ""

    @property
    def documents(self) -> int:
        """Documents in the block, kept or not."""
        return len(self.kept.numbers) + len(self.dropped)


@dataclass
class _Document:
    number: int
    segments: tuple[Segment, ...]
    side: str | None = None


class _Fault(Exception):
    """A message about a place where preparation has to stop."""


class Worker:
    """Turns blocks into tokens.

    Args:
        single: the corpus is one document; a row is then cut by position, and its last part held out.
    """

    def __init__(self, options: CorpusOptions, tokenizer: BPETokenizer, test_fraction: float = 0.0, single: bool = False) -> None:
        self.options, self.tokenizer, self.test_fraction, self.single = options, tokenizer, test_fraction, single
        self._cleaning = Cleaning(options.normalize, options.control_characters)
        self._keys = RowKeys(options.text_key, options.prompt_key, options.completion_key, options.messages_key)
        self._dtype = token_dtype(tokenizer.vocab_size)

    def work(self, block: Block) -> Result:
        """The documents of `block` as tokens."""
        result = Result(Kept(*[np.zeros(0)] * 9))
        kept = self._documents(block, result)
        result.kept = self._tokenise(block, kept)
        return result

    def texts(self, block: Block) -> list[tuple[str, str]]:
        """(side, text) of the documents instead, for learning a tokenizer. A fault is raised when tokens are made."""
        return [(self._side(block, d, self._digests(d)), "".join(s.text for s in d.segments)) for d in self._documents(block, Result(Kept(*[np.zeros(0)] * 9)))]

    # ------------------------------------------------------------------------------------------------------------ documents

    def _documents(self, block: Block, result: Result) -> list[_Document]:
        """Those of the block that the rules about one document keep, cleaned."""
        kept = []
        try:
            for found in self._rows(block, result) if block.kind == "rows" else self._texts(block, result):
                cleaned = _Document(found.number, tuple(self._clean(segment, result) for segment in found.segments), found.side)
                text = "".join(segment.text for segment in cleaned.segments)
                rule = self._rule(text) if block.begins and block.last else ""
                if rule:
                    result.dropped.append((rule, f"{block.name}:{found.number}", text[:EXAMPLE_CHARS]))
                else:
                    kept.append(cleaned)
        except _Fault as fault:
            result.fault = str(fault)
        return kept

    def _rule(self, text: str) -> str:
        if not text or text.isspace():
            return "empty"
        if len(text) < self.options.min_chars:
            return "too short"
        return "too long" if self.options.max_chars is not None and len(text) > self.options.max_chars else ""

    def _clean(self, segment: Segment, result: Result) -> Segment:
        text, counts = clean(segment.text, self._cleaning)
        for name, count in counts.items():
            result.changed[name] = result.changed.get(name, 0) + count
        return segment if text is segment.text else Segment(text, segment.trained, segment.ends)

    def _texts(self, block: Block, result: Result) -> Iterator[_Document]:
        ends = separator(self.options)
        pieces = block.data.removesuffix(ends).split(ends) if block.kind == "text" else [block.data]
        at = block.offset
        for number, data in enumerate(pieces, block.first):
            yield _Document(number, (Segment(self._decode_text(block, data, at, result)),))
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
                f"Convert the file to UTF-8, leave it out, or give --invalid_utf8 replace."
            ) from None

    def _rows(self, block: Block, result: Result) -> Iterator[_Document]:
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
            if self.single and len(segments) == 1 and self.options.validation_fraction:
                data = segments[0].text.encode()
                where = cut(data, self.options.validation_fraction)
                for side, part in ((TRAIN, data[:where]), (VALIDATION, data[where:])):
                    if part:
                        yield _Document(number, (Segment(part.decode()),), side)
            else:
                yield _Document(number, segments)

    def _parse(self, line: bytes, result: Result) -> object:
        try:
            text = line.rstrip(b"\r").decode()
        except UnicodeDecodeError as error:
            if self.options.invalid_utf8 != "replace":
                raise BadRow(f"is not UTF-8 (byte {error.start} of the line).") from None
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
            data = found.segments[0].text.encode()
        else:
            data = json.dumps([[s.text, s.trained, s.ends] for s in found.segments], ensure_ascii=False).encode()
        return [digest(part) for part, _ in parts([data], self.tokenizer)] if len(data) > LIMIT else [digest(data)]

    def _side(self, block: Block, found: _Document, digests: Sequence[bytes]) -> str:
        return found.side or block.side or side_of(digests[0], self.options.validation_fraction, self.test_fraction)

    def _tokenise(self, block: Block, kept: list[_Document]) -> Kept:
        ids, targets, lengths = self._encode(kept, block.last)
        # A part's digest is that of the part; only the main process has seen the whole document.
        digests = [[digest("".join(s.text for s in d.segments).encode())] if block.kind == "part" else self._digests(d) for d in kept]
        texts = ["".join(s.text for s in d.segments) for d in kept]
        near = self.options.near_duplicates is not None
        return Kept(
            numbers=np.array([d.number for d in kept], np.int64),
            lengths=lengths,
            num_bytes=np.array([len(text.encode()) for text in texts], np.int64),
            num_chars=np.array([len(text) for text in texts], np.int64),
            digests=np.frombuffer(b"".join(joined_digest(of) for of in digests), np.uint8).reshape(-1, DIGEST_BYTES),
            sides=np.array([SPLITS.index(self._side(block, d, of)) for d, of in zip(kept, digests, strict=True)], np.uint8),
            signatures=np.array([signature(text) for text in texts] if near else [], np.uint32).reshape(-1, PERMUTATIONS),
            ids=ids,
            targets=targets,
        )

    def _encode(self, kept: list[_Document], ended: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, targets, lengths) of the documents, each behind the other."""
        texts: list[str] = []
        trained: list[bool] = []
        first, stops = [], []
        for found in kept:
            first.append(len(texts))
            for number, segment in enumerate(found.segments, 1):
                data = segment.text.encode() if len(segment.text) > LIMIT // 4 else b""
                texts += [part.decode() for part, _ in parts([data], self.tokenizer)] if len(data) > LIMIT else [segment.text]
                if segment.ends or (number == len(found.segments) and ended):
                    stops.append(len(texts))
                    texts.append("")
                trained += [segment.trained] * (len(texts) - len(trained))
        ids = self._encode_texts(texts)
        for at in stops:
            ids[at] = [self.tokenizer.eos_token_id]
        sizes = np.fromiter(map(len, ids), np.int64, len(ids))
        joined = np.fromiter(chain.from_iterable(ids), self._dtype, int(sizes.sum()))
        targets = np.zeros(0, np.uint8) if all(trained) else np.repeat(np.array(trained, np.uint8), sizes)
        return joined, targets, np.add.reduceat(sizes, first) if first else np.zeros(0, np.int64)

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = []
        start = size = 0
        for stop, text in enumerate(texts, 1):
            size += len(text)
            if size >= ENCODE_BYTES or stop == len(texts):
                ids += self.tokenizer.encode_batch(texts[start:stop])
                start, size = stop, 0
        return ids


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
