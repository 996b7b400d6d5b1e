from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from consyn_jax.config import REMAT_POLICIES
from consyn_jax.model import attention
from consyn_jax.model.attention import Backend
from consyn_jax.model.parameters import layout
from consyn_jax.model.rematerialisation import POLICIES
from consyn_jax.model.transformer import Compute, Decoder
from consyn_jax.model_config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=32,
    context=16,
)


def test_every_value_of_gradient_checkpointing_has_a_policy() -> None:
    assert ("none", *POLICIES) == REMAT_POLICIES


def primitives(jaxpr: Any) -> Iterator[str]:
    """Names of all operations, those of inner functions included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jaxprs_in_params(equation.params):
            yield from primitives(inner)


@pytest.mark.parametrize(
    ("remat", "times"), [("none", 1), ("minimal", 1), ("attention", 1), ("offload", 1), ("full", 2)]
)
def test_a_new_attention_backend_is_recomputed_only_by_full(
    remat: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that names nothing itself; its `cosh` has a derivative without `cosh`."""
    backend = Backend(lambda q, *_: jnp.cosh(q), lambda *_: None, "a third one")
    monkeypatch.setitem(attention.BACKENDS, "third", backend)
    form, compute = layout(CONFIG), Compute(attention="third", remat=remat)

    def loss(params: Any) -> jax.Array:
        model: Decoder = nnx.merge(form.graphdef, params)
        return jnp.sum(model.hidden(jnp.zeros((1, 16), jnp.int32), None, compute))

    traced = jax.make_jaxpr(jax.grad(loss))(form.shapes)
    assert list(primitives(traced.jaxpr)).count("cosh") == times
