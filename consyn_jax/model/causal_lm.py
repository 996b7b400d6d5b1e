"""`ConsynLMHeadModel`: the decoder with its output layer, for use from Python."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from consyn_jax.config import PRESETS
from consyn_jax.distributed.mesh import constrain
from consyn_jax.model.attention import choose_attention
from consyn_jax.model.generation.continuation import generate
from consyn_jax.model.given_values import (
    check_destination,
    check_tokenizer,
    checked_compute,
    checked_config,
    checked_ids,
    checked_seed,
)
from consyn_jax.model.parameters import Params, initial_parameters
from consyn_jax.model.pretrained.config_json import to_hf_config
from consyn_jax.model.pretrained.inspection import read_checkpoint
from consyn_jax.model.pretrained.weights import find_model, load_parameters, save_parameters
from consyn_jax.model.transformer import Compute, Decoder
from consyn_jax.model_config import ModelConfig
from consyn_jax.optimizer_config import BaseShape
from consyn_jax.resolve import preset_architecture

if TYPE_CHECKING:
    from consyn_jax.tokenization import BPETokenizer


class ConsynLMHeadModel(Decoder):
    """A decoder language model. Build it with `from_config` or `from_pretrained`.

    Attributes:
        source: The directory that the weights were loaded from; None for new weights.
    """

    source: Path | None = None

    def __call__(
        self,
        input_ids: Any,
        segment_ids: Any = None,
        compute: Compute | None = None,
    ) -> Float[Array, "B T V"]:
        """Compute the float32 logits of the next token, without the vocabulary's padding.

        Args:
            input_ids: Token ids [B, T], as an array of any library or as lists. Under `jax.jit`,
                the values are not checked.
            segment_ids: Number of each token's document, [B, T]; tokens attend only within their
                document. None if each row is one document.
            compute: The dtype and kernels; by default float32 and the device's fastest kernels.

        Raises:
            UserError: An id is outside the vocabulary, or the rows have unequal lengths.
        """
        compute = checked_compute(compute) or self.default_compute()
        ids_BT, segments_BT = checked_ids(input_ids, segment_ids, self.config.vocab_size)
        x_BTD = self.hidden(ids_BT, segments_BT, compute)
        logits_BTV = jnp.einsum(
            "BTD,VD->BTV",
            x_BTD,
            self.head_VD.astype(compute.dtype),
            preferred_element_type=jnp.float32,
        )
        return constrain(logits_BTV, "batch", "sequence", "vocab")[..., : self.config.vocab_size]

    def default_compute(self, dtype: Any = jnp.float32) -> Compute:
        """Settings of the fastest forward pass in `dtype` on this process's devices."""
        device = jax.devices()[0]
        capability = getattr(device, "compute_capability", "")
        choice = choose_attention(device.platform, dtype, self.config.head_dim, capability)
        return Compute(dtype, choice.backend)

    @classmethod
    def from_config(
        cls, config: ModelConfig | str, seed: int = 42, base: BaseShape | None = None
    ) -> ConsynLMHeadModel:
        """Build a model with new, untrained weights.

        Args:
            config: The architecture, or the name of a preset.
            seed: Seed of the initial weights.
            base: Shape of muP's base model, for training with `parametrization="mup"`.

        Raises:
            UserError: `config` is neither a preset's name nor a `ModelConfig`, or `seed` is not a
                whole number of at least 0.
        """
        made = preset_architecture(config) if isinstance(config, str) else checked_config(config)
        params = initial_parameters(made, checked_seed(seed), base=base)
        return cls.from_parameters(made, params)

    @classmethod
    def from_parameters(cls, config: ModelConfig, params: Params) -> ConsynLMHeadModel:
        """Build a model of the architecture `config` with the parameters `params`."""
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: cls(config, nnx.Rngs(0))))
        return nnx.merge(graphdef, params)

    @classmethod
    def from_pretrained(cls, name: str | Path, seed: int = 42) -> ConsynLMHeadModel:
        """Load a model from a directory, or from the Hugging Face hub by its id.

        For the name of a preset, return an untrained model and warn, because no weights are
        published for presets.

        Raises:
            UserError: There is no such model, or this decoder does not support it.
        """
        if str(name) in PRESETS and not Path(name).is_dir():
            warnings.warn(
                f"NO PRETRAINED WEIGHTS: {name!r} names an architecture, and no weights are "
                f"published for it. The model is freshly initialised (seed {seed}) and must be "
                f"trained. To avoid this warning, call "
                f"ConsynLMHeadModel.from_config({str(name)!r}).",
                UserWarning,
                stacklevel=2,
            )
            return cls.from_config(str(name), seed)
        directory = find_model(str(name))
        config = read_checkpoint(directory)
        model = cls.from_parameters(config, load_parameters(directory, config))
        model.source = directory
        return model

    @property
    def tokenizer(self) -> BPETokenizer | None:
        """The tokenizer in the directory of the weights; None if there is none."""
        from consyn_jax.tokenization import own_tokenizer

        return None if self.source is None else own_tokenizer(self.source)

    @property
    def parameters(self) -> Params:
        """The parameters as a nested dict of arrays."""
        return nnx.to_pure_dict(nnx.split(self)[1])

    def take_over(self, params: Params) -> None:
        """Replace the values of the parameters with `params`.

        The parameters keep their dtypes and shardings, with one exception: a parameter that is
        split over several processes gets the sharding of its new value.
        """

        def like(value: jax.Array, old: jax.Array) -> jax.Array:
            value = value.astype(old.dtype)
            is_here = value.is_fully_addressable and old.sharding.is_fully_addressable
            return jax.device_put(value, old.sharding) if is_here else value

        nnx.update(self, jax.tree.map(like, params, self.parameters))

    def save_pretrained(
        self,
        directory: str | Path,
        tokenizer: BPETokenizer | None = None,
        dtype: str | None = None,
    ) -> None:
        """Write the configuration, the weights as safetensors, and the tokenizer if given.

        Args:
            dtype: Number type of the weights in the files: float32, bfloat16 or float16. By default
                the type of the loaded files, or float32 if the weights were not loaded.

        Raises:
            UserError: `directory` is a file, or the tokenizer does not fit this model.
        """
        check_destination(Path(directory))
        check_tokenizer(tokenizer, self.config.vocab_size)
        save_parameters(Path(directory), self.config.saved_as(dtype), self.parameters)
        if tokenizer is not None:
            tokenizer.save(directory, to_hf_config(self.config)["model_type"])

    def generate(
        self, prompts: Any = None, max_new_tokens: int | np.integer = 128, **options: Any
    ) -> Any:
        """Continue `prompts`: ids [B, T], lists of ids, a text, or a list of texts.

        `generation.continuation.generate` documents the options and the result.
        """
        if isinstance(prompts, str):
            return self.generate([prompts], max_new_tokens, **options)[0]
        compute = checked_compute(options.pop("compute", None)) or self.default_compute()
        return generate(self, prompts, max_new_tokens, compute, lambda: self.tokenizer, **options)
