"""Check the user's callback classes before slow work."""

from __future__ import annotations

from consyn_jax.config import RunConfig


def check_backends(config: RunConfig, origins: dict[str, str]) -> None:
    """Import the user's callback classes in `--logging_backend`.

    Raises:
        UserError: a class cannot be imported, or is not a callback.
    """
    if any(":" in name for name in config.logging.logging_backend):
        from consyn_jax.training.logging.tracking.backends import load_classes

        load_classes(config.logging.logging_backend, origins["logging_backend"])
