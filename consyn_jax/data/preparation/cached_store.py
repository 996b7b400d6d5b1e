"""Make the token store of some data once, in a cache or in `--output`.

Stages: sources, blocks, documents, cleaning, duplicates, splits, token ids, shards. Workers process
single documents. The main process reads, drops duplicates and writes in document order, so the
store does not depend on the number of workers. Every few seconds a journal records how much of
the store is valid. If the preparation is killed, the next preparation cuts the store back to that
point, continues from there, and ends with the same bytes.

This module prints nothing: `Prepared` has the facts for the user, and `progress` is called during
the work.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from consyn_jax.data.preparation.build import Stopped
from consyn_jax.data.preparation.corpus_report import (
    Report,
    check_leniency,
    is_as_lenient,
    read_report,
)
from consyn_jax.data.preparation.destination import Destination
from consyn_jax.data.preparation.preparation_spec import (
    Progress,
    Spec,
    build_spec,
    contents_of,
    find,
    key_of,
)
from consyn_jax.data.preparation.segments.engines import learn_hashes
from consyn_jax.data.preparation.segments.many_writers import one_writer_reason
from consyn_jax.data.preparation.store_making import Built, build
from consyn_jax.data.sources.discovery import Corpus
from consyn_jax.data.sources.recognition.splits import IS_TEST
from consyn_jax.data.sources.source import Source
from consyn_jax.data.split import SPLITS, TEST, TRAIN, VALIDATION
from consyn_jax.data.store import TokenStore, TokenStoreWriter
from consyn_jax.data.store.manifest import MANIFEST
from consyn_jax.data.store.raw_tokens import RawTokens
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.data.store.token_store import JoinedStores
from consyn_jax.errors import UserError
from consyn_jax.files import cache_directory
from consyn_jax.prepare_config import HELD_OUT, CorpusOptions, EngineOptions
from consyn_jax.tokenization import BPETokenizer, load_tokenizer


@dataclass(frozen=True)
class Prepared:
    """A token store, and the sources and counts of its preparation.

    Attributes:
        store: the tokens; `store.tokenizer` made them.
        used: the sources that were read.
        left_out: (file, reason) for each skipped file of a given directory.
        report: counts of the preparation, empty for data that was tokenised already.
        from_cache: whether the store was already complete in the cache.
        validation: the sources in `used` that are validation data.
        one_writer: why `--shared_directory` had no effect; "" if it had an effect or was not given.
        scratch: sentences about the directories in `--shared_directory` that are not needed any
            more and could not be removed.
    """

    store: TokenStore | JoinedStores | RawTokens
    used: tuple[Source, ...]
    left_out: tuple[tuple[str, str], ...]
    report: Report
    from_cache: bool
    validation: tuple[Source, ...] = ()
    one_writer: str = ""
    scratch: tuple[str, ...] = ()

    @property
    def validation_is_empty(self) -> bool:
        """Whether no document is held out for validation."""
        return self.store.split(VALIDATION).num_tokens == 0

    @property
    def validation_remedy(self) -> str:
        """Advice for the user if no document is held out for validation."""
        if not self.used[0].is_store:
            return "give --validation PATH or a larger --validation_fraction"
        return (
            "prepare the data again with consyn-prepare --validation PATH or a larger "
            "--validation_fraction"
        )


def prepare(
    options: CorpusOptions,
    tokenizer: BPETokenizer | None = None,
    *,
    output: Path | None = None,
    test_fraction: float = 0.0,
    progress: Progress | None = None,
    engine: EngineOptions | None = None,
) -> Prepared:
    """Return the token store of `options.data`: the data itself, a cached store, or a new one.

    Args:
        tokenizer: used instead of the tokenizer that the options name.
        output: directory of the store; None for one in the cache, named by a hash of all inputs.
        test_fraction: share of the documents that becomes the split "test".
        engine: where the workers run; None for processes of this machine.

    Raises:
        UserError: the data is missing, unusable or without text; the tokenizer differs from the
            given store's; or `output` cannot be written or contains other files.
    """
    corpus, held_out = find(options)
    if corpus.sources[0].kind == "sharded":
        if output is not None:
            raise UserError(
                f"--data {corpus.sources[0].name} is tokenised already. Train on it as it is."
            )
        return _given(corpus, held_out, options, tokenizer)
    spec = build_spec(corpus, held_out, options, tokenizer, test_fraction, progress)
    if engine is not None:
        spec = dataclasses.replace(spec, engine=engine)
    if spec.engine.shared_directory is not None:
        learn_hashes(spec)
    key = key_of(spec, contents_of(spec))
    directory = _entry(key, options) if output is None else output
    destination = Destination(directory, key, spec.options, in_cache=output is None)
    return _prepared(spec, directory, build(spec, destination))


def start(
    options: CorpusOptions,
    tokenizer: BPETokenizer | None = None,
    *,
    progress: Progress | None = None,
) -> Growing:
    """Start `prepare` in the background, with the store in the cache.

    Raises:
        UserError: `prepare` would raise this error before it reads the first document.
    """
    corpus, held_out = find(options)
    if corpus.sources[0].kind == "sharded":
        raise UserError(
            f"--data {corpus.sources[0].name} is tokenised already, so there is nothing to stream. "
            "Leave --streaming out."
        )
    spec = dataclasses.replace(
        build_spec(corpus, held_out, options, tokenizer, 0.0, progress), streaming=True
    )
    assert isinstance(spec.tokenizer, BPETokenizer)  # validation refuses train:SIZE here
    key = key_of(spec, contents_of(spec))
    return Growing(spec, Destination(_entry(key, options), key, spec.options, in_cache=True))


class Growing:
    """A preparation that continues in a thread while its first tokens are read.

    Attributes:
        tokenizer: the tokenizer of the store.
        chat_template: the Jinja template that formats conversations.
        key: hash of the data, the rules and the tokenizer; known before the data is read.
        left_out: (file, reason) for each skipped file of a given directory.
        sources, validation: all sources that are read, and those for validation.
        prepared: the result of `prepare`; None until the preparation is complete.
    """

    def __init__(self, spec: Spec, destination: Destination) -> None:
        assert isinstance(spec.tokenizer, BPETokenizer)
        self.tokenizer, self.key, self.left_out = spec.tokenizer, destination.key, spec.left_out
        self.chat_template = spec.chat_template
        self.sources, self.validation = spec.sources, spec.sources[: spec.num_validation]
        # The only document cannot be a duplicate, so it is never removed and can be read while it
        # is written.
        self._is_one_text = spec.is_one_text
        self.prepared: Prepared | None = None
        self._splits: dict[str, StoreSplit] = {}
        self._begun: Report | None = None
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(
            target=self._run, args=(spec, destination), name="prepare", daemon=True
        )
        self._thread.start()

    def split(self, name: str, tokens: int | None) -> tuple[StoreSplit, bool]:
        """The documents of a split so far, and whether the split is complete.

        The split only grows: the positions of earlier documents do not change.

        Args:
            tokens: number of tokens to wait for; None to wait for the complete preparation. If the
                preparation is complete with fewer tokens, the wait ends as well.

        Raises:
            Exception: the preparation failed; this is its error, usually a `UserError`.
            RuntimeError: `close` was called.
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

    def beginning(self) -> Report:
        """Wait for the first part of the data, and return its counts.

        If the preparation is complete, return the counts of all data.

        Raises:
            UserError: the preparation failed.
            RuntimeError: `close` was called.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or self._error or self._begun or self.prepared
            )
            if self._error is not None:
                raise self._error
            if self.prepared is not None:
                return self.prepared.report
            if self._begun is None:
                raise RuntimeError("The preparation was closed.")
            return self._begun

    def close(self) -> None:
        """Stop the preparation, which can be continued later. Waiting threads get an exception."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self, spec: Spec, destination: Destination) -> None:
        prepared = failure = None
        try:
            built = build(spec, destination, self._publish)
            prepared = _prepared(spec, destination.directory, built)
        except Stopped:
            return
        except BaseException as error:  # noqa: BLE001 (whatever it is, `split` raises it)
            failure = error
        with self._changed:
            self.prepared, self._error = prepared, failure
            self._changed.notify_all()

    def _publish(self, writer: TokenStoreWriter | None, report: Report | None) -> bool:
        if report is not None and self._begun is None:
            with self._changed:
                self._begun = copy.deepcopy(report)
                self._changed.notify_all()
        if writer is not None:
            splits = {name: writer.snapshot(name, begun=self._is_one_text) for name in SPLITS}
            with self._changed:
                self._splits = splits
                self._changed.notify_all()
        with self._changed:
            return self._stopped


