"""Tokenise cleaned documents, assign them to splits, and store them as arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain

import numpy as np
from jaxtyping import Int64, UInt8, UInt32

from consyn_jax.data.preparation.near_duplicates import PERMUTATIONS, signature
from consyn_jax.data.sources.reader import Block
from consyn_jax.data.split import DIGEST_BYTES, SPLITS, digest, joined_digest, split_of
from consyn_jax.data.store.manifest import token_dtype
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.tokenization.chat.chat_encoder import EncodedChat
from consyn_jax.tokenization.encoding import Before

# The tokenizer needs about a hundred bytes of memory for each byte of a batch.
ENCODE_BYTES = 1 << 19


@dataclass
class CleanedSegment:
    """A segment of a document after cleaning.

    Attributes:
        texts: the text of the segment; a long text is divided into several strings.
        trained: whether its tokens are targets of the loss.
    """

    texts: list[str]
    trained: bool


@dataclass
class Document:
    """A cleaned document.

    Attributes:
        number: number of the document or line in its source.
        segments: the document's text in segments. A conversation is one segment of rendered text.
        split: the document's split; None if the hash of its text decides.
        chat: the ids and targets of a conversation; None for other documents.
        format: the row's format, a value of `--row_format`; empty if the document is not a row.
    """

    number: int
    segments: list[CleanedSegment]
    split: str | None = None
    chat: EncodedChat | None = None
    format: str = ""

    @property
    def has_prompt(self) -> bool:
        """Whether the document is a row with a prompt that is not trained on."""
        return self.chat is not None or len(self.segments) > 1

    @cached_property
    def text(self) -> str:
        """The texts of all segments, joined."""
        return "".join([text for segment in self.segments for text in segment.texts])

    @cached_property
    def digests(self) -> list[bytes]:
        """Digests of the document, for finding exact duplicates.

        A document with a single segment has one digest for each of the segment's `texts`. Any other
        document has one digest, which also covers the targets, because documents with the same text
        and different targets are not duplicates.
        """
        if self.chat is not None:
            return [digest(self.text.encode() + b"\0" + self.chat.targets.tobytes())]
        if len(self.segments) == 1:
            return [digest(text.encode()) for text in self.segments[0].texts]
        content = [["".join(s.texts), s.trained] for s in self.segments]
        return [digest(json.dumps(content, ensure_ascii=False).encode())]

    @property
    def signature(self) -> UInt32[np.ndarray, "128"]:
        """The MinHash signature; for a long document, the minimum over its parts.

        A long text thus has the same signature whether it is read at once or in parts.
        """
        texts = self.segments[0].texts if len(self.segments) == 1 else [self.text]
        return np.minimum.reduce([signature(text) for text in texts])


@dataclass
class EncodedDocuments:
    """The documents of a block that are kept.

    `ids` and `targets` have one entry per token; the other arrays have one per document.

    Attributes:
        numbers: number of the document or line in its source.
        lengths: number of tokens, EOS included. A document in parts has EOS only in its last part.
        num_bytes, num_chars: sizes of the cleaned text.
        splits: indices into `SPLITS`.
        signatures: MinHash signatures [n, 128]; [0, 128] if near duplicates are not searched for.
        have_prompts: 1 for rows with tokens that are not targets.
        ids: token ids of all documents, concatenated; uint16 or uint32.
        targets: 1 where a token is a target of the loss; empty if all tokens are.
    """

    numbers: Int64[np.ndarray, " n"]
    lengths: Int64[np.ndarray, " n"]
    num_bytes: Int64[np.ndarray, " n"]
    num_chars: Int64[np.ndarray, " n"]
    digests: UInt8[np.ndarray, "n 16"]
    splits: UInt8[np.ndarray, " n"]
    signatures: UInt32[np.ndarray, "n 128"]
    have_prompts: UInt8[np.ndarray, " n"]
    ids: np.ndarray
    targets: UInt8[np.ndarray, " tokens"]

    @classmethod
    def none(cls) -> EncodedDocuments:
        """An empty result, without documents."""
        return cls(*[np.zeros(0)] * len(fields(cls)))

    def arrays(self) -> list[np.ndarray]:
        """All arrays, in the order of the fields."""
        return [getattr(self, f.name) for f in fields(self)]


class DocumentEncoder:
    """Turns the cleaned documents of a block into arrays."""

    def __init__(
        self, options: CorpusOptions, tokenizer: BPETokenizer, test_fraction: float
    ) -> None:
        self._tokenizer, self._dtype = tokenizer, token_dtype(tokenizer.vocab_size)
        self._shares = options.validation_fraction, test_fraction
        self._signed = options.near_duplicates is not None

    def split(self, block: Block, document: Document, first_digest: bytes) -> str:
        """The split that a document's row or file names, or one drawn by a hash of the text.

        Args:
            first_digest: digest of the first part of the text, which determines the draw.
        """
        return document.split or block.split or split_of(first_digest, *self._shares)

    def encode(self, block: Block, documents: list[Document]) -> EncodedDocuments:
        """Tokenise and measure the documents of `block`."""
        ids, targets, lengths = self._ids(documents, block.begins, block.last)
        # A block that is a part of a document has one digest; the main process joins the digests of
        # all parts.
        is_part = block.kind == "part"
        digests = [[digest(d.text.encode())] if is_part else d.digests for d in documents]
        splits = [
            SPLITS.index(self.split(block, d, of[0]))
            for d, of in zip(documents, digests, strict=True)
        ]
        joined = b"".join(map(joined_digest, digests))
        signatures = [d.signature for d in documents] if self._signed else []
        return EncodedDocuments(
            numbers=np.array([d.number for d in documents], np.int64),
            lengths=lengths,
            num_bytes=np.array([len(d.text.encode()) for d in documents], np.int64),
            num_chars=np.array([len(d.text) for d in documents], np.int64),
            digests=np.frombuffer(joined, np.uint8).reshape(-1, DIGEST_BYTES),
            splits=np.array(splits, np.uint8),
            signatures=np.array(signatures, np.uint32).reshape(-1, PERMUTATIONS),
            have_prompts=np.array([d.has_prompt for d in documents], np.uint8),
            ids=ids,
            targets=targets,
        )

    def _ids(
        self, documents: list[Document], begun: bool, ended: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokenise documents; return (ids, targets, lengths).

        Args:
            begun: whether the first segment of each document is its beginning.
            ended: whether the last segment of each document is its end, so that EOS follows.
        """
        pieces = _Pieces()
        for document in documents:
            pieces.add(document, begun, ended)
        texts, after = pieces.texts, pieces.after
        sizes, arrays = np.zeros(len(texts), np.int64), [np.zeros(0, self._dtype)]
        for start, stop in _batches(texts):
            # Lists of ids take five times the memory of the text, so only a batch of them is kept.
            ids = self._tokenizer.encode_batch(texts[start:stop], after[start:stop])
            for at in range(start, stop):
                if at in pieces.eos_at:
                    ids[at - start] = [self._tokenizer.eos_token_id]
                elif at in pieces.chats:
                    ids[at - start] = pieces.chats[at].ids
            sizes[start:stop] = list(map(len, ids))
            arrays.append(
                np.fromiter(chain.from_iterable(ids), self._dtype, int(sizes[start:stop].sum()))
            )
        lengths = np.add.reduceat(sizes, pieces.first) if documents else np.zeros(0, np.int64)
        return np.concatenate(arrays), pieces.targets(sizes), lengths


