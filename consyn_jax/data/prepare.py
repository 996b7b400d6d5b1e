"""Raw data to a token store, once: sources -> blocks -> documents -> clean -> dedup -> split -> ids -> shards.

Workers do what concerns one document; this process reads, drops duplicates and writes, all in the order of the documents, so that the
store does not depend on how many workers there are. Every few seconds a journal says how far the store is good. A preparation that was
killed cuts the store back to that, reads on from there, and ends with the same bytes.

This room computes and does not print: what a person should be told is in `Prepared`, and `progress` is called along the way.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from consyn_jax.config import CorpusOptions, UserError, validate_corpus
from consyn_jax.data.digests import FileDigests, cache_directory
from consyn_jax.data.near_duplicates import NearDuplicates
from consyn_jax.data.parts import PART_BYTES
from consyn_jax.data.raw_tokens import RawTokens
from consyn_jax.data.reading import START, Block, Position, blocks
from consyn_jax.data.report import CHANGES, EXAMPLE_CHARS, EXAMPLES, RULES, Report
from consyn_jax.data.report_page import page
from consyn_jax.data.seen import Seen
from consyn_jax.data.shards import MANIFEST, StoreSplit
from consyn_jax.data.sources import SAMPLE, Corpus, Source, find_sources, is_array, sample_texts
from consyn_jax.data.split import DIGEST_BYTES, SALT, SPLITS, TRAIN, VALIDATION, joined_digest
from consyn_jax.data.store import FORMAT, PREPARING, VERSION, JoinedStores, TokenStore, TokenStoreWriter, delete_store, write_whole
from consyn_jax.data.work import Kept, Result, Worker
from consyn_jax.data.workers import Workers
from consyn_jax.tokenization import BPETokenizer, load_tokenizer

# Raised when the same input would give other documents, splits or ids than before: old cache entries are then not found.
PIPELINE_VERSION = 2
REPORT, PAGE, JOURNAL = "report.json", "report.html", "journal.json"
JOURNAL_SECONDS = 2.0
LOCK_POLL_SECONDS, LOCK_TRIES = 0.2, 10
# Below, starting processes takes longer than the work.
FEW_BYTES = 4 << 20
# What makes no difference to the store, or is in its key by what it stands for.
# Whether bad rows stop it makes none either, as long as there are none; `_check_leniency` looks.
_NOT_IN_KEY = {"data", "validation", "dataset_type", "tokenizer", "num_workers", "on_bad_rows", "invalid_utf8"}

Publish = Callable[["TokenStoreWriter | None"], bool]
"""Called with what is written when it can be shown, else with None; says whether to stop."""
Progress = Callable[[str, int, int], None]
"""Called with the stage ("hash", "train tokenizer" or "tokenize"), and the bytes done and to do (0: not known)."""


@dataclass(frozen=True)
class Prepared:
    """A token store and what there is to say about how it came about.

    Attributes:
        store: the tokens; `store.tokenizer` made them.
        used, left_out: what was read, and files of directories that were not, with the reason.
        report: counts of the preparation, empty for tokens that were given as data.
        from_cache: nothing was tokenised, because it had been before.
    """

    store: TokenStore | JoinedStores | RawTokens
    used: tuple[Source, ...]
    left_out: tuple[tuple[str, str], ...]
    report: Report
    from_cache: bool

    @property
    def validation_is_empty(self) -> bool:
        """No document came to lie on the validation side; `--validation` or a larger `--validation_fraction` helps."""
        return self.store.split(VALIDATION).num_tokens == 0


@dataclass(frozen=True)
class _Job:
    """What is to be prepared, resolved. The sources of `validation` come first, so that of a document in both the copy there is kept."""

    sources: tuple[Source, ...]
    num_validation: int
    left_out: tuple[tuple[str, str], ...]
    options: CorpusOptions
    test_fraction: float
    tokenizer: BPETokenizer | str
    tell: Progress
    streaming: bool = False

    @property
    def num_bytes(self) -> int:
        return sum(source.num_bytes for source in self.sources)

    @property
    def is_one_text(self) -> bool:
        """There is one document, which is cut by position."""
        return len(self.sources) == 1 and self.sources[0].kind == "text" and self.options.document_separator is None

    def blocks(self, index: int, position: Position, tokenizer: BPETokenizer, single: bool) -> Iterator[tuple[int, Block]]:
        """The blocks behind a position of source number `index`, each with the number of its source."""
        keys = [self.options.text_key, self.options.messages_key, self.options.prompt_key or "prompt", self.options.completion_key or "completion"]
        columns = [part for key in keys for part in key.split(",")]
        for number in range(index, len(self.sources)):
            source = self.sources[number]
            held_out = number < self.num_validation
            how: dict[str, Any] = {"single": single, "columns": columns, "test_fraction": self.test_fraction, "streaming": self.streaming}
            for block in blocks(source, position, self.options, tokenizer, **how):
                yield number, dataclasses.replace(block, side=VALIDATION) if held_out else block
            position = START

    @property
    def num_workers(self) -> int:
        if self.options.num_workers is not None:
            return self.options.num_workers
        total = self.num_bytes
        return 0 if 0 < total < FEW_BYTES else len(os.sched_getaffinity(0))


def prepare(
    options: CorpusOptions,
    tokenizer: BPETokenizer | None = None,
    *,
    output: Path | None = None,
    test_fraction: float = 0.0,
    progress: Progress | None = None,
) -> Prepared:
    """The token store of `options.data`: the one that was given, the one that is there, or a new one.

    Args:
        tokenizer: instead of the one that the options name.
        output: where the store shall be; in the cache, under a name that stands for its content, when None.
        test_fraction: share of the documents that becomes the split "test".

    Raises:
        UserError: data that is missing, unusable or without any text; a tokenizer that is not a given store's; a place that cannot be
            written, or holds something else.
    """
    corpus, held_out = _find(options)
    if corpus.sources[0].kind == "sharded":
        if output is not None:
            raise UserError(f"--data {corpus.sources[0].name} is tokenised already. Train on it as it is.")
        return _given(corpus, held_out, options, tokenizer)
    job = _job(corpus, held_out, options, tokenizer, test_fraction, progress)
    key = _key(job)
    directory = cache_directory() / "stores" / key if output is None else output
    from_cache = _build(job, key, directory, in_cache=output is None)
    return _prepared(job, directory, from_cache)


class Growing:
    """A preparation that goes on in a thread while its first tokens are read.

    Attributes:
        tokenizer: makes the tokens.
        key: stands for the data, the rules and the tokenizer, known before any of them is read to the end.
        left_out: files of directories that are not read, with the reason.
        prepared: what `prepare` gives, once the preparation is complete.
    """

    def __init__(self, job: _Job, key: str, tokenizer: BPETokenizer, directory: Path) -> None:
        self.tokenizer, self.key, self.left_out = tokenizer, key, job.left_out
        self._is_one_text = job.is_one_text  # which is no duplicate of anything, so what has begun will not be taken back
        self.prepared: Prepared | None = None
        self._splits: dict[str, StoreSplit] = {}
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, args=(job, directory), name="prepare", daemon=True)
        self._thread.start()

    def split(self, name: str, tokens: int | None) -> tuple[StoreSplit, bool]:
        """The documents of a split so far, and whether these are all. What was there stays as it is: the split only grows.

        Args:
            tokens: waits until there are so many, or the preparation is complete; None waits for that.

        Raises:
            UserError: what stopped the preparation; also another exception, where that is a defect, or `close` was called.
        """
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                if self.prepared is not None:
                    return self.prepared.store.split(name), True
                found = self._splits.get(name)
                if tokens is not None and found is not None and found.num_tokens >= tokens:
                    return found, False
                if self._stopped:
                    raise RuntimeError("The preparation was closed.")
                self._changed.wait()

    def close(self) -> None:
        """Stop; what is prepared stays, and the next time goes on with it. Whoever waits, or comes to wait, gets an exception."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self, job: _Job, directory: Path) -> None:
        try:
            from_cache = _build(job, self.key, directory, in_cache=True, publish=self._publish)
            prepared = _prepared(job, directory, from_cache)
        except _Stopped:
            return
        except BaseException as error:  # noqa: BLE001 (whatever it is, whoever waits raises it)
            with self._changed:
                self._error = error
                self._changed.notify_all()
        else:
            with self._changed:
                self.prepared = prepared
                self._changed.notify_all()

    def _publish(self, writer: TokenStoreWriter | None) -> bool:
        if writer is not None:
            splits = {name: writer.snapshot(name, begun=self._is_one_text) for name in SPLITS}
            with self._changed:
                self._splits = splits
                self._changed.notify_all()
        with self._changed:
            return self._stopped