def _raw(
    corpus: Corpus, held_out: Corpus, validation_fraction: float, tokenizer: BPETokenizer
) -> Prepared:
    """Open token files that another program wrote."""
    train, validation = (
        [Path(source.name) for source in found.sources] for found in (corpus, held_out)
    )
    raw = RawTokens(train, tokenizer, validation, validation_fraction)
    test, named = (_named(raw, corpus.sources, split) for split in (TEST, VALIDATION))
    left_out = (*corpus.left_out, *held_out.left_out, *((each.shown, IS_TEST) for each in test))
    used = tuple(source for source in corpus.sources if source not in test)
    return Prepared(
        raw,
        (*used, *held_out.sources),
        left_out,
        Report(),
        from_cache=False,
        validation=named or held_out.sources,
    )


def _given(
    corpus: Corpus, held_out: Corpus, options: CorpusOptions, tokenizer: BPETokenizer | None
) -> Prepared:
    """Open tokenised data: token stores, or token files that another program wrote."""
    name = corpus.sources[0].name
    if options.tokenizer is not None and options.tokenizer.startswith("train:"):
        raise UserError(
            f"--data {name} is tokenised already, so --tokenizer {options.tokenizer} cannot be "
            "trained on it. Leave --tokenizer out."
        )
    if tokenizer is None and options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer)
    if not corpus.sources[0].is_store:
        if tokenizer is None:
            raise UserError(
                f"--data {name} contains tokens but no tokenizer. Give the tokenizer that made "
                "them with --tokenizer PATH."
            )
        return _raw(corpus, held_out, options.validation_fraction, tokenizer)
    sources, left_out = corpus.sources, (*corpus.left_out, *held_out.left_out)
    if options.validation_fraction not in (HELD_OUT, 0.0):
        raise UserError(
            f"--data {name} is a token store, which is split already, so --validation_fraction "
            f"{options.validation_fraction} has no effect. Prepare the data again with "
            "consyn-prepare --validation_fraction, or leave the flag out."
        )
    stores = [TokenStore(source.name) for source in sources]
    if tokenizer is not None and tokenizer.sha256 != stores[0].manifest["tokenizer_sha256"]:
        raise UserError(
            f"The token store {name} was made with a tokenizer other than that of --tokenizer or "
            "--checkpoint. Prepare the text again with consyn-prepare --tokenizer PATH, "
            "or leave both flags out."
        )
    store = stores[0] if len(stores) == 1 else JoinedStores(stores)
    return Prepared(store, sources, left_out, Report(), from_cache=False)


