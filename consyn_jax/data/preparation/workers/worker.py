"""The work of a worker: turn the bytes of a block into cleaned, tokenised documents.

The result is a pure function of the block and the options, so it does not depend on the number of
workers or on which worker gets a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from consyn_jax.data.preparation.cleaning import clean
from consyn_jax.data.preparation.corpus_report import EXAMPLE_CHARS
from consyn_jax.data.preparation.encoded_documents import (
    CleanedSegment,
    Document,
    DocumentEncoder,
    EncodedDocuments,
)
from consyn_jax.data.sources.byte_stream import CHUNK_BYTES, ByteStream
from consyn_jax.data.sources.chunking import LIMIT, parts
from consyn_jax.data.sources.csv_reader import HEADLESS, is_table
from consyn_jax.data.sources.reader import REMEDY, START, Block
from consyn_jax.data.sources.row_formats.conversations import Conversation
from consyn_jax.data.sources.row_formats.encoded_pairs import encode_pair
from consyn_jax.data.sources.row_formats.fields import REMEDY as FIX
from consyn_jax.data.sources.row_formats.fields import BadRow, MissingKey, decoded
from consyn_jax.data.sources.row_formats.markers import pattern
from consyn_jax.data.sources.row_formats.preference_rows import Pair
from consyn_jax.data.sources.rows import CONVERSATIONS, TEXT, Content, RowKeys, Segment, read_row
from consyn_jax.data.sources.sample_reader import SAMPLE
from consyn_jax.data.sources.text_reader import separator
from consyn_jax.data.split import SPLITS, TRAIN, cut
from consyn_jax.errors import UserError
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.tokenization.chat.chat_encoder import ChatEncoder, EncodedChat, special_tokens
from consyn_jax.tokenization.chat.plain_template import PLAIN
from consyn_jax.tokenization.chat.sandbox import TemplateFault
from consyn_jax.tokenization.chat.turns import Chat

if TYPE_CHECKING:
    from consyn_jax.data.preparation.preparation_spec import Spec


@dataclass
class Result:
    """The result of one block.

    Attributes:
        kept: the tokenised documents that no rule drops.
        dropped: (rule, place, beginning of the text) of each document that was left out.
        changed: number of changes, by kind.
        rows_not_utf8: number of rows that are not UTF-8, dropped or repaired.
        noticed: number of documents with an unusual feature, by feature.
        formats: number of documents, by the format of their row.
        unread: number of rows with a key that is not used, by key.
        example: format, prompt and target of the first row with a prompt.
        fault: an error that stops the preparation, with its place; "" if there is none.
        is_blank: whether the block is a part of a document and contains only white space.
    """

    kept: EncodedDocuments
    dropped: list[tuple[str, str, str]] = field(default_factory=list)
    changed: dict[str, int] = field(default_factory=dict)
    fault: str = ""
    is_blank: bool = False
    rows_not_utf8: int = 0
    noticed: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    example: list[str] = field(default_factory=list)

    @property
    def documents(self) -> int:
        """Number of documents in the block, kept or dropped."""
        return len(self.kept.numbers) + len(self.dropped)


_Found = tuple[int, Content, str | None, str]
"""A document as read: number, content, split (None if the text decides the split) and format."""


class _Fault(Exception):
    """An error, with its place, that stops the preparation."""


class Worker:
    """Turns blocks into tokens.

    Args:
        single: whether the corpus is one document. It is then split by position, and its end is
            held out.
        chat_template: the Jinja template that formats conversations.
        tool_template: the template for conversations with tools, if there is a separate one.
    """

    def __init__(
        self,
        options: CorpusOptions,
        tokenizer: BPETokenizer,
        test_fraction: float = 0.0,
        single: bool = False,
        chat_template: str = PLAIN,
        tool_template: str | None = None,
    ) -> None:
        self.options, self.tokenizer = options, tokenizer
        self.test_fraction, self.single = test_fraction, single
        self._keys, self._templates = RowKeys.of(options), (chat_template, tool_template)
        self._markers = pattern(special_tokens(tokenizer).values())
        self._encoder = DocumentEncoder(options, tokenizer, test_fraction)

    def work(self, block: Block) -> Result:
        """Clean and tokenise the documents of `block`."""
        documents, result = self._documents(block)
        result.kept = self._encoder.encode(block, documents)
        unknown = self.tokenizer.unknown_id
        if unknown is not None and (count := int((result.kept.ids == unknown).sum())):
            result.changed["unknown"] = count
        result.is_blank = block.kind == "part" and all(
            not d.text or d.text.isspace() for d in documents
        )
        return result

    def texts(self, block: Block) -> list[tuple[str, str]]:
        """(split, text) of the documents of `block`, for training a tokenizer.

        Raises:
            UserError: an error in the data that stops the preparation.
        """
        documents, result = self._documents(block)
        if result.fault:
            raise UserError(result.fault)
        return [(self._encoder.split(block, d, d.digests[0]), d.text) for d in documents]

    def _documents(self, block: Block) -> tuple[list[Document], Result]:
        """Clean the documents of a block; return those that no rule drops, and a `Result`."""
        kept, result = [], Result(EncodedDocuments.none())
        read = self._rows if block.kind == "rows" else self._texts
        try:
            for number, content, split, kind in read(block, result):
                place = f"{block.name}:{number}"
                try:
                    found = self._document(number, content, split, kind, result)
                except BadRow as fault:
                    self._skip(fault, place, result)
                    continue
                rule = self._rule(found.text) if block.begins and block.last else ""
                if rule:
                    result.dropped.append((rule, place, found.text[:EXAMPLE_CHARS]))
                else:
                    kept.append(found)
                    self._look(found, result)
        except (_Fault, UserError) as fault:  # UserError: `_line` cannot open the file any more
            result.fault = str(fault)
        return kept, result

    def _document(
        self,
        number: int,
        content: Content,
        split: str | None,
        kind: str,
        result: Result,
    ) -> Document:
        """Clean a document. Rows with prompts change only if the user asks for cleaning."""
        if isinstance(content, Conversation | Pair):
            chat = (
                self._pair(content, result)
                if isinstance(content, Pair)
                else self._chat(content, result)
            )
            return Document(number, [CleanedSegment([chat.text], True)], split, chat, kind)
        as_is = len(content) > 1
        segments = [self._clean(segment, as_is, result) for segment in content]
        return Document(number, segments, split, None, kind)

    def _chat(self, found: Conversation, result: Result) -> EncodedChat:
        """The ids and targets of a conversation rendered by the chat template."""
        messages = self._clean_values(found.messages, result)
        try:
            chat = self._chats.encode(Chat(messages, found.learned, found.tools, found.variables))
        except TemplateFault as fault:
            raise BadRow(f"cannot be rendered with the chat template: {fault}.") from None
        if chat.unwritten:
            result.noticed["unwritten"] = result.noticed.get("unwritten", 0) + 1
        return chat

    def _pair(self, found: Pair, result: Result) -> EncodedChat:
        """The ids and targets of both answers of a pair."""
        prompt, chosen, rejected = (
            self._clean_values(part, result)
            for part in (found.prompt, found.chosen, found.rejected)
        )
        cleaned = Pair(prompt, chosen, rejected, found.tools, found.variables)
        try:
            pair = encode_pair(cleaned, self.tokenizer, lambda: self._chats)
        except TemplateFault as fault:
            raise BadRow(f"cannot be rendered with the chat template: {fault}.") from None
        for name in pair.notices:
            result.noticed[name] = result.noticed.get(name, 0) + 1
        return pair.document

    @cached_property
    def _chats(self) -> ChatEncoder:
        return ChatEncoder(self.tokenizer, *self._templates)

    def _look(self, found: Document, result: Result) -> None:
        """Record a row's format, special tokens spelled out in its text, and the first example."""
        if not found.format:
            return
        result.formats[found.format] = result.formats.get(found.format, 0) + 1
        if found.format not in CONVERSATIONS and self._markers.search(found.text):
            result.noticed["markers"] = result.noticed.get("markers", 0) + 1
        if not found.has_prompt or result.example:
            return
        if found.chat is None:
            prompt, target = ("".join(segment.texts) for segment in found.segments)
            target += self.tokenizer.decode([self.tokenizer.eos_token_id], False)
        else:
            prompt, target = (self.tokenizer.decode(ids, False) for ids in found.chat.first_turn())
        result.example = [found.format, prompt[-2 * EXAMPLE_CHARS :], target[: 2 * EXAMPLE_CHARS]]

    def _skip(self, fault: BadRow, place: str, result: Result) -> None:
        if self.options.on_bad_rows != "skip":
            raise _Fault(f"{place} {fault} {fault.remedy}") from None
        result.dropped.append(("bad row", place, str(fault)))

    def _rule(self, text: str) -> str:
        """The rule that drops a text, or "" if none does."""
        if not text or text.isspace():
            return "empty"
        if len(text) < self.options.min_chars:
            return "too short"
        most = self.options.max_chars
        return "too long" if most is not None and len(text) > most else ""

    def _clean(self, segment: Segment, as_is: bool, result: Result) -> CleanedSegment:
        texts = [self._cleaned(text, as_is, result) for text in self._parts(segment.text)]
        return CleanedSegment(texts, segment.trained)

    def _cleaned(self, text: str, as_is: bool, result: Result) -> str:
        """Clean a text; with `as_is`, apply only the steps that the user's flags turn on."""
        normalize = self.options.normalize or ("none" if as_is else "nfc")
        controls = self.options.control_characters or ("keep" if as_is else "remove")
        text, counts = clean(text, normalize, controls)
        for name, count in counts.items():
            result.changed[name] = result.changed.get(name, 0) + count
        return text

    def _clean_values(self, value: Any, result: Result) -> Any:
        """A copy of a message with all of its texts cleaned."""
        if isinstance(value, str):
            return self._cleaned(value, True, result)
        if isinstance(value, dict):
            return {name: self._clean_values(item, result) for name, item in value.items()}
        if isinstance(value, list):
            return [self._clean_values(item, result) for item in value]
        return value

    def _parts(self, text: str) -> list[str]:
        """Split the text exactly where the same text in a file would be split.

        Equal documents thus have equal parts, whatever their source.
        """
        if len(text) <= LIMIT // 4:  # a character has at most four bytes
            return [text]
        data = text.encode()
        if len(data) <= LIMIT:
            return [text]
        return [part.decode() for part, _ in parts([data], self.tokenizer)]

    def _texts(self, block: Block, result: Result) -> Iterator[_Found]:
        ends = separator(self.options)
        pieces = [block.data]
        if block.kind == "text":
            pieces = block.data.split(ends)
            if not pieces[-1]:
                pieces.pop()
        at = block.offset
        for number, data in enumerate(pieces, block.first):
            yield number, (Segment(self._decode_text(block, data, at, result)),), None, ""
            at += len(data) + len(ends)

    def _decode_text(self, block: Block, data: bytes, at: int, result: Result) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            if self.options.invalid_utf8 == "replace":
                return _repaired(data, result)
            where = at + error.start
            line = _line(Path(block.name), where)
            raise _Fault(
                f"{block.name} is not UTF-8 text: byte {where} (line {line}) is "
                f"0x{data[error.start]:02x}. {REMEDY}"
            ) from None

    def _rows(self, block: Block, result: Result) -> Iterator[_Found]:
        keys = RowKeys() if block.name == SAMPLE else self._keys
        is_first = block.first <= 2  # if line 1 has column names, rows begin at 2
        num_read = 0
        for at, line in enumerate(block.data.split(b"\n")):
            if not line or line.isspace():
                continue
            number = block.numbers[at] if block.numbers else block.first + at
            place = f"{block.name}:{number}"
            try:
                row = read_row(self._parse(line, result), keys, block.unread)
            except BadRow as fault:
                if not is_first and "--" in fault.remedy:
                    # Earlier rows suit the flags, so do not advise other flags.
                    fault = BadRow(str(fault), FIX)
                elif isinstance(fault, MissingKey) and is_table(block.name, self.options):
                    fault.remedy = fault.remedy[:-1] + HEADLESS
                self._skip(fault, place, result)
                continue
            is_first, num_read = False, num_read + 1
            for name in row.unread:
                result.unread[name] = result.unread.get(name, 0) + 1
            if self.single and row.format == TEXT and isinstance(row.content, tuple):
                for split, text in self._cut(row.content[0].text):
                    yield number, (Segment(text),), split, row.format
            else:
                yield number, row.content, None, row.format
        if num_read:
            result.unread |= dict.fromkeys(block.unread, num_read)

    def _cut(self, text: str) -> Iterator[tuple[str, str]]:
        """Split a one-document corpus by position; yield (split, text) for each part."""
        data, test = text.encode(), self.test_fraction
        held_out = self.options.validation_fraction + test
        ends = [0, cut(data, held_out), cut(data, test), len(data)]
        for split, (start, stop) in zip(SPLITS, pairwise(ends), strict=True):
            if start < stop:
                yield split, data[start:stop].decode()

    def _parse(self, line: bytes, result: Result) -> object:
        try:
            text = line.rstrip(b"\r").decode()
        except UnicodeDecodeError as error:
            result.rows_not_utf8 += 1
            if self.options.invalid_utf8 != "replace":
                raise BadRow(
                    f"is not UTF-8 (byte {error.start} of the row; --invalid_utf8 replace would "
                    "repair it)."
                ) from None
            text = _repaired(line, result)
        return decoded(text)


