"""The decoder language model. `ConsynLMHeadModel` is imported lazily, on first access."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consyn_jax.model.causal_lm import ConsynLMHeadModel

__all__ = ["ConsynLMHeadModel"]


def __getattr__(name: str) -> Any:
    if name == "ConsynLMHeadModel":
        from consyn_jax.model.causal_lm import ConsynLMHeadModel

        return ConsynLMHeadModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
