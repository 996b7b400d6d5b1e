"""Write a token store from the workers' results, in document order, with a journal."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt32

from consyn_jax.data.preparation.corpus_page import PAGE, page
from consyn_jax.data.preparation.corpus_report import EXAMPLE_CHARS, EXAMPLES, REPORT, Report
from consyn_jax.data.preparation.document_origins import document_origins, sources_page
from consyn_jax.data.preparation.encoded_documents import EncodedDocuments
from consyn_jax.data.preparation.exact_duplicates import ExactDuplicates
from consyn_jax.data.preparation.journal import JOURNAL, Journal, LongDocument
from consyn_jax.data.preparation.near_duplicates import PERMUTATIONS, NearDuplicates
from consyn_jax.data.preparation.preparation_spec import RECIPE, Spec, contents_of, key_of
from consyn_jax.data.preparation.workers.worker import Result, learn_tokenizer
from consyn_jax.data.preparation.workers.worker_engines import start_workers
from consyn_jax.data.sources.reader import Block
from consyn_jax.data.sources.rows import CONVERSATIONS, PREFERENCE
from consyn_jax.data.sources.sample_reader import SAMPLE
from consyn_jax.data.split import DIGEST_BYTES, SPLITS, joined_digest
from consyn_jax.data.store import TokenStoreWriter
from consyn_jax.data.store.manifest import PAIRS_VERSION, PREPARING, SOURCES
from consyn_jax.errors import AGAIN, UserError, listed, remedy
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.tokenization import BPETokenizer

JOURNAL_SECONDS = 2.0

Publish = Callable[[TokenStoreWriter | None, Report | None], bool]
"""Function called after each block; the preparation stops if the function returns true.

