"""The decoder language model."""

from consyn_jax.model.causal_lm import ConsynLMHeadModel

__all__ = ["ConsynLMHeadModel"]
