"""`consyn-train --dry_run` for machines that need not be there: the page, and with `--fit` a recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from consyn_jax.config import ModelConfig, RunConfig, UserError, architecture

if TYPE_CHECKING:
    from consyn_jax.training.trainer import ConsynTrainer


def plan(config: RunConfig, origins: dict[str, str], base: ModelConfig | None, stored: ModelConfig | None) -> None:
    """Print the page of `--topology`, and write what `--fit` finds. No data is read, and no device is asked.

    Args:
        base: the architecture that `--model` names when it is no preset.
        stored: that of `--checkpoint`.

    Raises:
        UserError: a topology, mesh or batch that cannot be, or nothing fits.
    """
    from consyn_jax.planning.aot import packages_are_there
    from consyn_jax.planning.page import in_flags, page, recipe
    from consyn_jax.planning.plan import compiled, estimate, fit
    from consyn_jax.planning.topology import parse_topology

    topology, found, file = config.hardware.topology, packages_are_there(), config.hardware.fit
    if topology is None:
        raise UserError("--fit wants the GPUs to fit: --topology, as in h200:1x8, one host with eight H200.")
    if file is not None and Path(file).exists():
        raise UserError(f"--fit would overwrite {file}. Name another file for the recipe.")
    config, model = _complete(config, base, stored)
    planned = estimate(model, config, parse_topology(topology))
    if found:
        planned = compiled(planned, topology)
    print(page(planned))
    if file is None:
        return
    best = fit(planned, topology, compile=found)
    try:
        Path(file).write_text(recipe(best, origins, topology), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--fit cannot write {file}: {error.strerror}. Name another file.") from error
    print(f"\nThe fastest that fits: {in_flags(best.changes)}. The recipe is in {file}.")


def _complete(config: RunConfig, base: ModelConfig | None, stored: ModelConfig | None) -> tuple[RunConfig, ModelConfig]:
    """The run with the length of its sequences, and its model with a vocabulary, from the tokenizer and not from data."""
    if base is not None:
        length = config.data.max_tokens or config.model.context or base.context
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_tokens=length))
    vocabulary = stored.vocab_size if stored is not None else _vocabulary(config)
    return config, architecture(config.model, base, vocab_size=vocabulary)


def _vocabulary(config: RunConfig) -> int:
    from consyn_jax.data.store import TokenStore, is_store
    from consyn_jax.tokenization import load_tokenizer

    spec = config.data.tokenizer
    stores = [path for path in map(Path, config.data.data) if is_store(path)]
    if spec is None and stores:
        return TokenStore(stores[0]).vocab_size
    if spec is not None and spec.startswith("train:"):
        return int(spec.removeprefix("train:"))
    return load_tokenizer(spec or "default").vocab_size


def describe(trainer: ConsynTrainer) -> None:
    """Print what the run is, and the page for this machine; of devices that are not in the table of GPUs, only what a step needs of them."""
    from consyn_jax.planning.page import memory_here, page
    from consyn_jax.planning.plan import plan_here

    trainer.describe()
    here = plan_here(trainer)
    print(memory_here(trainer) if here is None else page(here))
