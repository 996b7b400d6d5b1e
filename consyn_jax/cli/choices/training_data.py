"""Check, prepare or stream the data of a run, and describe it for the header."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from consyn_jax.cli.choices.fine_tuning import LONGEST_TEXT, Settings, with_batch, with_length
from consyn_jax.cli.choices.row_notes import row_notes
from consyn_jax.config import DataOptions, RunConfig
from consyn_jax.errors import UserError, counted, listed
from consyn_jax.prepare_config import HELD_OUT, CorpusOptions

if TYPE_CHECKING:
    from consyn_jax.data.pairs import PairDataset
    from consyn_jax.data.preparation.cached_store import Growing, Prepared
    from consyn_jax.data.preparation.corpus_report import Report
    from consyn_jax.data.sources.source import Source
    from consyn_jax.tokenization import BPETokenizer
    from consyn_jax.training.dataset import ConsynDataset

USED_WITH_TOKENS = {
    *("data", "validation", "validation_fraction", "dataset_type", "tokenizer", "num_workers"),
}

CUT = "documents are joined and cut into sequences"
SHOWN_REASONS = 4

Note = tuple[str, str]  # a line of the header: its name and its text


class TrainingData(NamedTuple):
    """Datasets for `ConsynTrainer`, and lines about them for the header that the run prints.

    Attributes:
        settings: the configuration and the origins of its values, including values chosen from the
            data.
    """

    training: Any
    validation: Any
    tokenizer: BPETokenizer
    notes: list[Note]
    settings: Settings


def check_data(data: DataOptions) -> bool:
    """Refuse missing, empty and binary files early; return whether the data is tokenised already.

    Raises:
        UserError: data that cannot be used.
    """
    from consyn_jax.data.sources.discovery import find_sources

    for item in data.data:
        if data.data_weights and data.data.count(item) > 1:
            raise UserError(
                f"--data names {item} twice, but a mixture has one weight for each item. Give each "
                "item once."
            )
    corpora = [
        find_sources(part, data.dataset_type, invalid_utf8=data.invalid_utf8)
        for part in _parts(data)
    ]
    if data.validation:
        find_sources(data.validation, flag="validation", invalid_utf8=data.invalid_utf8)
    if any(corpus.sources[0].kind != "sharded" for corpus in corpora):
        return False
    for f in dataclasses.fields(CorpusOptions):
        given = getattr(data, f.name)
        if f.name == "row_format" and given == "preference":  # set by --objective dpo
            continue
        if f.name not in USED_WITH_TOKENS and given != f.default:
            raise UserError(
                f"--data {data.data[0]} is tokenised already, so --{f.name} has no effect. Leave "
                "the flag out, or give it to consyn-prepare."
            )
    return True


def _parts(data: DataOptions) -> list[tuple[str, ...]]:
    """Group the items of `--data` by store: one store per item of a mixture, else one for all."""
    return [(item,) for item in data.data] if data.data_weights else [data.data]


@contextmanager
def training_data(
    settings: Settings, tokenizer: BPETokenizer | str | None, context: int | None
) -> Iterator[TrainingData]:
    """Prepare the data, or begin to stream it; streaming stops at the end of the `with` block.

    Args:
        tokenizer: a tokenizer, or a value of `--tokenizer`.
        context: context length of the model, in tokens; None for a preset.
    """
    config, _ = settings
    fields = dataclasses.fields(CorpusOptions)
    values = {f.name: getattr(config.data, f.name) for f in fields}
    name, made = (tokenizer, None) if isinstance(tokenizer, str) else (None, tokenizer)
    options = CorpusOptions(**{**values, "tokenizer": name})
    if not config.data.streaming:
        yield _prepared(settings, options, made, context)
        return

    from consyn_jax.data.preparation.cached_store import start

    with closing(start(options, made)) as corpus:
        settings, _ = with_length(settings, [], min(context or LONGEST_TEXT, LONGEST_TEXT))
        yield _streamed(settings, corpus)


def _items(options: CorpusOptions, parts: Sequence[tuple[str, ...]]) -> Iterator[CorpusOptions]:
    """Yield the options of each item of a mixture.

    A token store already has splits, so its options get the default `validation_fraction`. If all
    items are stores, they keep the user's `validation_fraction`, so that `prepare` refuses it.
    """
    from consyn_jax.data.store.manifest import is_store

    stores = [all(is_store(Path(path)) for path in part) for part in parts]
    for part, has_splits in zip(parts, stores, strict=True):
        each = dataclasses.replace(options, data=part)
        if has_splits and not all(stores):
            each = dataclasses.replace(each, validation_fraction=HELD_OUT)
        yield each


def _prepared(
    settings: Settings,
    options: CorpusOptions,
    tokenizer: BPETokenizer | None,
    context: int | None,
) -> TrainingData:
    """Prepare one token store for all of `--data`, or one for each item of a mixture."""
    config, _ = settings
    stores = [_prepare(config, each, tokenizer) for each in _items(options, _parts(config.data))]
    _check_pairs(config, stores)
    notes = [note for prepared in stores for note in _notes(prepared, options)]
    if context is not None:
        train = [prepared.store.split("train") for prepared in stores]
        settings, why = with_length(settings, train, context)
        notes += [("length", why)] if why else []
    training, validation, sources = _datasets(settings[0], stores)
    notes += _packing(sources)
    settings = with_batch(settings, len(training), _num_devices(settings[0]))
    return TrainingData(training, validation, training.tokenizer, notes, settings)


def _check_pairs(config: RunConfig, stores: Sequence[Prepared]) -> None:
    """Check that token stores hold pairs of answers if, and only if, --objective is dpo."""
    for prepared in stores:
        if prepared.store.holds_pairs == config.trains_on_pairs:
            continue
        name = prepared.used[0].name
        if prepared.store.holds_pairs:
            raise UserError(f"--data {name} contains pairs of answers. Add --objective dpo.")
        raise UserError(
            f"--data {name} contains no pairs of answers, which --objective dpo needs. Prepare "
            "the data with consyn-prepare --row_format preference, or give files of rows."
        )


def _num_devices(config: RunConfig) -> int:
    """Number of devices that share a batch."""
    import jax

    return jax.device_count() if config.hardware.mesh == "auto" else 1


def _datasets(
    config: RunConfig, stores: Sequence[Prepared]
) -> tuple[Any, Any, list[ConsynDataset]]:
    """Return training data, validation data (None if there is none), and training data by store."""
    from consyn_jax.training.dataset import ConsynDataset, MixedDataset, pack_split

    data, seed = config.data, config.budget.seed

    def is_without_validation(prepared: Prepared) -> bool:
        ignored = prepared.used[0].is_store and not data.validation_fraction
        return ignored or prepared.validation_is_empty

    def split(prepared: Prepared, name: str) -> ConsynDataset:
        documents = prepared.store.split(name)
        packed = pack_split(prepared, documents, config.length, data.packing, data.on_long_rows)
        return ConsynDataset(prepared, packed, seed, shuffle=name == "train")

    if not data.data_weights:
        only = stores[0]
        training = split(only, "train")
        without = is_without_validation(only)
        return training, None if without else split(only, "validation"), [training]
    items = dict(zip(data.data, stores, strict=True))
    weights = dict(zip(data.data, data.data_weights, strict=True))
    sources = {item: split(one, "train") for item, one in items.items()}
    held_out = {
        item: split(one, "validation")
        for item, one in items.items()
        if not is_without_validation(one)
    }
    if data.validation:  # all stores hold the same documents
        held_out = dict(list(held_out.items())[:1])
    mixed = MixedDataset(sources, data.data_weights, seed)
    mixed_validation = (
        MixedDataset(held_out, [weights[item] for item in held_out], seed) if held_out else None
    )
    return mixed, mixed_validation, list(sources.values())


def _streamed(settings: Settings, corpus: Growing) -> TrainingData:
    """Datasets that can be read while `corpus` is still being tokenised."""
    config, _ = settings
    from consyn_jax.data.streaming import BLOCK_WINDOWS, VALIDATION_WINDOWS, FirstWindows, Streamed

    tokenizer, rows = _begun(corpus, config)
    notes = [
        (
            "data",
            f"{listed(config.data.data)}: tokenised during the run; the first epoch is shuffled in "
            f"blocks of {BLOCK_WINDOWS:,} sequences",
        ),
        ("validation", f"the first {VALIDATION_WINDOWS:,} sequences of the validation split"),
        *by_name(corpus.validation, config.data),
        *rows,
        *noticed(corpus.sources, config.data, corpus.tokenizer),
        ("packing", CUT),
        *_left_out(corpus.left_out),
    ]
    training = Streamed(corpus, config.length, config.budget.seed)
    validation = FirstWindows(corpus, config.length)
    return TrainingData(training, validation, tokenizer, notes, settings)


def _begun(corpus: Growing, config: RunConfig) -> tuple[BPETokenizer, list[Note]]:
    """Return the tokenizer to export, and header lines about the rows.

    Wait for the first part of the data, because the chat template of the tokenizer and the lines
    depend on the format of the rows.
    """
    from consyn_jax.data.sources.rows import CONVERSATIONS

    tokenizer, report = corpus.tokenizer, corpus.beginning()
    if any(name in CONVERSATIONS for name in report.formats):
        # Users of the exported model must format conversations as in training.
        tokenizer = tokenizer.with_chat_template(corpus.chat_template)
    notes = row_notes(report, config.data, tokenizer)
    if corpus.prepared is None and report.formats:
        notes.append(
            ("rows", "counted in the first part of the data; the rest is read during training")
        )
    return tokenizer, notes


def _prepare(config: RunConfig, options: CorpusOptions, tokenizer: BPETokenizer | None) -> Prepared:
    """Make a token store, with a progress bar."""
    from consyn_jax.cli.progress_bar import Bar
    from consyn_jax.data.preparation.cached_store import prepare

    with Bar(quiet=config.logging.quiet) as bar:
        return prepare(options, tokenizer, progress=bar)


def _notes(prepared: Prepared, options: CorpusOptions) -> list[Note]:
    """Header lines about one token store."""
    from consyn_jax.data.preparation.corpus_report import CHANGES

    store, report = prepared.store, prepared.report
    sizes = []
    for name in ("train", "validation"):
        split = store.split(name)
        size = f"{name} {split.num_tokens:,} tokens"
        if split.num_targets != split.num_tokens:
            size += f"  ({split.num_targets:,} of them training targets)"
        if split.num_documents is not None:
            size += f" of {counted(split.num_documents, 'document')}"
        sizes.append(size)
    names = [source.shown for source in prepared.used if source not in prepared.validation]
    names += [source.shown for source in prepared.validation]
    notes = [("data", f"{listed(names)}: {', '.join(sizes)}")]
    notes += row_notes(report, options, store.tokenizer)
    notes += noticed(prepared.used, options, store.tokenizer, report)
    notes += by_name(prepared.validation, options)
    if prepared.used[0].is_store and not options.validation_fraction:
        notes.append(("validation", "none: --validation_fraction is 0"))
    elif prepared.validation_is_empty:
        remedy = f"the validation split has no document; {prepared.validation_remedy}"
        notes.append(("validation", f"none: {remedy}"))
    notes += _left_out(prepared.left_out)
    if unknown := report.changed.get("unknown"):
        notes.append(("unknown text", f"{unknown:,} {CHANGES['unknown']}"))
    dropped = {rule: count for rule, count in report.dropped.items() if count}
    if bad := dropped.pop("bad row", 0):
        notes.append(("bad rows", f"{bad} skipped, the first: {report.examples['bad row'][0]}"))
    if dropped:
        rules = ", ".join(f"{count:,} {rule}" for rule, count in dropped.items())
        notes.append(("cleaned", f"of {report.documents:,} documents left out: {rules}"))
    return notes


def left_out_files(files: Sequence[tuple[str, str]]) -> str:
    """Describe the files left out: their number, each reason, and a few files for each reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in files:
        reasons.setdefault(reason, []).append(name)
    shown = [
        f"{listed(names, 2)} ({'each ' if len(names) > 1 else ''}{reason})"
        for reason, names in reasons.items()
    ]
    return f"{counted(len(files), 'file')}: {listed(shown, SHOWN_REASONS)}"


