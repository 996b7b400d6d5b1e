"""Raw data to a token store, once: sources -> blocks -> documents -> clean -> dedup -> split -> ids -> shards.

Workers do what concerns one document; this process reads, drops duplicates and writes, all in the order of the documents, so that the
store does not depend on how many workers there are. Every few seconds a journal says how far the store is good. A preparation that was
killed cuts the store back to that, reads on from there, and ends with the same bytes.

This room computes and does not print: what a person should be told is in `Prepared`, and `progress` is called along the way.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from consyn_jax.config import CorpusOptions, UserError
from consyn_jax.data.digests import cache_directory
from consyn_jax.data.job import Job, Progress, build_job, find, key_of
from consyn_jax.data.preparation import JOURNAL, Preparation, Publish, Stopped, check_leniency, is_as_lenient, read_journal, read_report
from consyn_jax.data.raw_tokens import RawTokens
from consyn_jax.data.report import Report
from consyn_jax.data.shards import MANIFEST, StoreSplit
from consyn_jax.data.sources import Corpus, Source
from consyn_jax.data.split import SPLITS, TRAIN, VALIDATION
from consyn_jax.data.store import FORMAT, PREPARING, JoinedStores, TokenStore, TokenStoreWriter, delete_store
from consyn_jax.tokenization import BPETokenizer, load_tokenizer

LOCK_POLL_SECONDS, LOCK_TRIES = 0.2, 10  # tries to make the lock where it is gone again, or never comes to be


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
    corpus, held_out = find(options)
    if corpus.sources[0].kind == "sharded":
        if output is not None:
            raise UserError(f"--data {corpus.sources[0].name} is tokenised already. Train on it as it is.")
        return _given(corpus, held_out, options, tokenizer)
    job = build_job(corpus, held_out, options, tokenizer, test_fraction, progress)
    key = key_of(job)
    directory = _entry(key, options) if output is None else output
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

    def __init__(self, job: Job, key: str, tokenizer: BPETokenizer, directory: Path) -> None:
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

    def _run(self, job: Job, directory: Path) -> None:
        try:
            from_cache = _build(job, self.key, directory, in_cache=True, publish=self._publish)
            prepared = _prepared(job, directory, from_cache)
        except Stopped:
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
    corpus, held_out = find(options)
    if corpus.sources[0].kind == "sharded":
        raise UserError(f"--data {corpus.sources[0].name} is tokenised already, so there is nothing to stream. Leave --streaming out.")
    job = dataclasses.replace(build_job(corpus, held_out, options, tokenizer, 0.0, progress), streaming=True)
    assert isinstance(job.tokenizer, BPETokenizer)  # options that would have one learned are refused
    key = key_of(job)
    return Growing(job, key, job.tokenizer, _entry(key, options))


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
        raw = RawTokens(paths[0], wanted, validation=paths[1], validation_fraction=options.validation_fraction)
        return Prepared(raw, (*corpus.sources, *held_out.sources), left_out, Report(), from_cache=False)
    stores = [TokenStore(source.name) for source in corpus.sources]
    if wanted is not None and wanted.sha256 != stores[0].manifest["tokenizer_sha256"]:
        raise UserError(f"The token store {name} was made with another tokenizer than the one asked for. Leave --tokenizer out to use its own.")
    return Prepared(stores[0] if len(stores) == 1 else JoinedStores(stores), corpus.sources, left_out, Report(), from_cache=False)


def _prepared(job: Job, directory: Path, from_cache: bool) -> Prepared:
    store = TokenStore(directory)
    if not store.split(TRAIN).num_tokens:
        raise UserError("All documents fell on the validation side and none is left to train on. Lower --validation_fraction, or give more data.")
    report = read_report(directory)
    check_leniency(report, job.options)
    return Prepared(store, job.sources, job.left_out, report, from_cache)


# -------------------------------------------------------------------------------------------------------------------- the work


def _entry(key: str, options: CorpusOptions) -> Path:
    """Where the cache has the store of `key`, or shall have it. One that treats rows that are not UTF-8 otherwise stays: a run may be reading it."""
    directory = cache_directory() / "stores" / key
    with suppress(UserError, OSError, ValueError, TypeError):  # damaged, and made again
        if (directory / MANIFEST).exists() and not is_as_lenient(read_report(directory), options):
            return directory.with_name(f"{key}-{options.invalid_utf8}")
    return directory


def _build(job: Job, key: str, directory: Path, *, in_cache: bool, publish: Publish | None = None) -> bool:
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
        journal = read_journal(work / JOURNAL, key, job.options, in_cache)
        if journal is not None:
            check_leniency(Report(**journal["report"]), job.options)
        single = job.is_one_text if journal is None else journal["single"]
        preparation = None
        try:
            preparation = Preparation(job, key, directory, single, journal)
            preparation.run(publish)
            if preparation.is_one_row:
                preparation.close()
                (work / JOURNAL).unlink(missing_ok=True)  # it speaks of files that are now made anew
                preparation = Preparation(job, key, directory, True, None)
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
        if store.manifest.get("key") == key and is_as_lenient(read_report(directory), options):
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
            raise Stopped
        time.sleep(LOCK_POLL_SECONDS)
    try:
        yield
    finally:
        os.close(lock)
