"""The FLOPs of a model, which MFU and plans are made of, against those that XLA counts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from consyn_jax.model.arithmetic import query_blocks, train_flops_per_token
from consyn_jax.model.transformer import Compute, Decoder
from consyn_jax.model_config import ModelConfig
from consyn_jax.resolve import preset_architecture


def counted(config: ModelConfig, length: int, *, compiled: bool = False) -> float:
    """FLOPs that XLA's cost analysis finds in forward and backward pass of one sequence.

    A loop's body counts once there, so the blocks are unrolled and the loss is not in chunks.

    Args:
        compiled: count in the optimised program.
    """
    graphdef, parameters = nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))

    def loss(parameters: nnx.State, ids_BT: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, parameters)
        hidden_BTD = model.hidden(ids_BT, None, Compute(unroll=True))
        logits_BTV = (hidden_BTD @ model.head_VD.T)[..., : config.vocab_size]
        log_shares_BTV = jax.nn.log_softmax(logits_BTV)
        return jnp.take_along_axis(log_shares_BTV, ids_BT[..., None], -1).sum()

    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    lowered = jax.jit(jax.grad(loss)).lower(parameters, ids)
    found = (lowered.compile() if compiled else lowered).cost_analysis()
    return float((found[0] if isinstance(found, list) else found)["flops"])


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["haiku", "verse", "stanza", "epic"])
def test_flops_of_each_preset_agree_with_the_compilers(preset: str) -> None:
    """Within 2 %, at the preset's own context: XLA also counts norms, softmax and activations.

    The plain attention that XLA counts computes more than half of the square of scores (`blocks`),
    and ours half of it, as the kernels do; the rest is added here. All blocks are alike, so two models tell the
    FLOPs of any depth.
    """
    config = preset_architecture(preset)
    length = config.context
    one, two = (counted(replace(config, num_layers=n), length) for n in (1, 2))
    by_compiler = one + (config.num_layers - 1) * (two - one)
    heads = config.num_layers * config.num_heads * config.head_dim
    blocks = query_blocks(length)
    ours = length * (train_flops_per_token(config, length) + 6 * length * heads / blocks)
    assert 1 <= by_compiler / ours < 1.02


@pytest.mark.slow
def test_the_optimised_program_has_the_same_flops() -> None:
    config = replace(preset_architecture("haiku"), num_layers=2)
    optimised = counted(config, 512, compiled=True)
    assert optimised == pytest.approx(counted(config, 512), rel=0.01)
