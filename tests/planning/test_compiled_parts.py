"""Parts of a step at sizes that no recipe has, compiled for GPUs that are not there: memory, kernels and arrays."""

import json
import math
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from consyn_jax.planning import aot

pytestmark = pytest.mark.usefixtures("cuda_packages")

# 3584 has a factor 7, which nothing else here has: what 49 divides has the length twice.
LOOK = """
import json
import jax, jax.numpy as jnp
from jax.experimental import topologies
from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.model.attention import causal_attention, documents
from consyn_jax.planning.compiled import BYTES, array_shapes, instructions, kernels
from consyn_jax.planning.topology import parse_topology
from consyn_jax.training.loss import GPU_CHUNKS, head_loss

def devices(gpu, number):
    config = parse_topology(f"{gpu}:1x1").gpu.target_config
    return topologies.get_topology_desc(platform="cuda", target_config=config, topology=f"1x1x{number}").devices

def look(function, mesh, *inputs):
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, axes)) for shape, dtype, axes in inputs]
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*arrays).compile()
    program, memory = instructions(compiled.as_text()), compiled.memory_analysis()
    shapes = {dtype: sorted(array_shapes(program, dtype)) for dtype in BYTES}
    return {"temporary": memory.temp_size_in_bytes, "output": memory.output_size_in_bytes, "kernels": kernels(program), "shapes": shapes}

def loss(x, head, labels, mask):
    return head_loss(x, head, labels, mask, 131_072, GPU_CHUNKS).nll

def attention(gpu="h200", context=1, heads=(4, 2), width=64, window=None, packed=True):
    mesh = build_mesh(dict.fromkeys(AXES, 1) | {"context": context}, devices(gpu, context))
    axes = ("batch", "sequence")
    q, k = ((((2, 3584, n, width), jnp.bfloat16, (*axes, "heads", None))) for n in heads)
    def total(q, k, v, segments):
        inside = documents(segments) if packed else None
        return jnp.sum(causal_attention(q, k, v, inside, backend="fused", sliding_window=window).astype(jnp.float32) ** 2)
    return look(jax.value_and_grad(total, (0, 1, 2)), mesh, q, k, k, ((2, 3584), jnp.int32, axes))

one = build_mesh(dict.fromkeys(AXES, 1), devices("h200", 1))
tokens, axes = (16, 4096), ("batch", "sequence")
parts = ((*tokens, 2048), jnp.bfloat16, (*axes, None)), ((131_072, 2048), jnp.float32, ("vocab", "embed")), (tokens, jnp.int32, axes), (tokens, jnp.bool_, axes)
print(json.dumps({
    "loss": look(jax.value_and_grad(loss, (0, 1)), one, *parts),
    "documents": attention(window=1000),
    "a part of the sequence": attention(context=2),
    "heads of 80 on Ada": attention("rtx4090", width=80),
    "whole rows": attention(packed=False),
}))
"""


@cache
def parts() -> dict[str, dict[str, Any]]:
    """What each part came to, all compiled in one process."""
    done = subprocess.run([sys.executable, "-c", LOOK], env=os.environ | aot.ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_cross_entropy_of_65536_tokens_and_131072_words_takes_less_than_a_gibibyte() -> None:
    """Beside its results, the gradients: the head in bfloat16 (0.5 GiB), and the logits of one chunk in float32 and their gradients in bfloat16."""
    loss, tokens, words = parts()["loss"], 65_536, 131_072
    assert loss["kernels"].keys() == {"softmax_gradient"}
    assert loss["output"] == pytest.approx(words * 2048 * 4 + tokens * 2048 * 2, rel=1e-3)
    assert loss["temporary"] <= 2**30
    sizes = [math.prod(shape) for found in loss["shapes"].values() for shape in found]
    assert max(sizes) == words * 2048  # the head and its gradient; all logits would be 32 times as much
    assert tokens * words > 30 * max(sizes)


@pytest.mark.parametrize("part", ["documents", "a part of the sequence", "heads of 80 on Ada", "whole rows"])
def test_attention_has_no_mask_and_no_scores_in_memory(part: str) -> None:
    shapes = parts()[part]["shapes"]
    assert shapes["bf16"]
    assert not [(dtype, shape) for dtype, found in shapes.items() for shape in found if math.prod(shape) and math.prod(shape) % 49 == 0]


@pytest.mark.parametrize("part", ["documents", "a part of the sequence", "heads of 80 on Ada", "whole rows"])
def test_attention_has_a_kernel_forward_and_two_backward(part: str) -> None:
    assert parts()[part]["kernels"] == dict.fromkeys(["document_attention_forward", "document_attention_queries", "document_attention_keys"], 1)