def start(options: CorpusOptions, tokenizer: BPETokenizer | None = None, *, progress: Progress | None = None) -> Growing:
    """As `prepare`, into the cache, without waiting.

    Raises:
        UserError: as `prepare`, of what is found before the first document is read.
    """
    corpus, held_out = _find(options)
    if corpus.sources[0].kind == "sharded":
        raise UserError(f"--data {corpus.sources[0].name} is tokenised already, so there is nothing to stream. Leave --streaming out.")
    job = dataclasses.replace(_job(corpus, held_out, options, tokenizer, 0.0, progress), streaming=True)
    assert isinstance(job.tokenizer, BPETokenizer)  # options that would have one learned are refused
    key = _key(job)
    return Growing(job, key, job.tokenizer, cache_directory() / "stores" / key)


# ---------------------------------------------------------------------------------------------------------- what is to be done


def _find(options: CorpusOptions) -> tuple[Corpus, Corpus]:
    """The corpus less the files of `validation`, and those: `--data DIR --validation DIR/valid.txt` must not train on the latter."""
    validate_corpus(options)
    corpus = find_sources(options.data, options.dataset_type, invalid_utf8=options.invalid_utf8)
    held_out = Corpus((), ())
    if options.validation:
        held_out = find_sources(options.validation, flag="validation", invalid_utf8=options.invalid_utf8)
    if held_out.sources and corpus.sources[0].is_store:
        raise UserError(f"--data {corpus.sources[0].name} is a token store, which has its own validation split. Leave --validation out.")
    sharded = {source.kind == "sharded" for source in (*corpus.sources, *held_out.sources)}
    if len(sharded) > 1:
        raise UserError("Of --data and --validation one is tokens and the other is not. Give both as text or rows, or both as files of tokens.")

    def place(source: Source) -> str:
        return SAMPLE if source.kind == SAMPLE else str(Path(source.name).resolve()) if Path(source.name).exists() else source.name

    reserved = {place(source) for source in held_out.sources}
    kept = tuple(source for source in corpus.sources if place(source) not in reserved)
    if not kept:
        raise UserError("--validation names all of --data, so nothing is left to train on. Give other files to one of them.")
    moved = tuple((source.name, "is validation data") for source in corpus.sources if place(source) in reserved)
    return Corpus(kept, (*corpus.left_out, *moved)), held_out


