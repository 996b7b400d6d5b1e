"""The flags of `consyn-train` that inspect an existing run instead of training."""

from __future__ import annotations

from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError

QUESTIONS = ("verify", "replay_step", "documents_of")


def asked(config: RunConfig, mode: str) -> str | None:
    """Return the inspection flag on the command line; None if there is none.

    Raises:
        UserError: the command line has several inspection flags, an inspection flag and a mode, or
            --json without an inspection flag.
    """
    found = [name for name in QUESTIONS if getattr(config.proof, name) is not None]
    if config.proof.json and not found:
        raise UserError(
            "--json needs --documents_of, --replay_step or --verify. Add one of these flags."
        )
    if len(found) + bool(mode) > 1 and found:
        other = mode or found[1]
        raise UserError(
            f"--{found[0]} and --{other} do not work together. Leave one of the two flags out."
        )
    return found[0] if found else None
