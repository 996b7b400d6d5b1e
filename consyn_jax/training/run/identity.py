"""Compare the config.yaml of an existing run with the run that is starting."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from consyn_jax.config import RunConfig
from consyn_jax.config_file import DERIVED, LARGEST
from consyn_jax.errors import UserError, parse_fault
from consyn_jax.files import read_whole
from consyn_jax.flags import flags, flat
from consyn_jax.resolve import resolve
from consyn_jax.training.run.directory import CONFIG, run_path

# Flags that determine the learning rate at each step. The rate also depends on the number of steps,
# which is among the derived values in config.yaml.
SCHEDULE_FLAGS = {
    "epochs",
    "max_steps",
    "total_tokens",
    "lr",
    "scheduler",
    "warmup_ratio",
    "warmup_steps",
    "min_lr_ratio",
    "num_cycles",
    "power",
    "decay_ratio",
    "decay_shape",
}
FROM_DATA = {"packing", "max_tokens"}
# Further derived values: the config.json and generation_config.json of the model. They make it
# possible to read a checkpoint even if the directory in --model or --checkpoint is gone. They need
# no comparison, because the flags are compared.
ARCHITECTURE, GENERATION = "architecture", "generation_config"
# Values that follow from flags and data, with their names in messages.
DERIVED_NAMES = {
    "data": "the training data",
    "validation": "the validation data",
    "tokenizer": "the tokenizer",
    "sequences_per_step": "batch_size x gradient_accumulation_steps",
    "vocab_size": "the vocabulary",
    "weights": "the initial weights",
    "requests": "the requests of --eval_requests, by which the best model is selected,",
}


def describe_derived(derived: dict[str, Any]) -> dict[str, str]:
    """Rename derived values for messages, and shorten hashes."""
    names = DERIVED_NAMES | {"total_steps": "the number of steps"}
    return {names[key]: str(value)[:16] for key, value in derived.items() if key in names}


def read_run_config(file: Path, remedy: str = "Name another --output.") -> dict[str, Any]:
    """Read the config.yaml of a run.

    Args:
        remedy: Advice for a file that cannot be read.

    Raises:
        UserError: The file cannot be read, or is not the config.yaml of a run.
    """
    try:
        old = yaml.safe_load(read_whole(file, LARGEST).decode())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}. {remedy}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} {parse_fault(error, 'YAML')}, so this run cannot be identified. {remedy}"
        ) from error
    if not isinstance(old, dict) or not isinstance(old.get(DERIVED), dict):
        raise UserError(f"{file} is not the configuration of a run. {remedy}")
    return old


def differences(
    old: dict[str, Any], config: RunConfig, derived: dict[str, Any] | None
) -> list[str]:
    """Describe the differences between a run with the config.yaml `old` and this run.

    Settings that do not affect the result of training are ignored. `check_schedule` compares the
    learning rates.
    """
    # YAML has no tuples
    new = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in flat(config).items()
    }
    found = [
        f"--{name} was {old[name]} and is {new[name]}"
        for name, flag in flags(RunConfig).items()
        if flag.math
        and name in old
        and name not in SCHEDULE_FLAGS
        and name != "packing"
        and old[name] != new[name]
        # Values that follow from the data are unknown until the data is read.
        and not (derived is None and new[name] is None and name in FROM_DATA)
    ]
    found += _packing_differences(old, new, derived or {})
    if derived is None:
        return found
    for key, name in DERIVED_NAMES.items():
        if key == "weights" and not (key in derived and key in old[DERIVED]):
            continue  # an older run, or one without initial weights of its own
        before, now = old[DERIVED].get(key), derived.get(key)
        if before != now:
            is_hash = isinstance(now, str) or isinstance(before, str)
            found.append(f"{name} changed" if is_hash else f"{name} was {before} and is {now}")
    return found


def _packing_differences(
    old: dict[str, Any], new: dict[str, Any], derived: dict[str, Any]
) -> list[str]:
    """Compare the packing of sequences in the config.yaml `old` and in this run.

    If --packing is not given, a run records its packing among the derived values. Older runs
    recorded the flag's default, `cut`, instead.
    """
    before = old.get("packing") or old[DERIVED].get("packing")
    now = new["packing"] or derived.get("packing")
    if before is None or now is None or before == now:
        return []
    how = "" if new["packing"] else f", which --packing {before} keeps"
    return [f"--packing was {before} and is {now}{how}"]


def recorded_schedule(old: dict[str, Any]) -> tuple[Callable[[Any], Any], int]:
    """Return the learning-rate schedule and the number of steps that the config.yaml `old` sets."""
    from consyn_jax.training.optim.schedules import build_schedule

    known = flags(RunConfig)
    config, _ = resolve(
        {}, {name: value for name, value in old.items() if name in known}, file_name=CONFIG
    )
    total = old[DERIVED]["total_steps"]
    return build_schedule(config.optimizer, total), total


def check_schedule(
    old: dict[str, Any], config: RunConfig, derived: dict[str, Any], step: int
) -> None:
    """Check that resuming at `step` does not change the schedule of the config.yaml `old`.

    Raises:
        UserError: The learning rates differ and --overwrite_schedule is not set, or the run has
            already passed its new last step.
    """
    from consyn_jax.training.optim.schedules import build_schedule

    (before, old_total), total = recorded_schedule(old), derived["total_steps"]
    after = build_schedule(config.optimizer, total)
    if total == old_total and all(
        math.isclose(before(s), after(s), rel_tol=1e-6)
        for s in range(0, total, max(1, total // 1000))
    ):
        return
    if total < step:
        raise UserError(
            f"The run in {run_path(config)} is already at step {step:,}, past the {total:,} steps "
            "requested. Request more steps, or name another --output."
        )
    if config.saving.overwrite_schedule:
        return
    changed = [
        f"--{name} was {old[name]} and is {value}"
        for name, value in flat(config).items()
        if name in SCHEDULE_FLAGS and name in old and old[name] != value
    ]
    raise UserError(
        f"--output {run_path(config)} holds a run with another schedule: {'; '.join(changed)}; "
        f"the learning rate would change from {float(before(step)):.3g} to "
        f"{float(after(step)):.3g} at step {step:,} of {total:,}, and from "
        f"{float(before(old_total - 1)):.3g} to {float(after(total - 1)):.3g} at the end. Use the "
        "old values, name another directory, or add --overwrite_schedule to change the schedule."
    )