Its arguments are the writer and the counts so far. The writer is None while the documents that it
has written must not be read yet. The counts are None if they are unknown.
"""


class Stopped(Exception):
    """`Publish` asked the preparation to stop."""


class Preparation:
    """A token store that is being written.

    Args:
        state: the initial state, or the journal of an earlier process; it is updated in place.
        resumed: whether `state` is the journal of an earlier process.

    Raises:
        UserError: `directory` cannot be written, or does not match the journal.
    """

    def __init__(self, spec: Spec, directory: Path, state: Journal, resumed: bool) -> None:
        self.spec, self.directory, self.state = spec, directory, state
        self.report, self.preparing = state.report, directory / PREPARING
        if not isinstance(spec.tokenizer, str):
            self.tokenizer = spec.tokenizer
        elif resumed:
            self.tokenizer = BPETokenizer.from_file(directory / "tokenizer")
        else:
            self.tokenizer = learn_tokenizer(spec, state.single)
        self.writer = TokenStoreWriter(directory, self.tokenizer, state=state.writer)
        try:
            self.duplicates = Duplicates(self.preparing, spec.options, state.seen, state.near)
        except OSError as error:
            self.writer.close()
            raise self._unwritable(error) from error
        except ValueError as error:
            self.writer.close()
            raise UserError(
                f"{self.preparing} is damaged. Delete {directory} and prepare the data again."
            ) from error
        self.journaled_s, self.interval_s = time.monotonic(), JOURNAL_SECONDS
        if isinstance(spec.tokenizer, str) and not resumed:
            try:
                self.write_journal()  # so that the tokenizer need not be learned again
            except UserError:
                self.close()
                raise

    @property
    def is_one_row(self) -> bool:
        """Whether the corpus turned out to be one row, so that it must be split by position."""
        read = self.report.documents - self.report.dropped.get("empty", 0)
        rows = [source["documents"] for source in self.report.sources if source["kind"] != "text"]
        held_out = self.spec.options.validation_fraction + self.spec.test_fraction
        return (
            read == 1
            and any(rows)
            and not self.state.single
            and not self.spec.num_validation
            and held_out > 0
        )

    def run(self, publish: Publish | None) -> None:
        """Read, process and write all blocks.

        Raises:
            UserError: the data is unusable, or the store cannot be written.
            Stopped: `publish` returned true.
        """
        spec, state = self.spec, self.state
        sizes = np.cumsum([0, *(source.num_bytes for source in spec.sources)]).tolist()
        blocks = spec.blocks(state.source, state.position, self.tokenizer, state.single)
        try:
            with start_workers(spec, self.tokenizer, state.single) as workers:
                for index, block, result in workers.results(blocks):
                    self._take(index, block, result)
                    self.report.file_bytes = sizes[index] + block.file_bytes
                    spec.progress("tokenize", self.report.file_bytes, sizes[-1])
                    if block.end is not None:
                        state.source, state.position = index, block.end
                    self._end_block(publish, resumable=block.end is not None)
        except OSError as error:
            raise self._unwritable(error) from error
        self.report.file_bytes = text_bytes(spec)

    def close(self) -> None:
        """Close all files; their content stays."""
        self.writer.close()
        self.duplicates.close()

    def finish(self) -> None:
        """Write the report and the manifest, which makes the directory a store.

        If no document is left, or the files of the data changed during the preparation, the journal
        is deleted. The caller then deletes the unfinished store.

        Raises:
            UserError: no document is left, the files of the data changed, or a file cannot be read
                or written.
        """
        silent = dataclasses.replace(self.spec, progress=lambda stage, done, total: None)
        contents = contents_of(silent)
        fault = self._fault(key_of(silent, contents))
        if fault:
            with suppress(OSError):  # a later command finds the same fault
                (self.preparing / JOURNAL).unlink(missing_ok=True)
            raise UserError(fault)
        self.report.splits = self.writer.totals
        if any(name in CONVERSATIONS for name in self.report.formats):
            # Users of an exported model must format conversations as in training.
            templated = self.tokenizer.with_chat_template(self.spec.chat_template)
            templated.save(self.directory / "tokenizer")
        report = self.report.in_order()
        text = json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False) + "\n"
        text = text.encode("utf-8", "backslashreplace").decode()  # names of files need not be UTF-8
        options = dataclasses.asdict(self.spec.options)
        settings = {name: value for name, value in options.items() if name in RECIPE} | {
            "test_fraction": self.spec.test_fraction,
            "tokenizer": f"{self.tokenizer.vocab_size:,} tokens, {self.tokenizer.sha256[:12]}",
        }
        sources = sources_page(self.spec, contents)
        pairs = {"version": PAIRS_VERSION} if self.spec.options.row_format == PREFERENCE else {}
        self.writer.finish(
            {
                REPORT: text,
                PAGE: page(report, "Data preparation", settings),
                SOURCES: sources,
            },
            {
                "key": self.state.key,
                "sources_sha256": hashlib.sha256(sources.encode()).hexdigest(),
                **pairs,
            },
        )

    def _fault(self, key: str) -> str:
        """The reason why the written files cannot become a store; "" if there is none.

        Args:
            key: cache key computed from the present content of the sources.
        """
        report, names = self.report, listed([source.name for source in self.spec.sources])
        if not report.kept and not report.dropped.keys() - {"empty"}:
            return f"There is no text in {names}: nothing but white space. Give other --data."
        if not report.kept:
            if list(report.dropped) == ["bad row"]:
                first = report.examples["bad row"][0].rstrip(".")
                return (
                    f"All {report.documents:,} rows of {names} are bad, the first: {first}. "
                    "Correct the rows, or leave --on_bad_rows out to get advice on how to read "
                    "them."
                )
            left_out = ", ".join(f"{count:,} {rule}" for rule, count in report.dropped.items())
            return (
                f"No document is left of the {report.documents:,} documents in {names}: "
                f"{left_out}. Give other --data, or change the rules for documents."
            )
        if key != self.state.key:
            return (
                f"The files of --data changed while {self.directory} was made from them. Do not "
                f"change the files, and {AGAIN}."
            )
        return ""

    def _end_block(self, publish: Publish | None, resumable: bool) -> None:
        """Publish the documents written so far, and every few seconds write the journal.

        Args:
            resumable: whether an interrupted preparation could resume after this block.
        """
        # A single row is split by position once it is known to be the only row, so it is not
        # published before that.
        shown = (
            self.writer if resumable and (self.state.single or self.report.documents > 1) else None
        )
        stop = publish is not None and publish(shown, self.report)
        if resumable and (stop or time.monotonic() - self.journaled_s > self.interval_s):
            self.write_journal()
        if stop:
            raise Stopped

    def _take(self, index: int, block: Block, result: Result) -> None:
        """Write the documents of one block, and count them."""
        if result.fault:
            raise UserError(result.fault)
        report, source = self.report, self.report.sources[index]
        report.take(result)
        for rule, place, text in result.dropped:
            report.drop(rule, place, text)
        if block.begins and block.last:
            documents, kept = result.documents, self._write_documents(index, block, result.kept)
        else:
            kept = self._write_part(index, block, result.kept, result.is_blank)
            documents = int(block.last)
        report.documents += documents
        source["documents"] += documents
        source["kept"] += kept

    def _write_documents(self, index: int, block: Block, documents: EncodedDocuments) -> int:
        """Write the documents that are not duplicates, and return their number."""
        keep = np.ones(len(documents.numbers), bool)
        may_repeat = documents.have_prompts.astype(bool)
        if self.spec.options.deduplicate is not None:
            may_repeat[:] = False
        found = self.duplicates.find(documents.digests, documents.signatures, may_repeat)
        for rule, repeated in found.items():
            self._drop(rule, block, documents, repeated)
            keep[repeated] = False
        origins = document_origins(block, documents.numbers, index, self.spec)
        for split in np.unique(documents.splits[keep]):
            chosen = keep & (documents.splits == split)
            tokens = np.repeat(chosen, documents.lengths)
            self.writer.append(
                SPLITS[split],
                documents.ids[tokens],
                documents.lengths[chosen],
                documents.num_bytes[chosen],
                documents.targets[tokens] if len(documents.targets) else None,
                origins[chosen],
            )
        self.report.keep(documents.num_bytes[keep], documents.lengths[keep])
        return int(np.count_nonzero(keep))

    def _drop(
        self, rule: str, block: Block, documents: EncodedDocuments, dropped: np.ndarray
    ) -> None:
        ends = np.cumsum(documents.lengths)
        for at in dropped:
            # A token has at least one byte, so this many tokens cover the characters to show.
            ids = documents.ids[ends[at] - documents.lengths[at] : ends[at]][:EXAMPLE_CHARS]
            wanted = len(self.report.examples.get(rule, [])) < EXAMPLES
            text = self.tokenizer.decode(ids.tolist()) if wanted else ""
            self.report.drop(rule, f"{block.name}:{documents.numbers[at]}", text)

    def _write_part(self, index: int, block: Block, part: EncodedDocuments, is_blank: bool) -> int:
        """Write a part of a long document; return 1 after the last part of a kept document, else 0.

        The rules that drop documents are applied after the last part, and may remove all parts.
        """
        if block.begins:
            beginning = self.tokenizer.decode(part.ids[:EXAMPLE_CHARS].tolist())
            place = f"{block.name}:{part.numbers[0]}"
            split = SPLITS[part.splits[0]]
            self.state.long = LongDocument(split, place, beginning, begin=block.offset)
        long = self.state.long
        assert long is not None
        long.add(part, 0, is_blank)
        self.writer.append_part(long.split, part.ids)
        if not block.last:
            return 0
        self.state.long = None
        rule = long.rule(self.spec.options) or self._duplicate_rule(long)
        if rule:
            self.report.drop(rule, long.place, long.beginning)
            self.writer.drop_document(long.split)
            return 0
        origin = np.array([index, long.begin, block.offset + len(block.data)])
        self.writer.end_document(long.split, long.num_bytes, origin)
        self.report.keep(np.array([long.num_bytes]), np.array([long.num_tokens]))
        return 1

    def _duplicate_rule(self, long: LongDocument) -> str:
        digest = np.frombuffer(joined_digest(long.digests), np.uint8).reshape(1, DIGEST_BYTES)
        signatures = np.zeros((1, PERMUTATIONS), np.uint32)
        if long.signature is not None:
            signatures[0] = long.signature
        found = self.duplicates.find(digest, signatures, np.zeros(1, bool))
        return next((rule for rule, repeated in found.items() if len(repeated)), "")

    def write_journal(self) -> None:
        """Flush the store's files to the disk, then record in the journal how far they are valid.

        Raises:
            UserError: a file cannot be written.
        """
        began = time.monotonic()
        try:
            self.state.seen, self.state.near = self.duplicates.flush()
            self.state.writer = self.writer.checkpoint()
            self.state.write(self.preparing / JOURNAL)
        except OSError as error:
            raise self._unwritable(error) from error
        self.journaled_s = time.monotonic()
        # With a long list of sources, writing takes a while; spend at most 5 % of the time on it.
        self.interval_s = max(JOURNAL_SECONDS, 20 * (self.journaled_s - began))

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.directory} cannot be written: {error.strerror or error}. "
            f"{remedy(error)}, and {AGAIN}; it continues."
        )


def text_bytes(spec: Spec) -> int:
    """Number of bytes of all sources except Hub datasets, which have no stable size."""
    return sum(source.num_bytes for source in spec.sources if source.files or source.kind == SAMPLE)


class Duplicates:
    """Finds exact and near duplicates of earlier documents, if the options ask for that.

    Args:
        num_digests, num_signatures: number of valid records in the files; later records are cut
            off.
    """

    def __init__(
        self, directory: Path, options: CorpusOptions, num_digests: int, num_signatures: int
    ) -> None:
        self._indices: dict[str, ExactDuplicates | NearDuplicates] = {}
        try:
            if options.deduplicate in (None, True):
                self._indices["duplicate"] = ExactDuplicates(directory / "digests", num_digests)
            if options.near_duplicates is not None:
                self._indices["near duplicate"] = NearDuplicates(
                    directory / "signatures", options.near_duplicates, num_signatures
                )
        except BaseException:
            self.close()
            raise

    def find(
        self,
        digests: UInt8[np.ndarray, "n 16"],
        signatures: UInt32[np.ndarray, "n 128"],
        may_repeat: Bool[np.ndarray, " n"],
    ) -> dict[str, Int64[np.ndarray, " m"]]:
        """Find the documents that repeat an earlier document, and remember all other documents.

        Args:
            may_repeat: True for documents that are kept even if they equal an earlier one.

        Returns:
            Indices of the documents that repeat an earlier one, by the rule that found them.
        """
        found, left = {}, np.arange(len(digests))
        for rule, index in self._indices.items():
            compared = left[~may_repeat[left]] if rule == "duplicate" else left
            first = index.first((digests if rule == "duplicate" else signatures)[compared])
            found[rule] = compared[~first]
            left = np.setdiff1d(left, found[rule])
        return found

    def flush(self) -> tuple[int, int]:
        """Flush both files to the disk; return the numbers of digests and signatures."""
        for index in self._indices.values():
            index.flush()
        counts = {rule: index.count for rule, index in self._indices.items()}
        return counts.get("duplicate", 0), counts.get("near duplicate", 0)

    def close(self) -> None:
        """Close the files."""
        for index in self._indices.values():
            with suppress(OSError):  # what was not flushed is not in the journal either
                index.close()
