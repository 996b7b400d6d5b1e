"""Training: turn a model, data and settings into a trained model.

`ConsynTrainer` is imported lazily, on first access, so that data can be prepared without JAX.
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
