"""Rematerialisation policies: the activations that a block's backward pass recomputes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import checkpoint_policies

# The `checkpoint_name`s to which policies refer.
BLOCK_INPUT = "block input"  # the residual stream
ATTENTION_OUTPUT = "attention output"  # of every backend
KERNEL_RESIDUALS = "document attention"  # the kernel's output and softmax sums

# Value of --gradient_checkpointing -> function from the attention backend's names to a JAX policy.
POLICIES: dict[str, Callable[[tuple[str, ...]], Any]] = {
    "minimal": lambda names: checkpoint_policies.save_from_both_policies(
        checkpoint_policies.save_only_these_names(*names),
        checkpoint_policies.dots_with_no_batch_dims_saveable,
    ),
    "attention": lambda names: checkpoint_policies.save_only_these_names(*names),
    "full": lambda names: checkpoint_policies.nothing_saveable,
    # XLA keeps a block's input on the device unless the policy names it for offloading.
    "offload": lambda names: checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[*names, BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def rematerialise(
    block: Callable[..., Any], remat: str, saved_names: tuple[str, ...]
) -> Callable[..., Any]:
    """Wrap `block` so that its backward pass recomputes activations that the policy does not save.

    Args:
        remat: Name of the policy, a key of `POLICIES`; "none" returns `block` unchanged.
        saved_names: The `checkpoint_name`s of the arrays that attention needs in its backward pass.
    """
    if remat == "none":
        return block
    return jax.checkpoint(block, policy=POLICIES[remat](saved_names), prevent_cse=False)