class _Pieces:
    """The texts of documents, to be tokenised one by one.

    Attributes:
        texts: the texts, with an empty text in place of each EOS and of each conversation.
        after: for each text, what precedes it in its document: a value of `Before`.
        trained: for each text, whether its tokens are targets.
        first: for each document, the index of its first text.
        eos_at: indices of the empty texts that EOS replaces.
        chats: conversations, already tokenised, by the index of the empty text in their place.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.after: list[Before] = []
        self.trained: list[bool] = []
        self.first: list[int] = []
        self.eos_at: set[int] = set()
        self.chats: dict[int, EncodedChat] = {}

    def add(self, document: Document, begun: bool, ended: bool) -> None:
        """Add a document.

        Args:
            begun: whether the first segment is the document's beginning.
            ended: whether the last segment is the document's end, so that EOS follows.
        """
        self.first.append(len(self.texts))
        if document.chat is not None:
            self.chats[len(self.texts)] = document.chat
            self._add("", None, trained=False)
            return
        before: Before = None if begun else "text"
        for segment in document.segments:
            for text in segment.texts:
                self._add(text, before, segment.trained)
                before = "text" if text else before
        if ended:
            self.eos_at.add(len(self.texts))
            self._add("", None, document.segments[-1].trained)

    def _add(self, text: str, before: Before, trained: bool) -> None:
        self.texts.append(text)
        self.after.append(before)
        self.trained.append(trained)

    def targets(self, sizes: Int64[np.ndarray, " texts"]) -> UInt8[np.ndarray, " tokens"]:
        """The targets of all texts; text i has `sizes[i]` tokens. Empty if all are targets."""
        if all(self.trained):
            return np.zeros(0, np.uint8)
        targets = np.repeat(np.array(self.trained, np.uint8), sizes)
        ends = np.cumsum(sizes)
        for at, chat in self.chats.items():
            targets[ends[at] - sizes[at] : ends[at]] = chat.targets
        return targets


def _batches(texts: list[str]) -> Iterator[tuple[int, int]]:
    """Ranges of `texts` with about `ENCODE_BYTES` of text each."""
    start = size = 0
    for stop, text in enumerate(texts, 1):
        size += len(text)
        if size >= ENCODE_BYTES or stop == len(texts):
            yield start, stop
            start, size = stop, 0