def _job(
    corpus: Corpus, held_out: Corpus, options: CorpusOptions, tokenizer: BPETokenizer | None, test_fraction: float, progress: Progress | None
) -> _Job:
    if held_out.sources:
        options = dataclasses.replace(options, validation_fraction=0.0)
    spec = tokenizer if tokenizer is not None else options.tokenizer or "default"
    return _Job(
        (*held_out.sources, *corpus.sources),
        len(held_out.sources),
        (*corpus.left_out, *held_out.left_out),
        options,
        test_fraction,
        load_tokenizer(spec) if isinstance(spec, str) and not spec.startswith("train:") else spec,
        progress or (lambda stage, done, total: None),
    )


def _given(corpus: Corpus, held_out: Corpus, options: CorpusOptions, tokenizer: BPETokenizer | None) -> Prepared:
    """Tokens that were given as data."""
    name, spec = corpus.sources[0].name, options.tokenizer
    if spec is not None and spec.startswith("train:"):
        raise UserError(f"--data {name} is tokenised already, so --tokenizer {spec} cannot be. Leave --tokenizer out.")
    wanted = tokenizer if tokenizer is not None else None if spec is None else load_tokenizer(spec)
    left_out = (*corpus.left_out, *held_out.left_out)
    if not corpus.sources[0].is_store:
        if wanted is None:
            raise UserError(f"--data {name} holds tokens, and not the tokenizer that made them. Name it with --tokenizer PATH.")
        paths = [[Path(source.name) for source in sources] for sources in (corpus.sources, held_out.sources)]
        with FileDigests() as digest:
            raw = RawTokens(paths[0], wanted, validation=paths[1], validation_fraction=options.validation_fraction, digest=digest)
        return Prepared(raw, (*corpus.sources, *held_out.sources), left_out, Report(), from_cache=False)
    stores = [TokenStore(source.name) for source in corpus.sources]
    if wanted is not None and wanted.sha256 != stores[0].manifest["tokenizer_sha256"]:
        raise UserError(f"The token store {name} was made with another tokenizer than the one asked for. Leave --tokenizer out to use its own.")
    return Prepared(stores[0] if len(stores) == 1 else JoinedStores(stores), corpus.sources, left_out, Report(), from_cache=False)


def _prepared(job: _Job, directory: Path, from_cache: bool) -> Prepared:
    store = TokenStore(directory)
    if not store.split(TRAIN).num_tokens:
        raise UserError("All documents fell on the validation side and none is left to train on. Lower --validation_fraction, or give more data.")
    report = _read_report(directory)
    _check_leniency(report, job.options)
    return Prepared(store, job.sources, job.left_out, report, from_cache)


