"""One run, one directory: may this run use it, does it go on, and what does it say of itself."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from consyn_jax.config import RunConfig, UserError, flags, flat
from consyn_jax.distributed.peers import Peers, current_peers
from consyn_jax.resolve import resolve
from consyn_jax.training.checkpoint_files import saved_steps
from consyn_jax.training.config_file import DERIVED, describe
from consyn_jax.training.run_lock import RunLock, read_holder
from consyn_jax.validation import natural

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
ENTRIES: tuple[str, ...] = (CONFIG, "metrics.jsonl", "tokenizer", CHECKPOINTS, "best", "final", "logs", "profile", "report.html", "loss.png", "schedule.png")
ENTRIES += ("stacks", "nonfinite", "wandb")

# What the rate at each step follows from; all of it beside the number of steps, which is derived.
SCHEDULE = {"epochs", "max_steps", "total_tokens", "lr", "scheduler", "warmup_ratio", "warmup_steps", "min_lr_ratio", "num_cycles", "power"}
SCHEDULE |= {"decay_ratio", "decay_shape"}

OF_ONE_START = ("overwrite", "overwrite_schedule", "resume", "replay", "distributed", "coordinator_address", "num_processes", "process_id")
SHARED_S = 20.0  # until other hosts see a new file, at the latest

DERIVED_NAMES = {
    "data": "the training data",
    "validation": "the validation data",
    "tokenizer": "the tokenizer",
    "sequences_per_step": "batch_size x gradient_accumulation_steps",
    "vocab_size": "the vocabulary",
}


@dataclass(frozen=True)
class RunDirectory:
    """A directory that this run, and no other process, may write to until it is closed.

    Attributes:
        holds_run: a run of the same mathematics is in it, begun earlier.
    """

    path: Path
    holds_run: bool
    lock: RunLock | None = None

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / CHECKPOINTS

    def write_config(self, config: RunConfig, origins: dict[str, str], derived: dict[str, Any]) -> None:
        """Write config.yaml, whole or not at all: every value with its origin; `consyn-train --config` reads it back.

        Raises:
            UserError: the disk refuses it.
        """
        # These speak of one start of the command. A recipe that kept --overwrite would delete the run it came from.
        saving = dataclasses.replace(config.saving, overwrite=False, overwrite_schedule=False, resume="auto")
        hardware = dataclasses.replace(config.hardware, distributed=False, coordinator_address=None, num_processes=None, process_id=None)
        lasting = dataclasses.replace(config, saving=saving, hardware=hardware)
        origins = origins | dict.fromkeys(OF_ONE_START, "default")
        text, fresh = describe(lasting, origins) + yaml.safe_dump({DERIVED: derived}, sort_keys=True), self.path / f".{CONFIG}.new"
        try:
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(self.path / CONFIG)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise UserError(f"{self.path / CONFIG} cannot be written: {error.strerror}. Make room, or name another --output.") from error

    def close(self) -> None:
        """Let other processes write to it."""
        if self.lock is not None:
            self.lock.release()

    def beat(self) -> None:
        """This process is alive; to be said every few seconds."""
        if self.lock is not None:
            self.lock.beat()


def open_run_directory(config: RunConfig, derived: dict[str, Any], *, write: bool = True) -> RunDirectory:
    """The run directory of `config`, made if need be. Of several processes, the first says what it holds.

    Args:
        derived: what the flags and the data come to, see `DERIVED_NAMES`.
        write: this process may create and delete.

    Raises:
        UserError: it holds another run, is in use, cannot be written, or is not the same in all processes.
    """
    path, processes = run_path(config), current_peers()
    if processes is not None and not write:
        return _same_directory(path, processes)
    holds_run = check_output(config, derived)
    if not write:
        return RunDirectory(path, holds_run)
    lock = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(path)
        holds_run = check_output(config, derived)  # again: another process may have used it since
        if config.saving.overwrite:
            _delete_run(path)
    except (OSError, UserError) as error:
        if lock is not None:
            lock.release()
        if isinstance(error, UserError):
            raise
        raise UserError(f"--output {path} cannot be used: {error.strerror}. Name a directory that can be written.") from error
    if processes is not None:
        processes.gather(json.dumps([holds_run, lock.holder]))
    return RunDirectory(path, holds_run, lock)


def _same_directory(path: Path, processes: Peers) -> RunDirectory:
    """The directory that process 0 has opened."""
    holds_run, holder = json.loads(processes.gather("")[0])
    deadline = time.monotonic() + SHARED_S
    while read_holder(path) != holder:
        if time.monotonic() > deadline:
            raise UserError(f"--output {path} is not the same directory here as in process 0. Name one on a file system that all hosts share.")
        time.sleep(0.2)
    return RunDirectory(path, holds_run)


def in_words(derived: dict[str, Any]) -> dict[str, str]:
    """What flags and data come to, for people; digests by their beginning."""
    words = DERIVED_NAMES | {"total_steps": "the number of steps"}
    return {words[key]: str(value)[:16] for key, value in derived.items() if key in words}


def check_output(config: RunConfig, derived: dict[str, Any] | None = None) -> bool:
    """Whether --output holds a run that this one goes on with.

    Args:
        derived: as for `open_run_directory`; before the data is there, None, and only the flags are compared.

    Raises:
        UserError: it holds another run, or cannot be written.
    """
    saving, path = config.saving, run_path(config)
    check_writable(path)
    if config.optimizer.decay_from is not None:
        _check_origin(config, derived)
    file = path / CONFIG
    if not file.is_file() and ((path / "metrics.jsonl").exists() or _saved_steps(path)):
        found = "a metrics.jsonl" if (path / "metrics.jsonl").exists() else CHECKPOINTS
        raise UserError(f"--output {path} holds {found} without a {CONFIG}, so it is not a run of ours. Name another directory.")
    old = _read_run(file) if file.is_file() else None
    if saving.overwrite:
        _check_overwrite(config, path)
        return False
    steps = _saved_steps(path)
    asked = natural(saving.resume)
    if asked is not None and asked not in steps:
        raise UserError(f"--resume {asked}: {path / CHECKPOINTS} has no checkpoint of that step; there are: {', '.join(map(str, steps)) or 'none'}.")
    # What was stopped before its first checkpoint has nothing to lose, so it need not be what is asked for now.
    if old is None or not (steps or (path / "best").exists() or (path / "final").exists()):
        return False
    if saving.resume == "never":
        raise UserError(f"--output {path} already holds a run. Name another directory, go on with --resume auto, or delete it with --overwrite.")
    differences = compare(old, config, derived)
    if differences:
        raise UserError(
            f"--output {path} holds another run: {'; '.join(differences)}. "
            f"Name another directory, take the old values back, or delete that run with --overwrite."
        )
    if derived is not None and steps:
        _check_schedule(old, config, derived, steps[-1] if asked is None else asked)
    return True


def run_path(config: RunConfig) -> Path:
    """The run directory: --output, or beside it that of a run with --decay_from."""
    output, step = Path(config.saving.output), config.optimizer.decay_from
    return output if step is None else output.with_name(f"{output.name}-decay-{step}")


def _check_origin(config: RunConfig, derived: dict[str, Any] | None) -> None:
    """--output must hold the run that --decay_from speaks of, with a checkpoint where its rate was at the peak."""
    path, step = Path(config.saving.output), config.optimizer.decay_from
    if not (path / CONFIG).is_file():
        raise UserError(f"--decay_from {step} goes on from a run, and --output {path} holds none. Give the flags of that run, and its --output.")
    old, steps = _read_run(path / CONFIG), _saved_steps(path)
    if step not in steps:
        raise UserError(f"--decay_from {step}: {path / CHECKPOINTS} has no checkpoint of that step; there are: {', '.join(map(str, steps)) or 'none'}.")
    own = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, decay_from=None))
    differences = compare(old, own, derived)
    if differences:
        raise UserError(f"--output {path} is another run than the one asked to decay: {'; '.join(differences)}. Give the flags that it was begun with.")
    schedule, total = _schedule(old)
    peak = max(float(schedule(s)) for s in range(0, total, max(1, total // 1000)))
    if float(schedule(step)) < 0.999 * peak:
        raise UserError(f"--decay_from {step} is not in the part of the run in {path} where its rate is at the peak of {peak:g}. Take another of {steps}.")


def _check_schedule(old: dict[str, Any], config: RunConfig, derived: dict[str, Any], step: int) -> None:
    """Going on with other rates than the run began with must be what was asked for.

    Args:
        step: to go on from.
    """
    from consyn_jax.training.scheduler import configured_schedule

    (before, old_total), total = _schedule(old), derived["total_steps"]
    after = configured_schedule(config.optimizer, total)
    if total == old_total and all(math.isclose(before(s), after(s), rel_tol=1e-6) for s in range(0, total, max(1, total // 1000))):
        return
    if total < step:
        raise UserError(f"The run in {run_path(config)} is at step {step:,} already, beyond the {total:,} steps asked for. Give more, or another --output.")
    if config.saving.overwrite_schedule:
        return
    values = {name: value for name, value in flat(config).items() if name in SCHEDULE and name in old}
    changed = [f"--{name} was {old[name]} and is {value}" for name, value in values.items() if old[name] != value]
    raise UserError(
        f"--output {run_path(config)} holds a run with another schedule: {'; '.join(changed)}. At step {step:,} of {total:,} the rate would be "
        f"{float(after(step)):.3g} instead of {float(before(step)):.3g}, and at the end {float(after(total - 1)):.3g} instead of "
        f"{float(before(old_total - 1)):.3g}. Add --overwrite_schedule to go on so, name another directory, or take the old values back."
    )


def _schedule(old: dict[str, Any]) -> tuple[Callable[[Any], Any], int]:
    """The learning rate by step, and the number of steps, of the run of a config.yaml."""
    from consyn_jax.training.scheduler import configured_schedule

    config, _ = resolve({}, {name: value for name, value in old.items() if name in flags()}, file_name=CONFIG)
    return configured_schedule(config.optimizer, old[DERIVED]["total_steps"]), old[DERIVED]["total_steps"]


def check_writable(path: Path) -> None:
    """Find out early, and without creating anything, what would go wrong when the directory --output is made.

    Raises:
        UserError: it is a file, lies below one, or may not be written.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {path} is a file. Name a directory.")
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise UserError(f"--output {path} cannot be made: {there} is a file. Name another directory.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--output {path} cannot be written: no permission for {there}. Name another directory.")


