"""`consyn-train`: train a decoder language model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from consyn_jax.cli import arguments
from consyn_jax.cli.arguments import build_parser, read
from consyn_jax.cli.run import exit_code, shown
from consyn_jax.config import PRESETS, CorpusOptions, RunConfig, UserError, architecture, nearest
from consyn_jax.resolve import resolve
from consyn_jax.validation import check_context

if TYPE_CHECKING:
    from consyn_jax.config import DataOptions, ModelConfig
    from consyn_jax.data.prepare import Growing, Prepared
    from consyn_jax.tokenization import BPETokenizer
    from consyn_jax.training.dataset import ConsynDataset
    from consyn_jax.training.trainer import ConsynTrainer, ModelSource

DESCRIPTION = """\
Train a decoder language model: text in, a model that transformers loads out.
Without flags: the 124 M parameter model on text that comes with Python."""
USAGE = "[--config FILE] [--model NAME] [--data PATH] [FLAG ...]"
USED_WITH_TOKENS = {"data", "validation", "validation_fraction", "dataset_type", "tokenizer", "num_workers"}
MODES = arguments.MODES | {
    "dry_run": "print what would run and what it needs, with its learning rates as a picture, and stop",
    "lr_find": "train for 200 steps at rising learning rates, print which suits, and stop",
}
EPILOG = """\
examples:
  consyn-train --model haiku --tokenizer train:4096 --max_steps 300
  consyn-train --model verse --data corpus/ --batch_size 16 --output runs/verse
  consyn-train --config runs/verse/config.yaml --lr 3e-4 --output runs/other

Defaults are in brackets; of a flag that is given twice the last counts.
The same command again goes on where a run was stopped.
Exit codes: 0 done, 2 wrong input, 3 diverged, 75 interrupted and saved,
76 another process died or nothing moved, 130 and 143 interrupted with
nothing to save."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return exit_code("consyn-train", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> None:
    """argv -> RunConfig -> data -> trainer."""
    config, origins, mode = read_arguments(argv)
    if mode == "print_config":
        from consyn_jax.training.config_file import describe

        print(describe(config, origins), end="")
        return
    if config.saving.replay is not None:
        from consyn_jax.cli.replay import replay

        replay(config, origins)
        return
    if config.hardware.topology is not None or config.hardware.fit is not None:
        _plan(config, origins, mode)
        return
    from consyn_jax.distributed.host_memory import keep_freed_memory

    keep_freed_memory()
    with _runtime(config, mode):
        train(config, origins, ACTIONS[mode])


def _plan(config: RunConfig, origins: dict[str, str], mode: str) -> None:
    if mode != "dry_run":
        raise UserError(f"--{'topology' if config.hardware.topology else 'fit'} belongs to --dry_run. Add that, or leave it out.")
    from consyn_jax.cli.plan import plan

    base, stored, _ = _models(config)
    plan(config, origins, base, stored)


def _runtime(config: RunConfig, mode: str) -> AbstractContextManager[Any]:
    """With --distributed, JAX over all processes of the run. They meet before anything slow begins."""
    if not config.hardware.distributed or mode == "dry_run":
        return nullcontext()
    if mode:
        raise UserError(f"--{mode} runs in one process. Leave --distributed out.")
    from consyn_jax.distributed.launch import runtime

    return runtime(config)


def read_arguments(argv: Sequence[str]) -> tuple[RunConfig, dict[str, str], str]:
    """The resolved run, the origins of its values, and what is asked for instead of training: one of `MODES`, or "".

    Raises:
        UserError: an unknown flag, a bad value, or a `--config` file that is none.
    """
    return read(build_parser("consyn-train", DESCRIPTION, USAGE, EPILOG), argv, resolve, MODES)


def _dry_run(trainer: ConsynTrainer) -> None:
    from consyn_jax.cli.plan import describe

    describe(trainer)


ACTIONS: dict[str, Callable[[ConsynTrainer], object]] = {
    "": lambda trainer: trainer.train(),
    "dry_run": _dry_run,
    "lr_find": lambda trainer: trainer.find_rate(),
}


