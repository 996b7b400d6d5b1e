"""The directory of a study: names of its entries, and checks before a study uses it."""

from __future__ import annotations

from pathlib import Path

from consyn_jax.errors import UserError
from consyn_jax.files import remove
from consyn_jax.training.logging.metrics import FILE_NAME
from consyn_jax.training.run.directory import CONFIG
from consyn_jax.training.run.lock import check_free, is_held
from consyn_jax.training.run.opening import check_writable

STUDY, TRIALS_DIRECTORY, PAGE, RECIPE, BEST = "study", "trials", "study.html", "recipe.yaml", "best"
CLAIMS = "claims"  # directory in `STUDY` with a lock for each trial
JOURNAL = "journal.log"  # file in `STUDY` with Optuna's record of the trials


def check_output(output: Path, overwrite: bool) -> None:
    """Check that a directory is free for a study, or already has one.

    Raises:
        UserError: the directory has a run, or cannot be created; or `overwrite` is True, and
            another process uses the directory.
    """
    check_writable(output)
    if (output / CONFIG).exists() or (output / FILE_NAME).exists():
        raise UserError(
            f"--output {output} contains a run of consyn-train, but a study needs its own "
            "directory. Give another directory."
        )
    claims = output / STUDY / CLAIMS
    if overwrite and claims.is_dir():
        for place in sorted(claims.iterdir()):
            if is_held(place):
                check_free(place)


def delete_study(output: Path) -> None:
    """Delete the files of a study from its directory; other files stay."""
    for name in (PAGE, RECIPE, TRIALS_DIRECTORY, STUDY):
        remove(output / name)
