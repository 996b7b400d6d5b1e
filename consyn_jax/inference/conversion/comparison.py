"""Compare the logits of a written model with its source's logits."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from consyn_jax.errors import UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.parameters import Params
from consyn_jax.model_config import ModelConfig

ROWS, LENGTH = 2, 64  # shape of the ids whose logits are compared
# Largest accepted relative difference of the logits (ratio of root mean squares). Rounding to these
# types changes a weight by up to 2^-24, 2^-11, 2^-8 and 2^-7, and the errors add up over layers. A
# lost or misplaced tensor gives a difference near 1.
TOLERANCE = {"float32": 1e-5, "float16": 0.02, "bfloat16": 0.15, "q8_0": 0.15}


def probe_logits(config: ModelConfig, params: Params) -> np.ndarray:
    """Compute float32 logits [B, T, V] of fixed random ids."""
    length = min(LENGTH, config.context)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, length), np.int32)

    @jax.jit
    def forward(params: Params, ids: jax.Array) -> jax.Array:
        return ConsynLMHeadModel.from_parameters(config, params)(ids)

    return np.asarray(forward(params, jnp.asarray(ids)))


def check_logits(before: np.ndarray, after: np.ndarray, dtype: str, where: Path) -> float:
    """Check that a written model's logits agree with the source's.

    Args:
        dtype: A key of `TOLERANCE`.
        where: Path of the written model, for the message.

    Returns:
        The relative difference.

    Raises:
        UserError: The logits differ too much, or the source's logits are not finite.
    """
    if not np.isfinite(before).all():
        raise UserError(
            "The model's logits are not finite, so its conversion cannot be checked. Convert "
            "an earlier checkpoint."
        )
    size = float(np.sqrt(np.mean(np.square(before, dtype=np.float64))))
    apart = float(np.sqrt(np.mean(np.square(after.astype(np.float64) - before))))
    share = apart / max(size, 1e-30)
    if not share <= TOLERANCE[dtype]:  # also refuses NaN
        raise UserError(
            f"{where} was not written: the logits of the new files have a relative error of "
            f"{share:.2g}, but {dtype} allows only {TOLERANCE[dtype]:g}; the source model is "
            "unchanged. Try another disk or machine, and report a defect if it happens again."
        )
    return share
