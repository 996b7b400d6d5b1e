"""A store under way: what workers make of blocks, written in the order of the documents, and a journal of how far that is good."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from consyn_jax.config import CorpusOptions, UserError
from consyn_jax.data.job import RECIPE, Job, key_of
from consyn_jax.data.near_duplicates import NearDuplicates
from consyn_jax.data.reading import START, Block
from consyn_jax.data.report import CHANGES, EXAMPLE_CHARS, EXAMPLES, RULES, Report
from consyn_jax.data.report_page import page
from consyn_jax.data.seen import Seen
from consyn_jax.data.sources import SAMPLE
from consyn_jax.data.split import DIGEST_BYTES, SPLITS, TRAIN, joined_digest
from consyn_jax.data.store import PREPARING, TokenStoreWriter, write_whole
from consyn_jax.data.work import Kept, Result, Worker
from consyn_jax.data.workers import Workers
from consyn_jax.tokenization import BPETokenizer

REPORT, PAGE, JOURNAL = "report.json", "report.html", "journal.json"
JOURNAL_SECONDS = 2.0

Publish = Callable[[TokenStoreWriter | None], bool]
"""Called with what is written when it can be shown, else with None; says whether to stop."""


class Stopped(Exception):
    """Whoever reads what is prepared has had enough."""


@dataclass
class _Long:
    """A document that comes in parts."""

    split: str
    place: str
    beginning: str
    digests: list[bytes] = dataclasses.field(default_factory=list)
    signature: np.ndarray | None = None
    is_blank: bool = True
    num_bytes: int = 0
    num_chars: int = 0
    num_tokens: int = 0


class Preparation:
    """A store under way.

    Args:
        single: the corpus is one document, which is cut by position.
        journal: what an earlier process wrote; None begins anew.
    """

    def __init__(self, job: Job, key: str, directory: Path, single: bool, journal: dict[str, Any] | None) -> None:
        self.job, self.key, self.directory, self.single = job, key, directory, single
        self.work, options = directory / PREPARING, job.options
        self.index, self.position = 0, START
        sources = [{"name": source.name, "kind": source.kind, "documents": 0, "kept": 0} for source in job.sources]
        self.report = Report(sources=sources, left_out=[list(item) for item in job.left_out])
        state: dict[str, Any] = {"shards": {}, "open": {}}
        seen = near = 0
        if journal is not None:
            self.index, self.position = journal["source"], tuple(journal["position"])
            self.report, state, seen, near = Report(**journal["report"]), journal["writer"], journal["seen"], journal["near"]
        if isinstance(job.tokenizer, str):
            self.tokenizer = _learn(job, single) if journal is None else BPETokenizer.from_file(directory / "tokenizer")
        else:
            self.tokenizer = job.tokenizer
        self.writer = TokenStoreWriter(directory, self.tokenizer, state=state)
        self.seen: Seen | None = None
        self.near: NearDuplicates | None = None
        try:
            if options.deduplicate:
                self.seen = Seen(self.work / "digests", seen)
            if options.near_duplicates is not None:
                self.near = NearDuplicates(self.work / "signatures", options.near_duplicates, near)
        except OSError as error:
            self.close()
            raise self._unwritable(error) from error
        except ValueError as error:
            self.close()
            raise UserError(f"{self.work} is damaged. Delete {directory} and prepare the data again.") from error
        self.long = _long(None if journal is None else journal["long"])
        self.told, self.interval = time.monotonic(), JOURNAL_SECONDS
        if journal is None and isinstance(job.tokenizer, str):
            self.write_journal()  # a tokenizer that was learned need not be learned again

    @property
    def is_one_row(self) -> bool:
        """There turned out to be one document, which is to be cut by position, and it has not been."""
        read = self.report.documents - self.report.dropped.get("empty", 0)
        rows = [source["documents"] for source in self.report.sources if source["kind"] != "text"]
        held_out = self.job.options.validation_fraction + self.job.test_fraction
        return read == 1 and any(rows) and not self.single and not self.job.num_validation and held_out > 0

    def run(self, publish: Publish | None) -> None:
        """Read, work and write to the end."""
        job = self.job
        sizes = np.cumsum([0, *(source.num_bytes for source in job.sources)]).tolist()
        try:
            with Workers(job.num_workers, job.options, self.tokenizer, job.test_fraction, self.single) as workers:
                for index, block, result in workers.results(job.blocks(self.index, self.position, self.tokenizer, self.single)):
                    self._take(index, block, result)
                    self.report.file_bytes = sizes[index] + block.file_bytes
                    job.tell("tokenize", self.report.file_bytes, sizes[-1])
                    if block.end is not None:
                        self.index, self.position = index, block.end
                    self._block_end(publish, resumable=block.end is not None)
        except OSError as error:
            raise self._unwritable(error) from error
        # Of what is not here before it is downloaded, it depends on when one asks.
        self.report.file_bytes = sum(source.num_bytes for source in job.sources if source.files or source.kind == SAMPLE)

    def close(self) -> None:
        """Let go of all files; what is written stays."""
        self.writer.close()
        for index in (self.seen, self.near):
            if index is not None:
                with suppress(OSError):  # what cannot be written any more has not counted yet
                    index.close()

    def finish(self) -> None:
        """Make it a store."""
        report = self.report
        if not report.kept:
            self.writer.abandon()
            names = ", ".join(source.name for source in self.job.sources[:3])
            if not report.dropped.keys() - {"empty"}:
                raise UserError(f"There is no text in {names}: nothing but white space. Give other --data.")
            left = ", ".join(f"{count:,} {rule}" for rule, count in report.dropped.items())
            raise UserError(f"Nothing is left of the {report.documents:,} documents in {names}: {left}. Give other --data, or other rules.")
        if key_of(dataclasses.replace(self.job, tell=lambda stage, done, total: None)) != self.key:
            self.writer.abandon()
            raise UserError(f"The files of --data changed while {self.directory} was made of them. Leave them alone, and run the same command again.")
        report.splits = {split: dict(sorted(counts.items())) for split, counts in self.writer.totals.items()}
        # In which order rules first applied depends on where blocks ended, which is another place after going on.
        for name, order in (("dropped", RULES), ("examples", RULES), ("changed", list(CHANGES))):
            setattr(report, name, dict(sorted(getattr(report, name).items(), key=lambda item: order.index(item[0]))))
        for name in ("document_bytes", "document_tokens"):
            setattr(report, name, dict(sorted(getattr(report, name).items(), key=lambda item: int(item[0]))))
        text = json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False) + "\n"
        text = text.encode("utf-8", "backslashreplace").decode()  # names of files need not be UTF-8
        self.writer.finish({REPORT: text, PAGE: page(report, "Preparation", self._settings())}, {"key": self.key})

    def _settings(self) -> dict[str, object]:
        settings = {name: value for name, value in dataclasses.asdict(self.job.options).items() if name in RECIPE}
        return {**settings, "test_fraction": self.job.test_fraction, "tokenizer": f"{self.tokenizer.vocab_size:,} tokens, {self.tokenizer.sha256[:12]}"}

    # ---------------------------------------------------------------------------------------------------------- one block

    def _block_end(self, publish: Publish | None, resumable: bool) -> None:
        """Show what there is, and make it last from time to time.

        Args:
            resumable: reading can go on behind the block.
        """
        # A row that stands alone is cut by position once that is known, so it is not shown before.
        shown = self.writer if resumable and (self.single or self.report.documents > 1) else None
        stop = publish is not None and publish(shown)
        if resumable and (stop or time.monotonic() - self.told > self.interval):
            self.write_journal()
        if stop:
            raise Stopped

    def _take(self, index: int, block: Block, result: Result) -> None:
        if result.fault:
            raise UserError(result.fault)
        report, kept = self.report, result.kept
        report.rows_not_utf8 += result.rows_not_utf8
        for rule, place, text in result.dropped:
            report.drop(rule, place, text)
        report.change(result.changed)
        if not (block.begins and block.last):
            self._take_part(index, block, kept, result.is_blank)
            return
        keep = np.ones(len(kept.numbers), bool)
        if self.seen is not None:
            keep = self.seen.first(kept.digests)
            self._drop("duplicate", block, kept, ~keep)
        if self.near is not None:
            left = np.flatnonzero(keep)
            similar = left[~self.near.first(kept.signatures[left])]
            keep[similar] = False
            self._drop("near duplicate", block, kept, np.isin(np.arange(len(keep)), similar))
        for number in np.unique(kept.sides[keep]):
            chosen = keep & (kept.sides == number)
            tokens = np.repeat(chosen, kept.lengths)
            targets = kept.targets[tokens] if len(kept.targets) else None
            self.writer.append(SPLITS[number], kept.ids[tokens], kept.lengths[chosen], kept.num_bytes[chosen], targets)
        report.documents += result.documents
        report.keep(kept.num_bytes[keep], kept.lengths[keep])
        report.sources[index]["documents"] += result.documents
        report.sources[index]["kept"] += int(np.count_nonzero(keep))

    def _drop(self, rule: str, block: Block, kept: Kept, dropped: np.ndarray) -> None:
        ends = np.cumsum(kept.lengths)
        for at in np.flatnonzero(dropped):
            # A token has at least one byte of text, so these are enough for the beginning that is shown.
            ids = kept.ids[ends[at] - kept.lengths[at] : ends[at]][:EXAMPLE_CHARS]
            wanted = len(self.report.examples.get(rule, [])) < EXAMPLES
            self.report.drop(rule, f"{block.name}:{kept.numbers[at]}", self.tokenizer.decode(ids.tolist()) if wanted else "")

    def _take_part(self, index: int, block: Block, kept: Kept, is_blank: bool) -> None:
        """A part of a long document. Whether the document is kept is known at its end."""
        digest = kept.digests[0].tobytes()
        if block.begins:
            beginning = self.tokenizer.decode(kept.ids[:EXAMPLE_CHARS].tolist())
            self.long = _Long(SPLITS[kept.sides[0]], f"{block.name}:{kept.numbers[0]}", beginning)
        long = self.long
        assert long is not None
        long.digests.append(digest)
        long.is_blank = long.is_blank and is_blank
        long.num_bytes += int(kept.num_bytes[0])
        long.num_chars += int(kept.num_chars[0])
        long.num_tokens += len(kept.ids)
        if self.near is not None:
            long.signature = kept.signatures[0] if long.signature is None else np.minimum(long.signature, kept.signatures[0])
        self.writer.append_part(long.split, kept.ids)
        if not block.last:
            return
        rule, self.long = self._rule(long), None
        if rule:
            self.report.drop(rule, long.place, long.beginning)
            self.writer.drop_document(long.split)
        else:
            self.writer.end_document(long.split, long.num_bytes)
            self.report.keep(np.array([long.num_bytes]), np.array([long.num_tokens]))
        self.report.documents += 1
        self.report.sources[index]["documents"] += 1
        self.report.sources[index]["kept"] += not rule

    def _rule(self, long: _Long) -> str:
        least, most = self.job.options.min_chars, self.job.options.max_chars
        if long.is_blank:
            return "empty"
        if long.num_chars < least:
            return "too short"
        if most is not None and long.num_chars > most:
            return "too long"
        if self.seen is not None:
            digest = np.frombuffer(joined_digest(long.digests), np.uint8).reshape(1, DIGEST_BYTES)
            if not self.seen.first(digest)[0]:
                return "duplicate"
        if self.near is not None and long.signature is not None and not self.near.first(long.signature[None])[0]:
            return "near duplicate"
        return ""

    # -------------------------------------------------------------------------------------------------------- the journal

    def write_journal(self) -> None:
        """Say how far the store is good. What it says of files is on the disk before."""
        began = time.monotonic()
        for index in (self.seen, self.near):
            if index is not None:
                index.flush()
        journal = {
            "key": self.key,
            "single": self.single,
            "source": self.index,
            "position": self.position,
            "report": vars(self.report),
            "long": self.long and {
                **vars(self.long),
                "digests": [digest.hex() for digest in self.long.digests],
                "signature": None if self.long.signature is None else self.long.signature.tolist(),
            },
            "writer": self.writer.checkpoint(),
            "seen": 0 if self.seen is None else self.seen.count,
            "near": 0 if self.near is None else self.near.count,
        }
        write_whole(self.work / JOURNAL, json.dumps(journal))
        self.told = time.monotonic()
        self.interval = max(JOURNAL_SECONDS, 20 * (self.told - began))  # a long list of sources takes its time

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.directory} cannot be written: {error.strerror or error}. Make room, and run the same command again; it goes on.")


def _long(saved: dict[str, Any] | None) -> _Long | None:
    """A document in parts, from the journal."""
    if saved is None:
        return None
    found = _Long(**{**saved, "digests": [bytes.fromhex(digest) for digest in saved["digests"]]})
    found.signature = None if saved["signature"] is None else np.array(saved["signature"], np.uint32)
    return found


def _learn(job: Job, single: bool) -> BPETokenizer:
    """The tokenizer that "train:SIZE" asks for, from the train side of the data."""
    assert isinstance(job.tokenizer, str)
    size = int(job.tokenizer.removeprefix("train:"))
    plain = BPETokenizer.bytes()  # long documents may be cut anywhere for this
    worker = Worker(job.options, plain, job.test_fraction, single)

    def texts() -> Iterator[str]:
        told, before, total = -1, [0], job.num_bytes
        for source in job.sources:
            before.append(before[-1] + source.num_bytes)
        long = TRAIN
        for index, block in job.blocks(0, START, plain, single):
            for side, text in worker.texts(block):
                long = side if block.begins else long  # the first part of a document decides for all
                if long == TRAIN:
                    yield text
            done = before[index] + block.file_bytes
            if 100 * done // max(total, 1) > told:
                told = 100 * done // max(total, 1)
                job.tell("train tokenizer", done, total)

    return BPETokenizer.train_from_iterator(texts(), size)


def read_journal(path: Path, key: str, options: CorpusOptions, in_cache: bool) -> dict[str, Any] | None:
    """What an earlier process wrote, if that is of `key` and `options`; in the cache None for anything else.

    Raises:
        UserError: it is of something else, damaged, or cannot be read.
    """
    try:
        journal = json.loads(path.read_bytes())
        is_it = journal["key"] == key and is_as_lenient(Report(**journal["report"]), options)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if in_cache:
            return None
        raise UserError(f"{path} is damaged. Delete {path.parent.parent} and prepare the data again.") from error
    if is_it:
        return dict(journal)
    if in_cache:
        return None
    raise UserError(f"{path.parent.parent} holds an unfinished preparation of other data or by other rules. Give another --output, or --overwrite.")


def read_report(directory: Path) -> Report:
    """That of a finished store.

    Raises:
        OSError, ValueError, TypeError: there is none, or it is damaged.
    """
    return Report(**json.loads((directory / REPORT).read_text(encoding="utf-8")))


def check_leniency(report: Report, options: CorpusOptions) -> None:
    """What was left out or replaced before, because it was asked for, is a mistake for those who did not ask.

    Raises:
        UserError: naming the first place, or how many there are.
    """
    if options.on_bad_rows == "error" and report.dropped.get("bad row"):
        raise UserError(f"{report.examples['bad row'][0]} Mend the row, or give --on_bad_rows skip.")
    if options.invalid_utf8 == "error" and report.changed.get("invalid_utf8"):
        raise UserError(f"{report.changed['invalid_utf8']:,} places in the data are not UTF-8. Convert the files, or give --invalid_utf8 replace.")


def is_as_lenient(report: Report, options: CorpusOptions) -> bool:
    """Whether rows that are not UTF-8 were left out or mended, as they are to be now. Where they are a mistake now, `check_leniency` says so."""
    mended = "invalid_utf8" in report.changed
    stops = options.on_bad_rows == options.invalid_utf8 == "error"
    return not report.rows_not_utf8 or stops or mended == (options.invalid_utf8 == "replace")
