"""Rematerialisation policies: the activations that a block's backward pass recomputes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import checkpoint_policies

# `checkpoint_name`s that policies refer to
BLOCK_INPUT = "block input"  # the residual stream
ATTENTION_OUTPUT = "attention output"  # of every backend
KERNEL_RESIDUALS = "document attention"  # the kernel's output and softmax sums

# Value of --gradient_checkpointing -> policy, given the names that the attention backend saves.
POLICIES: dict[str, Callable[[tuple[str, ...]], Any]] = {
    "minimal": lambda names: checkpoint_policies.save_from_both_policies(
        checkpoint_policies.save_only_these_names(*names),
        checkpoint_policies.dots_with_no_batch_dims_saveable,
    ),
    "attention": lambda names: checkpoint_policies.save_only_these_names(*names),
    "full": lambda names: checkpoint_policies.nothing_saveable,
    # XLA keeps a block's input on the device unless it is offloaded by name
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
        remat: "none" or a key of `POLICIES`.
        saved_names: Names that the attention backend gives to what its backward pass needs.
    """
    if remat == "none":
        return block
    return jax.checkpoint(block, policy=POLICIES[remat](saved_names), prevent_cse=False)