def _named(raw: RawTokens, sources: Sequence[Source], split: str) -> tuple[Source, ...]:
    """The files of `--data` whose names assign them to `split`."""
    return tuple(source for source in sources if Path(source.name) in raw.paths[split])


def _entry(key: str, options: CorpusOptions) -> Path:
    """The cache directory for the store with this key.

    If a store there was made with another `--invalid_utf8`, the new store gets another name,
    because a run may be reading the old store.
    """
    directory = cache_directory() / "stores" / key
    with suppress(UserError, OSError, ValueError, TypeError):  # damaged, and made again
        if (directory / MANIFEST).exists() and not is_as_lenient(read_report(directory), options):
            return directory.with_name(f"{key}-{options.invalid_utf8}")
    return directory


def _prepared(spec: Spec, directory: Path, built: Built) -> Prepared:
    store = TokenStore(directory)
    if not store.split(TRAIN).num_tokens:
        raise UserError(
            "All documents were assigned to the validation split, so none is left to train on. "
            "Lower --validation_fraction, or give more data."
        )
    report = read_report(directory)
    check_leniency(report, spec.options)
    held_out = spec.sources[: spec.num_validation]
    one_writer = one_writer_reason(spec) if spec.engine.shared_directory is not None else ""
    return Prepared(
        store,
        spec.sources,
        spec.left_out,
        report,
        built.was_complete,
        held_out,
        one_writer,
        built.scratch,
    )
