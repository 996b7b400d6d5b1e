"""The directory of a study: names of its entries, and checks before a study uses it."""

from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path

from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError, leave_out_overwrite
from consyn_jax.files import remove
from consyn_jax.flags import flat
from consyn_jax.training.logging.metrics import FILE_NAME
from consyn_jax.training.run.directory import CONFIG, found_study
from consyn_jax.training.run.identity import SCHEDULE_FLAGS, differences, read_run_config
from consyn_jax.training.run.lock import check_free, is_held
from consyn_jax.training.run.opening import check_writable

STUDY, TRIALS_DIRECTORY, PAGE, RECIPE = "study", "trials", "study.html", "recipe.yaml"
CLAIMS = "claims"  # directory in `STUDY` with a lock for each trial
JOURNAL = "journal.log"  # file in `STUDY` with Optuna's record of the trials


def check_output(output: Path, overwrite: bool) -> None:
    """Check that a directory is free for a study, or already has one.

    Raises:
        UserError: the directory contains a run, is inside a study, or cannot be created. With
            `overwrite`, also if another process uses the directory.
    """
    check_writable(output)
    if (output / CONFIG).exists() or (output / FILE_NAME).exists():
        raise UserError(
            f"--output {output} contains a run of consyn-train, but a study needs its own "
            "directory. Give another directory."
        )
    if (kind := found_study(around := output.resolve().parent)) is not None:
        raise UserError(
            f"--output {output} is inside {around}, which contains {kind}. A study needs its own "
            "directory: name another --output."
        )
    claims = output / STUDY / CLAIMS
    if overwrite and claims.is_dir():
        for place in sorted(claims.iterdir()):
            if is_held(place):
                check_free(place)


def best_directory(output: Path, number: int, run: RunConfig) -> Path:
    """The directory in which the recipe of the best trial trains, named by the trial's number.

    If a run with other flags is there, a second number is added to the name. Such a run may be the
    user's own, or come from a deleted study.

    Args:
        run: the run of the recipe.
    """
    path, following = output / f"best-{number:04}", itertools.count(2)
    while (path / CONFIG).exists() and not _repeats(path, run):
        path = output / f"best-{number:04}-{next(following)}"
    return path


def _repeats(path: Path, run: RunConfig) -> bool:
    """Whether the flags of `run` would continue the run in a directory."""
    with suppress(UserError):  # its config.yaml is damaged
        old, new = read_run_config(path / CONFIG), flat(run)
        is_same_schedule = all(old.get(name) == new[name] for name in SCHEDULE_FLAGS)
        return is_same_schedule and not differences(old, run, None)
    return False


def delete_study(output: Path) -> None:
    """Delete the files of a study from its directory, for `--overwrite`; other files stay."""
    for name in (PAGE, RECIPE, TRIALS_DIRECTORY, STUDY):
        remove(output / name)
    leave_out_overwrite()