def _check_leniency(report: Report, options: CorpusOptions) -> None:
    """What was left out or replaced before, because it was asked for, is a mistake for those who did not ask."""
    if options.on_bad_rows == "error" and report.dropped.get("bad row"):
        raise UserError(f"{report.examples['bad row'][0]} Mend the row, or give --on_bad_rows skip.")
    if options.invalid_utf8 == "error" and report.changed.get("invalid_utf8"):
        raise UserError(f"{report.changed['invalid_utf8']:,} places in the data are not UTF-8. Convert the files, or give --invalid_utf8 replace.")


def _is_as_lenient(report: Report, options: CorpusOptions) -> bool:
    """Whether rows that are not UTF-8 were left out or mended, as they are to be now. Where they are a mistake now, `_check_leniency` says so."""
    mended = "invalid_utf8" in report.changed
    stops = options.on_bad_rows == options.invalid_utf8 == "error"
    return not report.rows_not_utf8 or stops or mended == (options.invalid_utf8 == "replace")


def _read_report(directory: Path) -> Report:
    return Report(**json.loads((directory / REPORT).read_text(encoding="utf-8")))


def _key(job: _Job) -> str:
    """A name for the store that `job` gives: by what is in the files, in which order, and not by where they lie."""
    done, total = 0, job.num_bytes
    contents: list[list[Any]] = []
    with FileDigests() as digest:
        for source in job.sources:
            if source.kind == SAMPLE:
                digests = [hashlib.sha256("\0".join(sample_texts()).encode()).hexdigest()]
            else:
                digests = [digest(file) for file in source.files] or [source.name]
            contents.append([source.kind, source.kind == "jsonl" and is_array(Path(source.name)), digests])
            done += source.num_bytes
            job.tell("hash", done, total)
    recipe = {name: value for name, value in dataclasses.asdict(job.options).items() if name in _RECIPE}
    content = {
        "versions": [PIPELINE_VERSION, VERSION, SALT.decode(), PART_BYTES],
        "contents": contents,
        "validation": job.num_validation,
        "recipe": recipe | {"test_fraction": job.test_fraction},
        # What is learned from must not depend on whether an earlier process, which was stopped, mended it.
        "tokenizer": job.tokenizer + " replace" * (job.options.invalid_utf8 == "replace") if isinstance(job.tokenizer, str) else job.tokenizer.sha256,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


_RECIPE = {f.name for f in dataclasses.fields(CorpusOptions)} - _NOT_IN_KEY


# -------------------------------------------------------------------------------------------------------------------- the work


class _Stopped(Exception):
    """Whoever reads what is prepared has had enough."""


def _build(job: _Job, key: str, directory: Path, *, in_cache: bool, publish: Publish | None = None) -> bool:
    """Make the store in `directory`, or go on making it. Says whether it was there already."""
    work = directory / PREPARING
    if _is_done(directory, key, job.options, in_cache) and not work.exists():
        return True
    if not in_cache:
        check_output(directory)
    with _locked(work, in_cache, stop=(lambda: publish(None)) if publish is not None else None):
        if _is_done(directory, key, job.options, in_cache):
            shutil.rmtree(work, ignore_errors=True)  # also where a kill came between the manifest and this
            return True
        try:
            (directory / MANIFEST).unlink(missing_ok=True)  # of an entry that is damaged or outdated: it is made again
        except OSError as error:
            raise UserError(f"{directory} is damaged and cannot be written: {error.strerror}. Set CONSYN_CACHE to a directory with room.") from error
        journal = _read_journal(work / JOURNAL, key, job.options, in_cache)
        if journal is not None:
            _check_leniency(Report(**journal["report"]), job.options)
        single = job.is_one_text if journal is None else journal["single"]
        preparation = None
        try:
            preparation = _Preparation(job, key, directory, single, journal)
            preparation.run(publish)
            if preparation.is_one_row:
                preparation.close()
                (work / JOURNAL).unlink(missing_ok=True)  # it speaks of files that are now made anew
                preparation = _Preparation(job, key, directory, True, None)
                preparation.run(publish)
            preparation.finish()
        except BaseException:
            if preparation is not None:
                preparation.close()
            if not (work / JOURNAL).exists() and not (directory / MANIFEST).exists():  # nothing to go on from
                with suppress(OSError):  # where nothing can be written, nothing can be deleted
                    delete_store(directory)
            raise
        preparation.close()
        shutil.rmtree(work, ignore_errors=True)
    return False


def _is_done(directory: Path, key: str, options: CorpusOptions, in_cache: bool) -> bool:
    """Whether the store of `key` and `options` is in `directory`.

    Raises:
        UserError: another one is, or it is damaged; an entry of the cache is then no entry.
    """
    if not (directory / MANIFEST).exists():
        return False
    try:
        store = TokenStore(directory)
        assert store.tokenizer  # reads it, and compares it with the manifest
        if store.manifest.get("key") == key and _is_as_lenient(_read_report(directory), options):
            return True
    except (UserError, OSError, ValueError, TypeError) as error:
        if not in_cache:
            raise UserError(f"The token store in {directory} is damaged. Delete it with --overwrite, or give another --output.") from error
        return False
    if not in_cache:
        raise UserError(f"{directory} holds a token store of other data or made by other rules. Give another --output, or delete it with --overwrite.")
    return False


def check_output(directory: Path) -> None:
    """Nobody's files may get lost. Whether a store there is the one that is asked for, only the data can tell.

    Raises:
        UserError: the directory holds something, and neither a token store nor the beginning of one.
    """
    names = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    if names and not _is_ours(directory):
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        raise UserError(f"--output {directory} holds {', '.join(names[:3])}{more}, and no token store of ours. Name another directory.")


def _is_ours(directory: Path) -> bool:
    """A token store, or a preparation that has begun to make one."""
    with suppress(OSError, ValueError, RecursionError, AttributeError):
        if json.loads((directory / MANIFEST).read_bytes()).get("format") == FORMAT:
            return True
    work = directory / PREPARING
    # Killed between its first two moments, it has no lock yet.
    return work.is_dir() and ((work / "lock").is_file() or not any(work.iterdir()))


@contextmanager
def _locked(work: Path, in_cache: bool, stop: Callable[[], bool] | None) -> Iterator[None]:
    """Keeps other processes from preparing the same store, and in the cache waits for them. The kernel lets go of it however this process ends."""
    elsewhere = "Set CONSYN_CACHE to a directory with room." if in_cache else "Give another --output."
    missing = 0
    while True:
        try:
            work.mkdir(parents=True, exist_ok=True)
            lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            missing += 1  # whoever held it may have finished and removed it just now; behind a link that leads nowhere it stays so
            if missing < LOCK_TRIES and isinstance(error, FileNotFoundError | FileExistsError):
                pass
            elif isinstance(error, FileExistsError):
                raise UserError(f"{error.filename} is no directory but a file, or a link that leads nowhere. {elsewhere}") from error
            else:
                raise UserError(f"{work.parent} cannot be written: {error.strerror}. {elsewhere}") from error
        else:
            missing = 0
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):
                    if os.fstat(lock).st_ino == (work / "lock").stat().st_ino:
                        break
            except BlockingIOError:
                if not in_cache:
                    os.close(lock)
                    raise UserError(f"{work.parent} is being prepared by another process. Wait for it, or give another --output.") from None
            os.close(lock)  # whoever holds it is at work, or has finished and removed it
        if stop is not None and stop():
            raise _Stopped
        time.sleep(LOCK_POLL_SECONDS)
    try:
        yield
    finally:
        os.close(lock)


def _read_journal(path: Path, key: str, options: CorpusOptions, in_cache: bool) -> dict[str, Any] | None:
    try:
        journal = json.loads(path.read_bytes())
        is_it = journal["key"] == key and _is_as_lenient(Report(**journal["report"]), options)
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


def _long(saved: dict[str, Any] | None) -> _Long | None:
    """A document in parts, from the journal."""
    if saved is None:
        return None
    found = _Long(**{**saved, "digests": [bytes.fromhex(digest) for digest in saved["digests"]]})
    found.signature = None if saved["signature"] is None else np.array(saved["signature"], np.uint32)
    return found


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


class _Preparation:
    """A store under way.

    Args:
        single: the corpus is one document, which is cut by position.
        journal: what an earlier process wrote; None begins anew.
    """

    def __init__(self, job: _Job, key: str, directory: Path, single: bool, journal: dict[str, Any] | None) -> None:
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
        if _key(dataclasses.replace(self.job, tell=lambda stage, done, total: None)) != self.key:
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
        settings = {name: value for name, value in dataclasses.asdict(self.job.options).items() if name in _RECIPE}
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
            raise _Stopped

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


def _learn(job: _Job, single: bool) -> BPETokenizer:
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
