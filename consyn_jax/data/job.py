"""What is to be prepared, resolved, and the name of the store that it gives: by content, not by where the files lie."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consyn_jax.config import CorpusOptions, UserError
from consyn_jax.data.digests import FileDigests
from consyn_jax.data.parts import PART_BYTES
from consyn_jax.data.reading import START, Block, Position, blocks
from consyn_jax.data.sources import SAMPLE, Corpus, Source, find_sources, is_array, sample_texts
from consyn_jax.data.split import SALT, VALIDATION
from consyn_jax.data.store import VERSION
from consyn_jax.tokenization import BPETokenizer, load_tokenizer
from consyn_jax.validation import validate_corpus

# Raised when the same input would give other documents, splits or ids than before: old cache entries are then not found.
PIPELINE_VERSION = 3
# Below, starting processes takes longer than the work.
FEW_BYTES = 4 << 20
# What makes no difference to the store, or is in its key by what it stands for. Whether bad rows stop it makes none either, as long as
# there are none; `preparation.check_leniency` looks.
_NOT_IN_KEY = {"data", "validation", "dataset_type", "tokenizer", "num_workers", "on_bad_rows", "invalid_utf8"}
RECIPE = {f.name for f in dataclasses.fields(CorpusOptions)} - _NOT_IN_KEY

Progress = Callable[[str, int, int], None]
"""Called with the stage ("hash", "train tokenizer" or "tokenize"), and the bytes done and to do (0: not known)."""


@dataclass(frozen=True)
class Job:
    """What is to be prepared. The sources of `validation` come first, so that of a document in both the copy there is kept."""

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


def find(options: CorpusOptions) -> tuple[Corpus, Corpus]:
    """The corpus less the files of `validation`, and those: `--data DIR --validation DIR/valid.txt` must not train on the latter.

    Raises:
        UserError: data that is missing or unusable, or an option out of its range.
    """
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


def build_job(
    corpus: Corpus, held_out: Corpus, options: CorpusOptions, tokenizer: BPETokenizer | None, test_fraction: float, progress: Progress | None
) -> Job:
    """What `find` found as a job; a tokenizer that is not learned is read.

    Args:
        tokenizer: instead of the one that the options name.
    """
    if held_out.sources:
        options = dataclasses.replace(options, validation_fraction=0.0)
    spec = tokenizer if tokenizer is not None else options.tokenizer or "default"
    return Job(
        (*held_out.sources, *corpus.sources),
        len(held_out.sources),
        (*corpus.left_out, *held_out.left_out),
        options,
        test_fraction,
        load_tokenizer(spec) if isinstance(spec, str) and not spec.startswith("train:") else spec,
        progress or (lambda stage, done, total: None),
    )


def key_of(job: Job) -> str:
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
    recipe = {name: value for name, value in dataclasses.asdict(job.options).items() if name in RECIPE}
    content = {
        "versions": [PIPELINE_VERSION, VERSION, SALT.decode(), PART_BYTES],
        "contents": contents,
        "validation": job.num_validation,
        "recipe": recipe | {"test_fraction": job.test_fraction},
        # What is learned from must not depend on whether an earlier process, which was stopped, mended it.
        "tokenizer": job.tokenizer + " replace" * (job.options.invalid_utf8 == "replace") if isinstance(job.tokenizer, str) else job.tokenizer.sha256,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