def noticed(
    sources: Sequence[Source],
    options: CorpusOptions,
    tokenizer: BPETokenizer,
    report: Report | None = None,
) -> list[Note]:
    """Header lines about text files whose structure is not read, with flags for reading it.

    Args:
        report: counts of each source, in the order of `sources`; None if unknown.
    """
    from consyn_jax.data.sources.recognition.unread_structure import (
        unread_structure,
        unused_separator,
    )
    from consyn_jax.data.sources.text_reader import separator

    end_text = tokenizer.decode([tokenizer.eos_token_id], False)
    texts = unread_structure(sources, options, end_text)
    if options.document_separator is not None and report is not None:
        counts = zip(sources, report.sources, strict=False)  # a damaged report has none
        single = [s for s, n in counts if s.kind == "text" and n["documents"] == 1]
        texts += [unused_separator(single, separator(options).decode())] if single else []
    return [("noticed", text) for text in texts]


def by_name(validation: Sequence[Source], options: CorpusOptions) -> list[Note]:
    """Header line about files of `--data` that are validation data because of their names."""
    if not validation or options.validation:
        return []
    names = listed([source.shown for source in validation])
    return [("validation", f"{counted(len(validation), 'file')} by name: {names}")]


def _left_out(files: Sequence[tuple[str, str]]) -> list[Note]:
    return [("left out", left_out_files(files))] if files else []


