"""The specification of a preparation, and the content hash that names its store."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consyn_jax.data.sources.chunking import PART_BYTES
from consyn_jax.data.sources.discovery import Corpus, find_sources
from consyn_jax.data.sources.reader import START, Block, Position, Reading
from consyn_jax.data.sources.recognition.splits import IS_VALIDATION
from consyn_jax.data.sources.sample_reader import SAMPLE
from consyn_jax.data.sources.source import Source
from consyn_jax.data.split import SALT, VALIDATION
from consyn_jax.data.store.file_hashes import FileHashes
from consyn_jax.data.store.manifest import VERSION
from consyn_jax.errors import UserError, with_urls
from consyn_jax.prepare_config import CorpusOptions, EngineOptions
from consyn_jax.tokenization import BPETokenizer, load_tokenizer
from consyn_jax.tokenization.chat.plain_template import PLAIN
from consyn_jax.tokenization.chat.sandbox import RENDERED_DAY, ChatTemplate, writes_date
from consyn_jax.tokenization.chat.template_files import read_template
from consyn_jax.validation import validate_corpus

# Increase this number when the same input gives other documents, splits or ids than before, so that
# old cache entries are not used.
PIPELINE_VERSION = 4
# With less input, starting processes takes longer than the work.
FEW_BYTES = 4 << 20
# Options left out of the key: they do not affect the store, or the key has their content. Options
# about bad rows matter only if there are bad rows, which `corpus_report.check_leniency` checks.
_NOT_IN_KEY = {
    "data",
    "validation",
    "dataset_type",
    "tokenizer",
    "chat_template",
    "num_workers",
    "on_bad_rows",
    "invalid_utf8",
}
RECIPE = {f.name for f in dataclasses.fields(CorpusOptions)} - _NOT_IN_KEY

USED_FOR_VALIDATION = "is validation data"

Progress = Callable[[str, int, int], None]
"""Function called with the stage, the bytes done, and the total bytes (0 if unknown).

