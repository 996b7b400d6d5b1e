"""`consyn-train`: train a decoder language model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consyn_jax.cli.arguments import build_parser, parse
from consyn_jax.cli.run import exit_code
from consyn_jax.config import PRESETS, RunConfig, UserError, architecture, check_context, nearest, resolve

if TYPE_CHECKING:
    from consyn_jax.config import ModelConfig
    from consyn_jax.data.prepare import Prepared
    from consyn_jax.training.trainer import ModelSource

DESCRIPTION = "Train a decoder language model. Without flags: the 124 M parameter model on text that comes with Python."


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return exit_code("consyn-train", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> None:
    """argv -> RunConfig -> data -> trainer."""
    config, origins, print_config = read_arguments(argv)
    if print_config:
        from consyn_jax.training.run_directory import describe

        print(describe(config, origins), end="")
        return
    train(config, origins)


def read_arguments(argv: Sequence[str]) -> tuple[RunConfig, dict[str, str], bool]:
    """The resolved run, the origins of its values, and whether it shall only be printed.

    Raises:
        UserError: an unknown flag, a bad value, or a `--config` file that is none.
    """
    parser = build_parser("consyn-train", DESCRIPTION)
    parser.add_argument("--config", metavar="FILE", help="YAML recipe with the flags' names; flags override it")
    parser.add_argument("--print_config", action="store_true", help="print the resolved run with the origin of every value, and stop")
    given = parse(parser, argv)
    file_name, print_config = given.pop("config", None), given.pop("print_config", False)
    file: dict[str, Any] = {}
    if file_name is not None:
        from consyn_jax.training.run_directory import read_config_file

        file = read_config_file(Path(file_name))
    config, origins = resolve(given, file, file_name=file_name or "")
    return config, origins, print_config


def train(config: RunConfig, origins: dict[str, str]) -> None:
    """Check what can be checked at once, prepare the data, describe the model, train."""
    base, weights = _base_model(config)
    if base is not None:
        limit = config.model.context or base.context
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_tokens=config.data.max_tokens or limit))
        check_context(config.data.max_tokens, limit)
    tokenizer_spec = _tokenizer_spec(config, origins, weights)
    _check_devices(config)
    prepared = _prepare(config, tokenizer_spec)

    from consyn_jax.data.packing import PackedDataset
    from consyn_jax.training.dataset import ConsynDataset
    from consyn_jax.training.trainer import ConsynTrainer

    tokenizer = prepared.store.tokenizer
    model = _model(config, base, weights, tokenizer)

    def split(name: str) -> ConsynDataset:
        assert config.data.max_tokens is not None
        packed = PackedDataset(prepared.store.split(name), config.data.max_tokens, tokenizer.bos_token_id, tokenizer.pad_token_id)
        return ConsynDataset(prepared, packed, config.budget.seed, shuffle=name == "train")

    validation = None if prepared.validation_is_empty else split("validation")
    trainer = ConsynTrainer(model, split("train"), validation, tokenizer=tokenizer, run=(config, origins), notes=_notes(prepared))
    trainer.train()


def _base_model(config: RunConfig) -> tuple[ModelConfig | None, Path | None]:
    """The architecture that `--model` names when it is no preset, and the directory of `--checkpoint`."""
    from consyn_jax.model.pretrained import find_model, read_config

    options = config.model
    weights = None if options.checkpoint is None else find_model(options.checkpoint)
    if options.model in PRESETS:
        return None, weights
    if weights is not None and options.model == options.checkpoint:
        return read_config(weights), weights
    if not Path(options.model).exists():
        raise UserError(f"--model {options.model} is neither a preset nor a path{nearest(options.model, PRESETS)} Known: {', '.join(PRESETS)}.")
    return read_config(Path(options.model)), weights


def _check_devices(config: RunConfig) -> None:
    """The mesh must be one of the devices here, and divide the batch."""
    import jax

    from consyn_jax.distributed.mesh import check_batch, parse_mesh

    assert config.data.max_tokens is not None
    check_batch(parse_mesh(config.hardware.mesh, jax.device_count()), config.budget.batch_size, config.data.max_tokens)


def _tokenizer_spec(config: RunConfig, origins: dict[str, str], weights: Path | None) -> str | None:
    """What `--tokenizer` comes to: that of the checkpoint, or of a token store, unless one was asked for."""
    from consyn_jax.tokenization import BPETokenizer, load_tokenizer

    spec = config.data.tokenizer
    own = weights if weights is not None and (weights / "tokenizer.json").is_file() else None
    if origins["tokenizer"] == "default":
        return None if own is None else str(own)
    if spec.startswith("train:"):
        if own is not None:
            raise UserError(f"--tokenizer {spec} does not fit --checkpoint {config.model.checkpoint}, which has its own. Leave --tokenizer out.")
        return spec
    chosen = load_tokenizer(spec)
    if own is not None and chosen.sha256 != BPETokenizer.from_file(own).sha256:
        raise UserError(
            f"--tokenizer {spec} does not fit --checkpoint {config.model.checkpoint}, which was trained with another. Leave --tokenizer out to use its own."
        )
    return spec


def _prepare(config: RunConfig, tokenizer_spec: str | None) -> Prepared:
    """The token store, with a progress bar while it is made."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from consyn_jax.data.prepare import prepare

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    data = config.data
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=config.logging.quiet or not sys.stderr.isatty()) as bar:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        return prepare(
            data.data,
            tokenizer_spec,
            dataset_type=data.dataset_type,
            text_key=data.text_key,
            validation=data.validation,
            validation_fraction=data.validation_fraction,
            on_bad_rows=data.on_bad_rows,
            progress=progress,
        )


def _model(config: RunConfig, base: ModelConfig | None, weights: Path | None, tokenizer: Any) -> ModelSource:
    """What is trained: fresh weights, or those of `--checkpoint`."""
    from consyn_jax.model.parameters import initial_parameters
    from consyn_jax.model.pretrained import load_parameters, read_config
    from consyn_jax.training.trainer import ModelSource

    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if weights is None:
        shape = architecture(config.model, base, vocab_size=tokenizer.vocab_size, **tokens)
        return ModelSource(shape, lambda mesh: initial_parameters(shape, config.budget.seed, mesh))
    stored = read_config(weights)
    if tokenizer.vocab_size > stored.vocab_size:
        raise UserError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, and --checkpoint {config.model.checkpoint} a vocabulary of {stored.vocab_size}. "
            f"Use the tokenizer that it was trained with."
        )
    shape = architecture(config.model, base, vocab_size=stored.vocab_size, **tokens)
    return ModelSource(shape, lambda mesh: load_parameters(weights, shape, mesh))


def _notes(prepared: Prepared) -> tuple[tuple[str, str], ...]:
    """Lines about the data for the header."""
    store, report = prepared.store, prepared.report
    splits = {name: store.split(name) for name in ("train", "validation")}
    notes = [("data", ", ".join(f"{name} {s.num_tokens:,} tokens of {s.num_documents:,} documents" for name, s in splits.items()))]
    if prepared.validation_is_empty:
        notes.append(("validation", "none: no document fell into it; give --validation PATH or a larger --validation_fraction"))
    if prepared.left_out:
        shown = "; ".join(f"{name} ({reason})" for name, reason in prepared.left_out[:3])
        notes.append(("left out", f"{len(prepared.left_out)} files: {shown}{' ...' if len(prepared.left_out) > 3 else ''}"))
    if report.bad_rows:
        notes.append(("bad rows", f"{report.bad_rows} skipped, the first: {report.bad_row_examples[0]}"))
    return tuple(notes)


if __name__ == "__main__":
    sys.exit(main())
