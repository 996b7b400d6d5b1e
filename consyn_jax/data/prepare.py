"""Raw data to a token store, once: documents -> split -> ids -> store, in a cache that knows the content it was made from.

This room computes and does not print: what a person should be told is in `Prepared`, and `progress` is called along the way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from consyn_jax.config import UserError
from consyn_jax.data.loader import prefetch
from consyn_jax.data.sources import SAMPLE, Corpus, ReadReport, Source, find_sources, read_documents, sample_texts
from consyn_jax.data.split import SALT, TRAIN, VALIDATION, split_documents
from consyn_jax.data.store import VERSION, TokenStore, TokenStoreWriter
from consyn_jax.tokenization import BPETokenizer, load_tokenizer

# Raised when the same input would give other documents, splits or ids than before: old cache entries are then not found.
PIPELINE_VERSION = 1
REPORT = "report.json"
# Large enough that the tokenizer's threads have work, small enough that a few batches are no matter for memory.
BATCH_BYTES = 4 << 20

Progress = Callable[[str, int, int], None]
"""Called with the stage ("hash", "train tokenizer" or "tokenize"), and the bytes done and to do."""


@dataclass(frozen=True)
class Prepared:
    """A token store and what there is to say about how it came about.

    Attributes:
        store: the tokens; `store.tokenizer` made them.
        used, left_out: files read, and files of directories that were not, with the reason.
        report: counts of the reading, empty for a token store that was given as data.
        from_cache: nothing was tokenised, because it had been before.
    """

    store: TokenStore
    used: tuple[Source, ...]
    left_out: tuple[tuple[str, str], ...]
    report: ReadReport
    from_cache: bool

    @property
    def validation_is_empty(self) -> bool:
        """No document came to lie on the validation side; `--validation` or a larger `--validation_fraction` helps."""
        return self.store.split(VALIDATION).num_tokens == 0


@dataclass(frozen=True)
class _Job:
    """What is to be prepared, resolved."""

    train: tuple[Source, ...]
    validation: tuple[Source, ...]
    fraction: float
    text_key: str
    on_bad_rows: str
    tokenizer: BPETokenizer | str
    progress: Progress

    def documents(self, report: ReadReport) -> Iterator[tuple[str, str]]:
        """(split, text) of all documents, those of `validation` last. Cleaning belongs here, between reading and splitting."""

        def read(sources: tuple[Source, ...]) -> Iterator[str]:
            return read_documents(sources, report, text_key=self.text_key, on_bad_rows=self.on_bad_rows)

        if not self.validation:
            yield from split_documents(read(self.train), self.fraction)
            return
        for side, sources in ((TRAIN, self.train), (VALIDATION, self.validation)):
            for text in read(sources):
                yield side, text

    @property
    def num_bytes(self) -> int:
        return sum(source.num_bytes for source in (*self.train, *self.validation))


def prepare(
    data: str | Sequence[str],
    tokenizer: BPETokenizer | str | None = None,
    *,
    dataset_type: str = "auto",
    text_key: str = "text",
    validation: Sequence[str] = (),
    validation_fraction: float = 0.01,
    on_bad_rows: str = "error",
    progress: Progress | None = None,
) -> Prepared:
    """The token store of `data`: the one that was given, the one in the cache, or a new one.

    Args:
        data: paths, directories, globs or "sample"; or one token store.
        tokenizer: a tokenizer, "default", "bytes", a path, or "train:SIZE" (learned from the train split). None: "default", or
            a token store's own.
        validation: data to validate on; all of `data` is then trained on.
        validation_fraction: otherwise, the share of the documents that is held out.

    Raises:
        UserError: data that is missing, unusable or without any text; a tokenizer that is not a given store's; an unwritable cache.
    """
    corpus = find_sources([data] if isinstance(data, str) else data, dataset_type)
    if corpus.sources[0].kind == "sharded":
        return _given_store(corpus, tokenizer, validation)
    corpus, held_out = _hold_out(corpus, validation)
    tell = progress or (lambda stage, done, total: None)
    job = _Job(corpus.sources, held_out.sources, validation_fraction, text_key, on_bad_rows, _resolve(tokenizer), tell)
    directory = cache_directory() / "stores" / _key(job)
    cached = _open_entry(directory)
    from_cache = cached is not None
    store, report = cached or _build(job, directory)
    if not store.split(TRAIN).num_tokens:
        raise UserError("All documents fell on the validation side and none is left to train on. Lower --validation_fraction, or give more data.")
    return Prepared(store, (*corpus.sources, *held_out.sources), (*corpus.left_out, *held_out.left_out), report, from_cache)


def cache_directory() -> Path:
    """Where token stores are kept: $CONSYN_CACHE, else consyn_jax in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("CONSYN_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "consyn_jax"


def _hold_out(corpus: Corpus, validation: Sequence[str]) -> tuple[Corpus, Corpus]:
    """The corpus less the files of `validation`, and those: `--data DIR --validation DIR/valid.txt` must not train on the latter."""
    held_out = find_sources(validation, flag="validation") if validation else Corpus((), ())
    if any(source.kind == "sharded" for source in held_out.sources):
        raise UserError("--validation is a token store and --data is not. Give text or JSON rows, or one token store with both splits as --data.")

    def place(source: Source) -> Path | str:
        return SAMPLE if source.kind == SAMPLE else Path(source.name).resolve()

    reserved = {place(source) for source in held_out.sources}
    kept = tuple(source for source in corpus.sources if place(source) not in reserved)
    if not kept:
        raise UserError("--validation names all of --data, so nothing is left to train on. Give other files to one of them.")
    moved = tuple((source.name, "is validation data") for source in corpus.sources if place(source) in reserved)
    return Corpus(kept, (*corpus.left_out, *moved)), held_out


def _given_store(corpus: Corpus, tokenizer: BPETokenizer | str | None, validation: Sequence[str]) -> Prepared:
    directory = corpus.sources[0].name
    store = TokenStore(directory)
    if validation:
        raise UserError(f"--data {directory} is a token store, which has its own validation split. Leave --validation out.")
    if isinstance(tokenizer, str) and tokenizer.startswith("train:"):
        raise UserError(f"--data {directory} is tokenised already, so --tokenizer {tokenizer} cannot be. Leave --tokenizer out.")
    if tokenizer is not None:
        wanted = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        if wanted.sha256 != store.manifest["tokenizer_sha256"]:
            raise UserError(f"The token store {directory} was made with another tokenizer than the one asked for. Leave --tokenizer out to use its own.")
    return Prepared(store, corpus.sources, corpus.left_out, ReadReport(), from_cache=False)


def _resolve(tokenizer: BPETokenizer | str | None) -> BPETokenizer | str:
    """A tokenizer, or "train:SIZE" where it has to be learned first."""
    if tokenizer is None:
        return load_tokenizer("default")
    if isinstance(tokenizer, str) and not tokenizer.startswith("train:"):
        return load_tokenizer(tokenizer)
    return tokenizer


# --------------------------------------------------------------------------------------------------------------------- the key


def _key(job: _Job) -> str:
    """A name for the store that `job` gives: by what is in the files, in which order, and not by where they lie."""
    done, total = 0, job.num_bytes
    hashes: dict[str, list[list[str]]] = {TRAIN: [], VALIDATION: []}
    for side, sources in ((TRAIN, job.train), (VALIDATION, job.validation)):
        for source in sources:
            hashes[side].append([source.kind, _content_hash(source)])
            done += source.num_bytes
            job.progress("hash", done, total)
    content = {
        "versions": [PIPELINE_VERSION, VERSION, SALT.decode()],
        "files": hashes,
        "fraction": None if job.validation else job.fraction,
        "text_key": job.text_key,
        "on_bad_rows": job.on_bad_rows,
        "tokenizer": job.tokenizer if isinstance(job.tokenizer, str) else job.tokenizer.sha256,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _content_hash(source: Source) -> str:
    if source.kind == SAMPLE:
        return hashlib.sha256("\0".join(sample_texts()).encode()).hexdigest()
    try:
        with Path(source.name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{source.name} cannot be read: {error.strerror}. Check its permissions.") from error


# -------------------------------------------------------------------------------------------------------------------- the work


def _open_entry(directory: Path) -> tuple[TokenStore, ReadReport] | None:
    """The cache entry in `directory`; None where there is none. A damaged or outdated one is removed: it can be made again."""
    if not directory.exists():
        return None
    try:
        store = TokenStore(directory)
        assert store.tokenizer  # reads it, and compares it with the manifest
        return store, ReadReport(**json.loads((directory / REPORT).read_text(encoding="utf-8")))
    except (UserError, OSError, ValueError, TypeError):
        # Under another name first, so that a process that finds the entry at the same time does not see half of it.
        doomed = directory.with_name(f".{directory.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        with contextlib.suppress(FileNotFoundError):  # somebody else was faster
            directory.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        return None


def _build(job: _Job, directory: Path) -> tuple[TokenStore, ReadReport]:
    tokenizer = job.tokenizer if isinstance(job.tokenizer, BPETokenizer) else _train_tokenizer(job, int(job.tokenizer.removeprefix("train:")))
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The cache {directory.parent} cannot be written: {error.strerror}. Set CONSYN_CACHE to a directory with room.") from error
    report = ReadReport()
    with TokenStoreWriter(directory, tokenizer) as writer:
        fill(writer, tokenizer, _watched(job, "tokenize", report))
        if not report.documents:
            raise UserError(f"There is no text in {', '.join(source.name for source in job.train[:3])}: nothing but white space. Give other --data.")
        try:
            return writer.finish({REPORT: json.dumps(dataclasses.asdict(report), indent=1) + "\n"}), report
        except FileExistsError:
            return TokenStore(directory), report  # another process made the same store meanwhile; equal keys, equal content


def fill(writer: TokenStoreWriter, tokenizer: BPETokenizer, documents: Iterable[tuple[str, str]]) -> None:
    """Tokenise (split, text) pairs in order into `writer`; reading and tokenising run beside the writing."""

    def encode(batch: list[tuple[str, str, int]]) -> tuple[list[tuple[str, str, int]], list[list[int]]]:
        return batch, tokenizer.encode_batch([text for _, text, _ in batch])

    with prefetch(_batches(documents), depth=1, transform=encode) as encoded:
        for batch, ids in encoded:
            for split in dict.fromkeys(side for side, _, _ in batch):
                chosen = [i for i, (side, _, _) in enumerate(batch) if side == split]
                writer.add_many(split, [ids[i] for i in chosen], [batch[i][2] for i in chosen])


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str, int]]]:
    """(split, text, bytes of the text) in lists of about `BATCH_BYTES`."""
    batch: list[tuple[str, str, int]] = []
    size = 0
    for side, text in documents:
        num_bytes = len(text.encode())
        batch.append((side, text, num_bytes))
        size += num_bytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _train_tokenizer(job: _Job, vocab_size: int) -> BPETokenizer:
    documents = _watched(job, "train tokenizer", ReadReport())
    return BPETokenizer.train_from_iterator((text for side, text in documents if side == TRAIN), vocab_size)


def _watched(job: _Job, stage: str, report: ReadReport) -> Iterator[tuple[str, str]]:
    """The job's documents, with `progress` told of every further percent."""
    total, told = job.num_bytes, -1
    for item in job.documents(report):
        yield item
        percent = 100 * report.file_bytes // max(total, 1)
        if percent > told:
            told = percent
            job.progress(stage, report.file_bytes, total)
    job.progress(stage, total, total)
