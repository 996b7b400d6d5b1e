"""Training: from a model, data and settings to a trained model.

`ConsynTrainer` is imported on first use, so that data can be prepared without JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consyn_jax.training.trainer import ConsynTrainer

__all__ = ["ConsynTrainer"]


def __getattr__(name: str) -> Any:
    if name == "ConsynTrainer":
        from consyn_jax.training.trainer import ConsynTrainer

        return ConsynTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