def _packing(datasets: Sequence[ConsynDataset]) -> list[Note]:
    """Header lines about packing documents into sequences, and about rows that are too long."""
    from consyn_jax.data.packing import CONTINUE, WholeDocuments
    from consyn_jax.data.pairs import PairDataset

    pairs = [d.packed for d in datasets if isinstance(d.packed, PairDataset)]
    if pairs:
        return _pair_notes(pairs)
    whole = [d.packed for d in datasets if isinstance(d.packed, WholeDocuments)]
    if not whole:
        return [("packing", CUT)]
    padding = sum(len(d) * d.padding_fraction for d in whole) / max(sum(map(len, whole)), 1)
    notes = [("packing", f"sequences consist of whole documents, with {padding:.1%} padding")]
    if len(whole) < len(datasets):
        notes.append(("packing", f"documents without prompts: {CUT}"))
    num_long = sum(d.num_long for d in whole)
    if num_long:
        what = {
            CONTINUE: "continued in the next sequence",
            "truncate": "truncated",
            "drop": "dropped",
        }
        lost, total = sum(d.lost_tokens for d in whole), sum(d.num_tokens for d in whole)
        text = f"{num_long:,} longer than {whole[0].block_size:,} tokens: {what[whole[0].on_long]}"
        share = f", {lost:,} tokens ({lost / max(lost + total, 1):.1%}) left out" if lost else ""
        if targets := sum(d.lost_targets for d in whole):
            share += f", {targets:,} of them training targets"
        notes.append(("long rows", text + share))
    return notes


def _pair_notes(datasets: Sequence[PairDataset]) -> list[Note]:
    """Header lines about preference pairs, and about pairs that are too long."""
    num_pairs, size = sum(map(len, datasets)), datasets[0].block_size
    padding = sum(len(d) * d.padding_fraction for d in datasets) / max(num_pairs, 1)
    row = f"a row is a pair: two sequences of up to {size:,} tokens"
    notes = [("pairs", f"{num_pairs:,}; {row}, with {padding:.1%} padding")]
    num_long = sum(d.num_long for d in datasets)
    if num_long:
        what = {"truncate": "truncated at the end", "drop": "dropped"}[datasets[0].on_long]
        lost, total = sum(d.lost_tokens for d in datasets), sum(d.num_tokens for d in datasets)
        text = f"{num_long:,} with a sequence of more than {size:,} tokens: {what}"
        text += f", {lost:,} tokens ({lost / max(lost + total, 1):.1%}) left out"
        if without := sum(d.num_without_answer for d in datasets):
            text += f"; {without:,} of them dropped, because no token of an answer would be left"
        notes.append(("long pairs", text))
    return notes