def train(config: RunConfig, origins: dict[str, str], action: Callable[[ConsynTrainer], object]) -> None:
    """Check what can be checked at once, prepare the data, describe the model, and train or do what was asked for instead."""
    from consyn_jax.distributed.peers import is_first
    from consyn_jax.training.run_directory import check_output, run_path
    from consyn_jax.training.run_lock import check_free

    base, stored, weights = _models(config)
    if base is not None:
        limit = config.model.context or base.context
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_tokens=config.data.max_tokens or limit))
        check_context(config.data.max_tokens, limit)
    if is_first():
        check_output(config)
        check_free(run_path(config))
    is_store = _check_data(config)
    tokenizer_spec = _tokenizer_spec(config, stored, weights, is_store)
    _check_devices(config)
    options = CorpusOptions(**{f.name: getattr(config.data, f.name) for f in dataclasses.fields(CorpusOptions)} | {"tokenizer": tokenizer_spec})
    if config.data.streaming:
        from consyn_jax.data.prepare import start

        with closing(start(options)) as corpus:
            action(_trainer(config, origins, (base, stored, weights), _streamed(config, corpus)))
    else:
        action(_trainer(config, origins, (base, stored, weights), _prepared(config, options)))


class _Data(NamedTuple):
    """What a run trains and validates on, as `ConsynTrainer` takes it, and lines about it for the header."""

    training: Any
    validation: Any
    tokenizer: BPETokenizer
    notes: list[tuple[str, str]]


def _trainer(config: RunConfig, origins: dict[str, str], named: tuple[ModelConfig | None, ModelConfig | None, Path | None], data: _Data) -> ConsynTrainer:
    from consyn_jax.training.trainer import ConsynTrainer

    model = _model(config, *named, data.tokenizer)
    return ConsynTrainer(model, data.training, data.validation, tokenizer=data.tokenizer, run=(config, origins), notes=tuple(data.notes))


def _models(config: RunConfig) -> tuple[ModelConfig | None, ModelConfig | None, Path | None]:
    """The architecture that `--model` names when it is no preset; that of `--checkpoint`, and the directory with its weights."""
    options = config.model
    is_preset = options.model in PRESETS
    if options.checkpoint is None and is_preset:
        return None, None, None
    if not is_preset and options.model != options.checkpoint and not Path(options.model).exists():
        raise UserError(f"--model {options.model} is neither a preset nor a path{nearest(options.model, PRESETS)} Known: {', '.join(PRESETS)}.")
    if options.checkpoint in PRESETS and not Path(options.checkpoint).exists():
        raise UserError(f"--checkpoint {options.checkpoint} names a preset, which has no weights. Use --model {options.checkpoint}.")
    for name, given in (("model", options.model), ("checkpoint", options.checkpoint or "")):
        if given and not (Path(given) / "config.json").exists() and (Path(given) / "final" / "config.json").is_file():
            raise UserError(f"--{name} {given} is a run, which holds several models. Use {Path(given) / 'final'} or {Path(given) / 'best'}.")

    from consyn_jax.model.pretrained import check_checkpoint, find_model, read_config

    weights = None if options.checkpoint is None else find_model(options.checkpoint)
    stored = None if weights is None else read_config(weights)
    base = None if is_preset else stored if options.model == options.checkpoint else read_config(Path(options.model))
    if stored is not None and weights is not None:
        _check_shape(config, base, stored)
        check_checkpoint(weights)
    return base, stored, weights