def _check_overwrite(config: RunConfig, path: Path) -> None:
    """--overwrite must not delete what the new run is made from."""
    model, data = config.model, config.data
    named: dict[str, tuple[str | None, ...]] = {
        "checkpoint": (model.checkpoint,),
        "model": (model.model,),
        "data": data.data,
        "validation": data.validation,
        "tokenizer": (data.tokenizer,),
    }
    doomed = [(path / entry).resolve() for entry in ENTRIES]
    for flag, values in named.items():
        for value in values:
            if value is not None and any(Path(value).resolve().is_relative_to(entry) for entry in doomed):
                raise UserError(f"--overwrite would delete --{flag} {value}, which lies in --output {path}. Name another directory for the new run.")


def _saved_steps(path: Path) -> list[int]:
    try:
        return saved_steps(path / CHECKPOINTS)
    except OSError as error:
        raise UserError(f"{path / CHECKPOINTS} cannot be read: {error.strerror}. Name another --output.") from error


def _read_run(file: Path) -> dict[str, Any]:
    """The config.yaml of a run."""
    try:
        old = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}. Name another --output.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}), so nobody can say what run this is. Name another --output.") from error
    if not isinstance(old, dict) or not isinstance(old.get(DERIVED), dict):
        raise UserError(f"{file} is not the configuration of a run. Name another --output.")
    return old


def compare(old: dict[str, Any], config: RunConfig, derived: dict[str, Any] | None) -> list[str]:
    """What differs, in words, between the run of config.yaml `old` and this one; only what changes the mathematics counts.

    The number of steps and the schedule are not compared: see `_check_schedule`.
    """
    # YAML has no tuples
    new = {name: list(value) if isinstance(value, tuple) else value for name, value in flat(config).items()}
    compared = [name for name, f in flags().items() if f.math and name in old and name not in SCHEDULE]
    differences = [f"--{name} was {old[name]} and is {new[name]}" for name in compared if old[name] != new[name]]
    if derived is None:
        return differences
    for key, words in DERIVED_NAMES.items():
        before, now = old[DERIVED].get(key), derived.get(key)
        if before != now:
            short = isinstance(now, str) or isinstance(before, str)
            differences.append(f"{words} changed" if short else f"{words} was {before} and is {now}")
    return differences


def _delete_run(path: Path) -> None:
    if not (path / CONFIG).is_file():
        return
    for entry in reversed(ENTRIES):  # config.yaml last: it says, after a kill, that this may be deleted
        target = path / entry
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
