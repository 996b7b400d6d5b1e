"""What was done to make a step faster is in the compiled step of verse, with the bytes predicted.

Times are only known on a GPU; docs/design/compiled-programs.md has the predictions.
"""

import collections
import math

import pytest
from analyses import (
    bodies_of,
    bytes_of_kernels,
    dot_operands,
    launched,
    moved_bytes,
    written_by_fusions,
)
from recipes import IS_NEWEST, VERSE, compiled, compiled_instructions, recipe

from consyn_jax.distributed.compiled import Instruction

pytestmark = pytest.mark.usefixtures("cuda_packages")

MODEL, RUN = recipe(VERSE, {})
LAYERS, STEPS = MODEL.num_layers, RUN.budget.gradient_accumulation_steps
ROWS = (RUN.budget.batch_size, RUN.length)
TOKENS, WIDTH, MLP = math.prod(ROWS), MODEL.hidden_dim, MODEL.mlp_dim
WORDS = MODEL.padded_vocab_size


def step() -> list[Instruction]:
    return compiled_instructions(VERSE, "h200:1x1", {})


def test_a_micro_batch_moves_the_bytes_of_the_documented_step() -> None:
    """As the optimizer is an eighth here, sums of gradients move what it would.

    A residual sum or a joined product undone is 1 or 1.6 % more.
    """
    moved = moved_bytes(step()) / STEPS
    x, h, logit = 2 * TOKENS * WIDTH, 2 * TOKENS * MLP, TOKENS * WORDS
    # Passes over the stream and over the MLP's activations, forward and backward; the head's
    # products read and write each logit 10 bytes, its softmax 6.
    activations = LAYERS * ((27 + 49) * x + (6 + 9 + 2) * h) + (4 + 6 + 2 + 2) * logit
    assert 0.9 < activations / moved < 1
    assert moved / 1e9 <= (211.4, 210.4)[IS_NEWEST]


def test_chunks_of_the_loss_have_8192_tokens() -> None:
    """The softmax reads float32 logits once and writes 16-bit gradients."""
    chunks = TOKENS // 8192
    assert compiled(VERSE, "h200:1x1", {}).kernels["softmax_gradient"] == STEPS * chunks
    moved = bytes_of_kernels(step(), "softmax_gradient")["softmax_gradient"]
    assert moved == pytest.approx(STEPS * TOKENS * WORDS * (4 + 2), rel=1e-3)


def test_gate_and_up_are_one_product_and_no_copy_joins_or_splits_them() -> None:
    """Only products and SwiGLU write activations of the MLP, forward and backward."""
    runs = LAYERS * STEPS
    written = collections.Counter(written_by_fusions(step(), ("bf16", "f32"), ROWS))
    assert written["bf16", 2 * MLP] == 2 * runs  # the product, and SwiGLU's gradients
    assert written["bf16", MLP] == 2 * runs  # SwiGLU, and the gradient that down's product gives
    assert not any(wide >= MLP for dtype, wide in written if dtype == "f32")
    operands = collections.Counter(shape for _, shape in dot_operands(step()))
    assert operands[WIDTH, 2 * MLP] == operands[2 * MLP, WIDTH] == runs  # forward, backward
    # Weights are joined where they are cast, and the joined gradient stays one array.
    both = [
        (each.operation, dtype)
        for each in launched(step())
        for dtype, shape in each.arrays
        if shape[0:1] == (WIDTH,) and math.prod(shape) == 2 * WIDTH * MLP
    ]
    assert sorted(both) == [("fusion", "bf16")] * LAYERS + [("fusion", "f32")] * LAYERS


def test_attentions_output_is_added_inside_the_norms_kernel() -> None:
    """XLA adds only the MLP's output, once a layer; JAX 0.12 does so inside the product."""
    bodies, sums = bodies_of(step()), 0
    for each in launched(step()):
        inside = {one.operation for _, body in each.calls for one in bodies[body]}
        of_stream = any(math.prod(shape) == TOKENS * WIDTH for _, shape in each.arrays)
        if of_stream and "add" in inside and not inside & {"dot", "reduce"}:
            sums += each.times
    gathers = STEPS * 2  # rows of the embedding, and gradients by token, whose places are added up
    assert sums == gathers + (0 if IS_NEWEST else LAYERS * STEPS)
    moved = bytes_of_kernels(step(), "norm_forward")
    stream = LAYERS * STEPS * 2 * TOKENS * WIDTH
    assert moved == pytest.approx(
        {"branched_norm_forward": 2 * stream, "added_norm_forward": 4 * stream}, rel=1e-3
    )