def _repaired(data: bytes, result: Result) -> str:
    """Decode with U+FFFD for bytes that are not UTF-8, and count the replacements."""
    text = data.decode(errors="replace")
    count = text.count("\ufffd") - data.count("\ufffd".encode())
    result.changed["invalid_utf8"] = result.changed.get("invalid_utf8", 0) + count
    return text


def _line(path: Path, at: int) -> int:
    """The line number, from 1, of byte `at` of a file."""
    line = 1
    with ByteStream(path) as stream:
        while at > 0 and (data := stream.read(min(CHUNK_BYTES, at))):
            line, at = line + data.count(b"\n"), at - len(data)
    return line


def learn_tokenizer(spec: Spec, single: bool) -> BPETokenizer:
    """Train the tokenizer of `--tokenizer train:SIZE` on the train split of the data."""
    assert isinstance(spec.tokenizer, str)
    size = int(spec.tokenizer.removeprefix("train:"))
    plain = BPETokenizer.bytes()  # allows long documents to be cut anywhere
    worker = Worker(spec.options, plain, spec.test_fraction, single)
    before = np.cumsum([0, *(source.num_bytes for source in spec.sources)]).tolist()
    total = before[-1]

    def texts() -> Iterator[str]:
        shown_percent, split_of_long = -1, TRAIN
        for index, block in spec.blocks(0, START, plain, single):
            for split, text in worker.texts(block):
                # The first part of a long document decides the split of the whole document.
                split_of_long = split if block.begins else split_of_long
                if split_of_long == TRAIN:
                    yield text
            done = before[index] + block.file_bytes
            percent = 100 * done // max(total, 1)
            if percent > shown_percent:
                shown_percent = percent
                spec.progress("train tokenizer", done, total)

    return BPETokenizer.train_from_iterator(texts(), size)
