"""The loop over the blocks: what the backward pass recomputes, and whether it is unrolled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import checkpoint_policies

from consyn_jax.model.arithmetic import CPU_UNROLLED_LAYERS, GPU_UNROLLED_LAYERS

# The loop over blocks is unrolled up to this many layers; deeper models take too long to compile.
# Unrolling makes a step a fifth faster on CPUs. On GPUs it avoids copying the saved activations of
# all layers into one array and back.
UNROLLED_LAYERS = {"cpu": CPU_UNROLLED_LAYERS, "gpu": GPU_UNROLLED_LAYERS}
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


def unrolls(platform: str, num_layers: int, remat: str) -> bool:
    """Whether to unroll the loop over the blocks, which is faster but takes longer to compile.

    On GPUs, unrolling gains too little if activations are recomputed. On TPUs, the gain has not
    been measured, and compiling takes several times as long.
    """
    if platform == "cpu":
        return num_layers <= UNROLLED_LAYERS["cpu"]
    return platform != "tpu" and remat == "none" and num_layers <= UNROLLED_LAYERS["gpu"]