def _check_shape(config: RunConfig, base: ModelConfig | None, stored: ModelConfig) -> None:
    """Weights fit one architecture; the context, the rotary base and the sliding window can change without them."""
    asked = architecture(config.model, base, vocab_size=stored.vocab_size)
    sizes = ("hidden_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "qk_norm", "tie_embeddings")
    wrong = [f"{name} {getattr(stored, name)}, not {getattr(asked, name)}" for name in sizes if getattr(stored, name) != getattr(asked, name)]
    if wrong:
        raise UserError(f"--checkpoint {config.model.checkpoint} has {'; '.join(wrong)}. Leave --model and these flags out, or start without it.")


def _check_data(config: RunConfig) -> bool:
    """Find files that are missing, empty or binary before anything slow begins; says whether --data is a token store."""
    from consyn_jax.data.sources import find_sources

    data = config.data
    for item in data.data:
        if data.data_weights and data.data.count(item) > 1:
            raise UserError(f"--data names {item} twice, and a mixture has one weight for each source. Name it once.")
    parts = [(item,) for item in data.data] if data.data_weights else [data.data]
    corpora = [find_sources(part, data.dataset_type, invalid_utf8=data.invalid_utf8) for part in parts]
    if data.validation:
        find_sources(data.validation, flag="validation", invalid_utf8=data.invalid_utf8)
    is_store = all(corpus.sources[0].kind == "sharded" for corpus in corpora)
    if is_store:
        _check_unused(data)
    return is_store


def _check_unused(data: DataOptions) -> None:
    """What says how text is read and cleaned has nothing to do where there are tokens already."""
    given = [f.name for f in dataclasses.fields(CorpusOptions) if f.name not in USED_WITH_TOKENS and getattr(data, f.name) != f.default]
    if given:
        raise UserError(f"--data {data.data[0]} is tokenised already, so --{given[0]} comes too late. Leave it out, or give it to consyn-prepare.")


def _check_devices(config: RunConfig) -> None:
    """The mesh must be one of the devices here, and divide the batch. Where devices share sequences, `mesh_of` says so once the model is known."""
    import jax

    from consyn_jax.distributed.mesh import check_batch, parse_mesh

    try:
        num_devices = jax.device_count()
    except RuntimeError as error:
        raise UserError(f"JAX finds no device to train on ({' '.join(str(error).split())}). Check JAX_PLATFORMS and the driver.") from error
    assert config.data.max_tokens is not None
    mesh, batch_size = config.hardware.mesh, config.budget.batch_size
    if mesh == "auto":
        if batch_size < num_devices and not config.hardware.auto_batch:
            return
        mesh = f"fsdp={num_devices}"
    check_batch(parse_mesh(mesh, num_devices), batch_size, config.data.max_tokens)


def _tokenizer_spec(config: RunConfig, stored: ModelConfig | None, weights: Path | None, is_store: bool) -> str | None:
    """What `--tokenizer` comes to: that of the checkpoint, or of a token store, unless one was asked for."""
    from consyn_jax.tokenization import BPETokenizer, load_tokenizer

    spec, checkpoint = config.data.tokenizer, config.model.checkpoint
    own = weights if weights is not None and (weights / "tokenizer.json").is_file() else None
    if spec is None:
        if own is None and stored is not None and not is_store:
            _check_vocabulary(load_tokenizer("default"), stored, config)
        return None if own is None else str(own)
    if spec.startswith("train:"):
        if own is not None:
            raise UserError(f"--tokenizer {spec} does not fit --checkpoint {checkpoint}, which has its own. Leave --tokenizer out.")
        return spec
    chosen = load_tokenizer(spec)
    if own is not None and chosen.sha256 != BPETokenizer.from_file(own).sha256:
        raise UserError(f"--tokenizer {spec} does not fit --checkpoint {checkpoint}, which was trained with another. Leave --tokenizer out to use its own.")
    _check_vocabulary(chosen, stored, config)
    return spec


def _check_vocabulary(tokenizer: BPETokenizer, stored: ModelConfig | None, config: RunConfig) -> None:
    if stored is not None and tokenizer.vocab_size > stored.vocab_size:
        raise UserError(
            f"The tokenizer has {tokenizer.vocab_size:,} tokens, and --checkpoint {config.model.checkpoint} a vocabulary of {stored.vocab_size:,}. "
            f"Give --tokenizer the one that it was trained with, or a smaller one such as bytes."
        )


def _prepared(config: RunConfig, options: CorpusOptions) -> _Data:
    """The data as token stores, one for all of `--data`, or with `--data_weights` one for each item of it."""
    from consyn_jax.training.dataset import PACKINGS, ConsynDataset, MixedDataset

    data, seed = config.data, config.budget.seed
    parts = [(item,) for item in data.data] if data.data_weights else [data.data]
    prepared = [_prepare(config, dataclasses.replace(options, data=part)) for part in parts]

    def split(of: Prepared, name: str) -> ConsynDataset:
        assert data.max_tokens is not None
        tokenizer = of.store.tokenizer
        packed = PACKINGS[data.packing](of.store.split(name), data.max_tokens, tokenizer.bos_token_id, tokenizer.pad_token_id)
        return ConsynDataset(of, packed, seed, shuffle=name == "train")

    notes = [note for one in prepared for note in _notes(one)]
    if not data.data_weights:
        training, validation = split(prepared[0], "train"), None if prepared[0].validation_is_empty else split(prepared[0], "validation")
        return _Data(training, validation, training.tokenizer, [*notes, _packing(data.packing, [training])])
    sources = {item: split(one, "train") for item, one in zip(data.data, prepared, strict=True)}
    mixed = MixedDataset(sources, data.data_weights, seed)
    held_out = {item: split(one, "validation") for item, one in zip(data.data, prepared, strict=True) if not one.validation_is_empty}
    if data.validation:  # every store holds the same documents
        held_out = dict(list(held_out.items())[:1])
    weights = [weight for item, weight in zip(data.data, data.data_weights, strict=True) if item in held_out]
    mixed_validation = MixedDataset(held_out, weights, seed) if held_out else None
    return _Data(mixed, mixed_validation, mixed.tokenizer, [*notes, _packing(data.packing, list(sources.values()))])


def _streamed(config: RunConfig, corpus: Growing) -> _Data:
    """The data while it is being tokenised."""
    from consyn_jax.data.streaming import BLOCK_WINDOWS, VALIDATION_WINDOWS, FirstWindows, Streamed

    length = config.data.max_tokens
    assert length is not None
    notes = [
        ("data", f"{shown(config.data.data)}: tokenised while the run goes on, and in its first epoch shuffled in blocks of {BLOCK_WINDOWS:,} sequences"),
        ("validation", f"the first {VALIDATION_WINDOWS:,} sequences of the validation split"),
        _packing(config.data.packing, []),
        *_left_out(corpus.left_out),
    ]
    return _Data(Streamed(corpus, length, config.budget.seed), FirstWindows(corpus, length), corpus.tokenizer, notes)


def _prepare(config: RunConfig, options: CorpusOptions) -> Prepared:
    """A token store, with a progress bar while it is made."""
    from consyn_jax.cli.progress import Bar
    from consyn_jax.data.prepare import prepare

    with Bar(quiet=config.logging.quiet) as bar:
        return prepare(options, progress=bar)


def _model(config: RunConfig, base: ModelConfig | None, stored: ModelConfig | None, weights: Path | None, tokenizer: BPETokenizer) -> ModelSource:
    """What is trained: fresh weights, or those of `--checkpoint`."""
    from consyn_jax.model.parameters import initial_parameters
    from consyn_jax.model.pretrained import load_parameters
    from consyn_jax.training.trainer import ModelSource

    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if weights is None or stored is None:
        shape = architecture(config.model, base, vocab_size=tokenizer.vocab_size, **tokens)
        return ModelSource(shape, lambda mesh: initial_parameters(shape, config.budget.seed, mesh))
    _check_vocabulary(tokenizer, stored, config)  # that of a token store, or one that was learned, is known only now
    shape = architecture(config.model, base, vocab_size=stored.vocab_size, **tokens)
    return ModelSource(shape, lambda mesh: load_parameters(weights, shape, mesh))


def _notes(prepared: Prepared) -> list[tuple[str, str]]:
    """Lines about one token store for the header."""
    store, report = prepared.store, prepared.report
    splits = {name: store.split(name) for name in ("train", "validation")}
    learned = {name: "" if s.num_targets == s.num_tokens else f" ({s.num_targets:,} of them learned)" for name, s in splits.items()}
    sizes = ", ".join(f"{name} {s.num_tokens:,} tokens{learned[name]}{_documents(s.num_documents)}" for name, s in splits.items())
    notes = [("data", f"{shown([source.name for source in prepared.used])}: {sizes}")]
    if prepared.validation_is_empty:
        notes.append(("validation", "none: no document fell into it; give --validation PATH or a larger --validation_fraction"))
    notes += _left_out(prepared.left_out)
    dropped = {rule: count for rule, count in report.dropped.items() if count}
    if bad := dropped.pop("bad row", 0):
        notes.append(("bad rows", f"{bad} skipped, the first: {report.examples['bad row'][0]}"))
    if dropped:
        notes.append(("cleaned", f"of {report.documents:,} documents left out: {', '.join(f'{count:,} {rule}' for rule, count in dropped.items())}"))
    return notes


def _left_out(files: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    if not files:
        return []
    return [("left out", f"{len(files)} file{'' if len(files) == 1 else 's'}: {shown([f'{name} ({reason})' for name, reason in files])}")]


def _packing(name: str, datasets: Sequence[ConsynDataset]) -> tuple[str, str]:
    if name == "cut":
        return "packing", "sequences are cut from the stream of documents"
    padding = sum(len(d) * d.packed.padding_fraction for d in datasets) / sum(map(len, datasets))
    return "packing", f"sequences are made of whole documents, with {padding:.1%} padding"


def _documents(count: int | None) -> str:
    return "" if count is None else f" of {count:,} document{'' if count == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main())
