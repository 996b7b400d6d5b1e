"""What `--profile_steps` reads from the program of a GPU."""

import pytest
from recipes import VERSE, compiled_instructions, compiled_text, recipe, run_apart

from consyn_jax.model.arithmetic import train_flops_per_token
from consyn_jax.training.diagnostics.operation_costs import operation_costs

pytestmark = pytest.mark.usefixtures("cuda_packages")


OPTIONS = """
from consyn_jax.distributed.compiler import traced_options
from consyn_jax.planning.topology import parse_topology
print(traced_options(parse_topology("h200:1x1").described_devices()))
"""


def test_the_compiler_knows_how_to_leave_command_buffers_out() -> None:
    done = run_apart(OPTIONS)
    assert done.stdout == "{'xla_gpu_enable_command_buffer': ''}\n"


def test_the_flops_of_a_steps_operations_are_those_of_the_model() -> None:
    """The loss computes no logits anew, and neither does attention: its kernels do, 9 for 6."""
    changes = {"gradient_accumulation_steps": 1}
    model, run = recipe(VERSE, changes)
    costs = operation_costs(compiled_text(VERSE, "h200:1x1", changes))
    counted = compiled_instructions(VERSE, "h200:1x1", changes)
    inside = {name for each in counted for kind, name in each.calls if kind != "body"}
    found = sum(
        each.times * costs[each.name].flops for each in counted if each.computation not in inside
    )
    tokens, length = run.budget.batch_size * run.row_length, run.row_length
    matmuls_of_attention = model.num_layers * model.num_heads * model.head_dim * length * tokens
    expected = train_flops_per_token(model, length) * tokens + 3 * matmuls_of_attention
    assert found == pytest.approx(expected, rel=0.01)
