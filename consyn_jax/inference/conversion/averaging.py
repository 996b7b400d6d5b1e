"""Average the weights of several checkpoints of a run (Izmailov et al., 2018)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from consyn_jax.errors import UserError, listed
from consyn_jax.inference.model_source import ModelSource, find_source
from consyn_jax.inference.run_models import is_run, run_steps
from consyn_jax.integers import natural
from consyn_jax.model.parameters import Params


def chosen_steps(run: Path, spec: str) -> list[int]:
    """Return the steps of the checkpoints that `--average` selects: the newest N, or listed steps.

    Raises:
        UserError: The value is neither a number nor a list of steps, or the run lacks a step.
    """
    numbers = [natural(part.strip()) for part in spec.split(",")]
    if not numbers or any(number is None for number in numbers):
        raise UserError(
            f"--average {spec} is neither a number of checkpoints nor a list of steps (of at "
            "most 15 digits each). Give, for example, 5 or 100,200,300."
        )
    if not is_run(run):
        raise UserError(
            f"--average needs the checkpoints of a run, and {run} is not a run. Give the directory "
            "of a run."
        )
    steps, given = run_steps(run), [number for number in numbers if number is not None]
    known = ", ".join(map(str, steps)) or "none"
    if len(given) == 1 and given[0] < 2:
        what = "is one checkpoint" if given[0] else "averages nothing"
        raise UserError(f"--average {spec} {what}. Use --step for a single checkpoint.")
    if len(given) == 1:
        if given[0] > len(steps):
            raise UserError(
                f"--average {spec}: {run} has fewer checkpoints (steps: {known}). Give a smaller "
                "number."
            )
        return steps[-given[0] :]
    missing = [step for step in given if step not in steps]
    if missing or len(set(given)) < len(given):
        wrong = (
            f"there is no checkpoint of step {listed(missing)}"
            if missing
            else "a step is given twice"
        )
        raise UserError(f"--average {spec}: {wrong}. {run} has checkpoints of steps {known}.")
    return given


def averaged_source(name: str, spec: str) -> ModelSource:
    """Make a source whose weights are the float32 mean of several checkpoints.

    Raises:
        UserError: `spec` is wrong, or the run lacks a step. The source's `load` raises the same
            error if a checkpoint is damaged.
    """
    steps = chosen_steps(Path(name), spec)
    sources = [find_source(name, step) for step in steps]

    def load(mesh: Mesh | None, dtype: Any) -> Params:
        total = sources[0].parameters(mesh)
        for source in sources[1:]:
            total = _add(total, source.parameters(mesh))
        return jax.tree.map(lambda leaf: (leaf / len(sources)).astype(dtype), total)

    listing = listed([f"{step:,}" for step in steps], 8)
    taken = f"the mean of steps {listing} of the run {name}"
    return replace(sources[-1], taken=taken, load=load, step=steps[-1])


@jax.jit
def _add(total: Params, more: Params) -> Params:
    return jax.tree.map(jnp.add, total, more)
