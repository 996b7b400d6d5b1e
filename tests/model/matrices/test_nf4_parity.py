"""NF4 compared with bitsandbytes, bit by bit."""

import bitsandbytes.functional
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from consyn_jax.model.matrices.quantised_matrix import normal_floats

pytestmark = pytest.mark.slow


def test_codes_and_factors_are_those_of_bitsandbytes() -> None:
    w_IO = np.asarray(jax.random.normal(jax.random.key(1), (192, 40)))
    found = normal_floats(jnp.asarray(w_IO), 1)
    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.tensor(w_IO.T.copy()), blocksize=64, quant_type="nf4"
    )
    # Here [blocks, 32, outputs], there the blocks of each output after one another.
    codes = np.asarray(found.codes).transpose(2, 0, 1).reshape(-1)
    np.testing.assert_array_equal(codes, packed.numpy().reshape(-1))
    np.testing.assert_array_equal(np.asarray(found.largest).T.reshape(-1), state.absmax.numpy())
    dense = bitsandbytes.functional.dequantize_4bit(packed, state).numpy().T
    np.testing.assert_array_equal(found.dense(jnp.float32), dense)
