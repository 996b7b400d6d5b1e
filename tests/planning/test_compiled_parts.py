"""Parts of a step at sizes that no recipe has, compiled for GPUs that are not here."""

import json
import math
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
from analyses import array_shapes, with_length_twice
from recipes import attention_calls

from consyn_jax.distributed.compiled import Instruction, instructions, kernels
from consyn_jax.planning import aot

pytestmark = pytest.mark.usefixtures("cuda_packages")

# 3584 has a factor 7, which no other size has.
COMPILE = """
import json
import jax, jax.numpy as jnp
from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.model.attention import causal_attention
from consyn_jax.model.kernels.reference_attention import documents
from consyn_jax.planning.topology import parse_topology
from consyn_jax.training.loss import GPU_CHUNKS, head_loss

def mesh_on(topology, **sizes):
    devices = parse_topology(topology).described_devices()
    return build_mesh(dict.fromkeys(AXES, 1) | sizes, devices)

def compiled(function, mesh, *inputs):
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, axes))
        for shape, dtype, axes in inputs
    ]
    with jax.set_mesh(mesh):
        found = jax.jit(function).lower(*arrays).compile()
    memory = found.memory_analysis()
    return {
        "temporary": memory.temp_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "text": found.as_text(),
    }

axes = ("batch", "sequence")

def loss(x, head, labels, mask):
    return head_loss(x, head, labels, mask, 131_072, GPU_CHUNKS).nll

def attention(mesh, heads=(4, 2), width=64, window=None, packed=True):
    q, k = ((((2, 3584, n, width), jnp.bfloat16, (*axes, "heads", None))) for n in heads)
    def total(q, k, v, segments):
        inside = documents(segments) if packed else None
        out = causal_attention(q, k, v, inside, backend="fused", sliding_window=window)
        return jnp.sum(out.astype(jnp.float32) ** 2)
    segments = (2, 3584), jnp.int32, axes
    return compiled(jax.value_and_grad(total, (0, 1, 2)), mesh, q, k, k, segments)

one, tokens = mesh_on("h200:1x1"), (16, 4096)
inputs = (
    ((*tokens, 2048), jnp.bfloat16, (*axes, None)),
    ((131_072, 2048), jnp.float32, ("vocab", "embed")),
    (tokens, jnp.int32, axes),
    (tokens, jnp.bool_, axes),
)
print(json.dumps({
    "loss": compiled(jax.value_and_grad(loss, (0, 1)), one, *inputs),
    "documents": attention(one, window=1000),
    "a part of the sequence": attention(mesh_on("h200:1x2", context=2)),
    "heads of 80 on Ada": attention(mesh_on("rtx4090:1x1"), width=80),
    "whole rows": attention(one, packed=False),
}))
"""
ATTENTION = ["documents", "a part of the sequence", "heads of 80 on Ada", "whole rows"]


@cache
def parts() -> dict[str, dict[str, Any]]:
    """Memory and text of each part, all compiled in one process."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=os.environ | aot.ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@cache
def program(part: str) -> list[Instruction]:
    return instructions(parts()[part]["text"])


def test_cross_entropy_of_65536_tokens_and_131072_words_takes_less_than_a_gibibyte() -> None:
    """Besides the gradients, which are its results.

    It needs the head in bfloat16 (0.5 GiB), and one chunk's logits in float32 with their gradients
    in bfloat16.
    """
    loss, tokens, words = parts()["loss"], 65_536, 131_072
    assert kernels(program("loss")).keys() == {"softmax_gradient"}
    assert loss["output"] == pytest.approx(words * 2048 * 4 + tokens * 2048 * 2, rel=1e-3)
    assert loss["temporary"] <= 2**30
    shapes = array_shapes(program("loss")).values()
    largest = max(math.prod(shape) for found in shapes for shape in found)
    assert largest == words * 2048  # the head and its gradient; all logits are 32 times as large
    assert tokens * words > 30 * largest


@pytest.mark.parametrize("part", ATTENTION)
def test_attention_has_no_mask_and_no_scores_in_memory(part: str) -> None:
    assert array_shapes(program(part))["bf16"]
    assert not with_length_twice(program(part), 7)


@pytest.mark.parametrize("part", ATTENTION)
def test_attention_has_one_forward_and_two_backward_kernels(part: str) -> None:
    assert attention_calls(kernels(program(part))) == (1, 1, 1)
    assert len(kernels(program(part))) == 3