The stages are "hash", "train tokenizer" and "tokenize". With many writers, "look" comes before
"tokenize", and "deduplicate" and "write" come after it.
"""


@dataclass(frozen=True)
class Spec:
    """All inputs of a preparation.

    Attributes:
        sources: all sources. Those of `--validation` come first: if a document is also in `--data`,
            the copy in the validation split is kept.
        num_validation: number of sources from `--validation`.
        left_out: files that are not read, each with the reason.
        tokenizer: a tokenizer, or "train:SIZE" to train one on the data.
        streaming: whether to read Hub datasets over the network, without downloading them first.
        chat_template: the Jinja template that formats conversations.
        tool_template: the template for conversations with tools, if there is a separate one.
        engine: where the workers run, which does not affect the store.
    """

    sources: tuple[Source, ...]
    num_validation: int
    left_out: tuple[tuple[str, str], ...]
    options: CorpusOptions
    test_fraction: float
    tokenizer: BPETokenizer | str
    progress: Progress
    streaming: bool = False
    chat_template: str = PLAIN
    tool_template: str | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)

    @property
    def num_bytes(self) -> int:
        """Size of all sources on disk, in bytes."""
        return sum(source.num_bytes for source in self.sources)

    @property
    def is_one_text(self) -> bool:
        """Whether the corpus is a single document, which is split by position."""
        return len(self.sources) == 1 and self.sources[0].reader.is_one_document(self.options)

    def blocks(
        self, index: int, position: Position, tokenizer: BPETokenizer, single: bool
    ) -> Iterator[tuple[int, Block]]:
        """Iterate over (source number, block), beginning at `position` in source number `index`."""
        reading = Reading(self.options, tokenizer, single, self.test_fraction, self.streaming)
        for number in range(index, len(self.sources)):
            for block in self.sources[number].blocks(position, reading):
                held_out = number < self.num_validation
                yield number, dataclasses.replace(block, split=VALIDATION) if held_out else block
            position = START

    @property
    def num_workers(self) -> int:
        """Number of worker processes to start; 0 means that this process does the work."""
        if self.options.num_workers is not None:
            return self.options.num_workers
        total = self.num_bytes
        return 0 if 0 < total < FEW_BYTES else len(os.sched_getaffinity(0))


def find(options: CorpusOptions) -> tuple[Corpus, Corpus]:
    """Find the sources of `--data` and of `--validation`; name skipped files by the user's URLs.

    Raises:
        UserError: data is missing or unusable, or an option is out of its range.
    """
    corpus, held_out = (
        dataclasses.replace(
            found, left_out=tuple((with_urls(name), reason) for name, reason in found.left_out)
        )
        for found in _find(options)
    )
    return corpus, held_out


def _find(options: CorpusOptions) -> tuple[Corpus, Corpus]:
    """Find the sources of `--data` and of `--validation`.

    A file in both is used only for validation: `--data DIR --validation DIR/valid.txt` must not
    train on valid.txt. Without `--validation`, files of `--data` whose names mark them as
    validation data are used for validation, unless `--validation_fraction` is 0.

    Raises:
        UserError: data is missing or unusable, or an option is out of its range.
    """
    validate_corpus(options)
    corpus = find_sources(options.data, options.dataset_type, invalid_utf8=options.invalid_utf8)
    held_out = Corpus((), ())
    if options.validation:
        held_out = find_sources(
            options.validation, flag="validation", invalid_utf8=options.invalid_utf8
        )
    elif corpus.validation and options.validation_fraction:
        return dataclasses.replace(corpus, validation=()), Corpus(corpus.validation, ())
    unused = tuple((source.name, IS_VALIDATION) for source in corpus.validation)
    corpus = Corpus(corpus.sources, (*corpus.left_out, *unused))
    if held_out.sources and corpus.sources[0].is_store:
        raise UserError(
            f"--data {corpus.sources[0].name} is a token store, which has its own validation "
            "split. Leave --validation out."
        )
    sharded = {source.kind == "sharded" for source in (*corpus.sources, *held_out.sources)}
    if len(sharded) > 1:
        raise UserError(
            "One of --data and --validation has files of tokens, and the other has text or rows. "
            "Give the same kind for both."
        )
    reserved = set(map(place_of, held_out.sources))
    kept = tuple(source for source in corpus.sources if place_of(source) not in reserved)
    if not kept:
        raise UserError(
            "--validation names all of --data, so nothing is left to train on. Give other files "
            "for --data or --validation."
        )
    left_out = [*corpus.left_out, *((s.name, "") for s in corpus.sources if s not in kept)]
    reasons = tuple(
        (name, USED_FOR_VALIDATION if _path_of(name) in reserved else reason)
        for name, reason in left_out
    )
    return Corpus(kept, reasons), held_out


def place_of(source: Source) -> str:
    """A key that identifies a source; all paths to the same file give the same key."""
    return source.name if source.kind == SAMPLE else _path_of(source.name)


def _path_of(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def build_spec(
    corpus: Corpus,
    held_out: Corpus,
    options: CorpusOptions,
    tokenizer: BPETokenizer | None,
    test_fraction: float,
    progress: Progress | None,
) -> Spec:
    """Build the specification from the result of `find`; load the tokenizer if it exists already.

    Args:
        tokenizer: used instead of the tokenizer that the options name.
    """
    unlike = [s for s in (*held_out.sources, *corpus.sources) if s.kind in ("text", SAMPLE)]
    if options.row_format == "preference" and unlike:
        raise UserError(
            f"{unlike[0].name} is plain text, but pairs are read from rows. Give JSON Lines, "
            "Parquet or CSV with prompt, chosen and rejected."
        )
    if held_out.sources:
        options = dataclasses.replace(options, validation_fraction=0.0)
    chosen = tokenizer if tokenizer is not None else options.tokenizer or "default"
    if isinstance(chosen, str) and not chosen.startswith("train:"):
        chosen = load_tokenizer(chosen)
    own = for_tools = None
    if not isinstance(chosen, str):
        own = chosen.chat_template
        for_tools = chosen.tool_template if options.chat_template == "auto" else None
    return Spec(
        (*held_out.sources, *corpus.sources),
        len(held_out.sources),
        (*corpus.left_out, *held_out.left_out),
        options,
        test_fraction,
        chosen,
        progress or (lambda stage, done, total: None),
        chat_template=_template(options.chat_template, own),
        tool_template=for_tools and ChatTemplate(for_tools).source,
    )


def _template(given: str, own: str | None) -> str:
    """The Jinja template that `--chat_template` names.

    Args:
        own: the template that came with the tokenizer; None if there is none.

    Raises:
        UserError: the file cannot be read, or is not Jinja.
    """
    if given == "auto":
        source = PLAIN if own is None else own
    else:
        source = PLAIN if given == "plain" else read_template(given)
    ChatTemplate(source)  # raises an error if the text is not Jinja
    return source


def _in_key(spec: Spec) -> Any:
    """Return the part of the cache key that identifies the chat templates.

    It contains their texts, and `RENDERED_DAY` if a template writes the date.
    """
    templates = [spec.chat_template, *filter(None, [spec.tool_template])]
    if any(map(writes_date, templates)):
        return [*templates, RENDERED_DAY.isoformat()]
    return templates if len(templates) > 1 else spec.chat_template


def contents_of(spec: Spec) -> list[list[Any]]:
    """Return the `Reader.identity` of each source, which ends with the hashes of its files.

    Raises:
        UserError: a file cannot be read.
    """
    done, total = 0, spec.num_bytes
    contents: list[list[Any]] = []
    with FileHashes() as file_hash:
        for source in spec.sources:
            contents.append(source.reader.identity(source.name, file_hash))
            done += source.num_bytes
            spec.progress("hash", done, total)
    return contents


def key_of(spec: Spec, contents: Sequence[Sequence[Any]]) -> str:
    """The store's cache key: a hash of the files' contents, their order, and the rules.

    The names and directories of the files do not count.

    Args:
        contents: the result of `contents_of`.
    """
    recipe = {
        name: value for name, value in dataclasses.asdict(spec.options).items() if name in RECIPE
    }
    if isinstance(spec.tokenizer, str):
        # A trained tokenizer depends on whether bytes that are not UTF-8 were repaired.
        repaired = " replace" if spec.options.invalid_utf8 == "replace" else ""
        tokenizer = spec.tokenizer + repaired
    else:
        tokenizer = spec.tokenizer.sha256
    content = {
        "versions": [PIPELINE_VERSION, VERSION, SALT.decode(), PART_BYTES],
        "contents": contents,
        "validation": spec.num_validation,
        "recipe": recipe | {"test_fraction": spec.test_fraction},
        "tokenizer": tokenizer,
        "chat_template": _in_key(spec),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
