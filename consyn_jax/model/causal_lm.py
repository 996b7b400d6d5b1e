"""`ConsynLMHeadModel`: the decoder with its output layer, as people use it from Python."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from consyn_jax.config import PRESETS, ModelConfig
from consyn_jax.distributed.mesh import constrain
from consyn_jax.model import pretrained
from consyn_jax.model.attention import choose_attention
from consyn_jax.model.parameters import Params, initial_parameters
from consyn_jax.model.transformer import Compute, Decoder
from consyn_jax.resolve import preset_architecture

if TYPE_CHECKING:
    from consyn_jax.tokenization import BPETokenizer


class ConsynLMHeadModel(Decoder):
    """A decoder language model. Build it with `from_config` or `from_pretrained`."""

    def __call__(self, input_ids: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None, compute: Compute | None = None) -> Float[Array, "B T V"]:
        """Logits of the next token, float32, over the vocabulary without its padding.

        Args:
            segment_ids: which document of its row a token belongs to; documents do not see each other. None: one a row.
            compute: dtype, attention kernel and rematerialisation; float32 by default.
        """
        compute = compute or self.default_compute()
        x_BTD = self.hidden(input_ids, segment_ids, compute)
        logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, self.head_VD.astype(compute.dtype), preferred_element_type=jnp.float32)
        return constrain(logits_BTV, "batch", "sequence", "vocab")[..., : self.config.vocab_size]

    def default_compute(self, dtype: Any = jnp.float32) -> Compute:
        """How this process's devices compute best in `dtype`."""
        device = jax.devices()[0]
        capability = getattr(device, "compute_capability", "")
        return Compute(dtype, choose_attention(device.platform, dtype, self.config.head_dim, capability).backend)

    @classmethod
    def from_config(cls, config: ModelConfig | str, seed: int = 42) -> ConsynLMHeadModel:
        """A freshly initialised model of a preset's name or a `ModelConfig`."""
        if isinstance(config, str):
            config = preset_architecture(config)
        return cls.from_parameters(config, initial_parameters(config, seed))

    @classmethod
    def from_parameters(cls, config: ModelConfig, params: Params) -> ConsynLMHeadModel:
        """A model around parameters that exist."""
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: cls(config, nnx.Rngs(0))))
        return nnx.merge(graphdef, params)

    @classmethod
    def from_pretrained(cls, name: str | Path, seed: int = 42) -> ConsynLMHeadModel:
        """The model in a directory or of a hub id. A bare preset name has no published weights: it comes initialised, with a warning.

        Raises:
            UserError: no such model, or one that this decoder does not cover.
        """
        if str(name) in PRESETS and not Path(name).is_dir():
            warnings.warn(
                f"NO PRETRAINED WEIGHTS: {name!r} names an architecture, and no weights are published for it. The model is freshly "
                f"initialised (seed {seed}) and must be trained. ConsynLMHeadModel.from_config({str(name)!r}) does the same without this warning.",
                UserWarning,
                stacklevel=2,
            )
            return cls.from_config(str(name), seed)
        directory = pretrained.find_model(str(name))
        config = pretrained.read_config(directory)
        return cls.from_parameters(config, pretrained.load_parameters(directory, config))

    @property
    def parameters(self) -> Params:
        """The parameters as a nested dict of arrays."""
        return nnx.to_pure_dict(nnx.split(self)[1])

    def save_pretrained(self, directory: str | Path, tokenizer: BPETokenizer | None = None) -> None:
        """Write config.json, generation_config.json, model.safetensors and, when given, the tokenizer."""
        pretrained.save_parameters(Path(directory), self.config, self.parameters)
        if tokenizer is not None:
            tokenizer.save(Path(directory))

    def generate(self, input_ids: Int[Array, "B T"], max_new_tokens: int = 128, **sampling: Any) -> Int[Array, "B S"]:
        """Continue `input_ids` (no padding) by up to `max_new_tokens` tokens; see `generation.generate` for the sampling arguments."""
        from consyn_jax.model.generation import generate

        return generate(self, input_ids, max_new_tokens, **sampling)
