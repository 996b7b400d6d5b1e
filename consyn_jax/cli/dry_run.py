"""`consyn-train --dry_run`: describe a run, its memory and its time, here or on other devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from consyn_jax.cli.choices.model_choice import ModelChoice, with_sequence_length
from consyn_jax.config import RunConfig, architecture
from consyn_jax.errors import UserError

if TYPE_CHECKING:
    from consyn_jax.training.trainer import ConsynTrainer


def plan(config: RunConfig, origins: dict[str, str], choice: ModelChoice) -> None:
    """Print the plan for the GPUs of `--topology`, and write the recipe that `--fit` finds.

    Neither data nor devices are accessed.

    Raises:
        UserError: the topology, mesh or batch is impossible; or `--fit` finds nothing that fits.
    """
    from consyn_jax.planning.aot import packages_are_there
    from consyn_jax.planning.plan import compiled, estimate, fit
    from consyn_jax.planning.plan_page import page
    from consyn_jax.planning.plan_recipe import in_flags, recipe
    from consyn_jax.planning.topology import parse_topology

    topology, file = config.hardware.topology, config.hardware.fit
    if topology is None:
        raise UserError(
            "--fit needs --topology, the devices to fit: h200:1x8 is one host with eight H200."
        )
    machine = parse_topology(topology)
    found = packages_are_there(machine.compiler)
    if file is not None and Path(file).exists():
        raise UserError(f"--fit would overwrite {file}. Name another file for the recipe.")
    config = with_sequence_length(config, choice.base)
    vocab_size = _vocabulary(config) if choice.stored is None else choice.stored.vocab_size
    model = architecture(config.model, choice.base, vocab_size=vocab_size)
    planned = estimate(model, config, machine)
    if found:
        planned = compiled(planned, topology)
    print(page(planned, assumptions=config.hardware.verbose))
    if file is None:
        return
    best = fit(planned, topology, compile=found)
    try:
        Path(file).write_text(recipe(best, origins, topology), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--fit cannot write {file}: {error.strerror}. Name another file."
        ) from error
    rank = "simplest" if best.plan.time is None else "fastest"
    print(f"\nThe {rank} that fits: {in_flags(best.changes)}. The recipe is in {file}.")


def _vocabulary(config: RunConfig) -> int:
    """Find the vocabulary size of `--tokenizer` or of the token store without reading text."""
    from consyn_jax.data.store import TokenStore
    from consyn_jax.data.store.manifest import is_store
    from consyn_jax.tokenization import load_tokenizer

    spec = config.data.tokenizer
    stores = [path for path in map(Path, config.data.data) if is_store(path)]
    if spec is None and stores:
        return TokenStore(stores[0]).vocab_size
    if spec is not None and spec.startswith("train:"):
        return int(spec.removeprefix("train:"))
    return load_tokenizer(spec or "default").vocab_size


def describe(trainer: ConsynTrainer) -> None:
    """Print a description of the run, and its plan on this machine.

    For a device that is not in the table of GPUs, only the memory of a step is printed.
    """
    from consyn_jax.planning.plan import plan_here
    from consyn_jax.planning.plan_page import memory_here, page

    trainer.describe()
    here = plan_here(trainer)
    assumptions = trainer.run.hardware.verbose
    print(memory_here(trainer) if here is None else page(here, assumptions=assumptions))
