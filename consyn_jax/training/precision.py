"""The dtype in which a run computes, and the loss scale that float16 needs.

Weights, their gradients, sums over micro-batches, norms, softmax and loss are always float32.
Logits are float32 in evaluations; in training, `--logits_dtype` sets their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from consyn_jax.errors import UserError
from consyn_jax.model.parameters import Params
from consyn_jax.training.preference.pair_loss import num_terms
from consyn_jax.training.program_arguments import Number
from consyn_jax.training.step import (
    Batch,
    Metrics,
    Objective,
    Step,
    Sums,
    TrainState,
    make_train_step,
)

# -------------------------------------------------------------------------------------- number type


@dataclass(frozen=True)
class PrecisionChoice:
    """The dtype of activations and matmuls, and the reason for it.

    Attributes:
        logits: The dtype in which training stores logits; evaluation always uses float32.
        fp8: Whether the matmuls of the blocks use 8-bit floats (model/fp8/).
    """

    dtype: Any
    reason: str
    fp8: bool = False
    logits: Any = jnp.float32


_DTYPES = {"no": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}
_FP8_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


def choose_precision(
    wanted: str,
    platform: str,
    compute_capability: str = "",
    device_kind: str = "",
    logits: str = "float32",
) -> PrecisionChoice:
    """Choose the dtypes for values of `--mixed_precision` and `--logits_dtype` on a device.

    Args:
        wanted: "no", "bf16", "fp16", "fp8", or "auto" for the best that the device supports.
        platform: "cpu", "gpu", "cuda" or "tpu", as in `jax.Device.platform`.
        compute_capability: The GPU's compute capability, such as "9.0" for Hopper; empty if
            unknown.
        device_kind: Name of the device, for the reason.
        logits: "float32" or "bfloat16".

    Raises:
        UserError: fp8 is requested on a GPU without 8-bit matmuls, or logits in bfloat16 for a run
            that computes in another dtype.

    >>> choose_precision("auto", "gpu", "7.0", "Tesla V100").reason
    'float16 with float32 weights: the Tesla V100 multiplies float16 faster than float32, and has no
    bfloat16'
    """
    choice = _of_matmuls(wanted, platform, compute_capability, device_kind)
    if logits == "float32":
        return choice
    if choice.dtype != jnp.bfloat16:
        raise UserError(
            f"--logits_dtype {logits} needs a run that computes in bfloat16, but this one computes "
            f"in {jnp.dtype(choice.dtype).name}. Use --mixed_precision bf16, or leave "
            "--logits_dtype out."
        )
    return replace(choice, logits=jnp.bfloat16, reason=f"{choice.reason}; logits in bfloat16, too")


def _of_matmuls(
    wanted: str, platform: str, compute_capability: str, device_kind: str
) -> PrecisionChoice:
    device = f"the {device_kind or platform}" if platform != "cpu" else "a CPU"
    if wanted == "fp8":
        return _fp8(device, platform, compute_capability)
    best, reason = _best(device, platform, compute_capability)
    if wanted not in ("auto", best):
        usual = f"the default for {device} is {jnp.dtype(_DTYPES[best]).name}"
        reason = f"as requested; {reason if best == 'no' else usual}"
    dtype = _DTYPES[best if wanted == "auto" else wanted]
    weights = "" if dtype == jnp.float32 else " with float32 weights"
    return PrecisionChoice(dtype, f"{jnp.dtype(dtype).name}{weights}: {reason}")


def _best(device: str, platform: str, compute_capability: str) -> tuple[str, str]:
    """Return the best value of `--mixed_precision` for a device, and the reason."""
    if platform == "tpu":
        return "bf16", f"{device} multiplies bfloat16 at full rate"
    major = int(compute_capability.split(".")[0]) if compute_capability[:1].isdigit() else 8
    if platform not in ("gpu", "cuda"):
        return "no", f"{device} gains nothing from 16-bit types"
    if major >= 8:
        return "bf16", f"{device} multiplies bfloat16 at full rate"
    if major == 7:
        return "fp16", f"{device} multiplies float16 faster than float32, and has no bfloat16"
    return (
        "no",
        f"{device} has compute capability {compute_capability}, and 16-bit types are fast only "
        "from 7.0 on",
    )


def _fp8(device: str, platform: str, compute_capability: str) -> PrecisionChoice:
    matmuls = "bfloat16 with float32 weights, the matmuls of the blocks in 8 bits: as requested;"
    if platform == "cpu":
        reason = f"{matmuls} {device} only simulates 8-bit matmuls, so they are not faster"
        return PrecisionChoice(jnp.bfloat16, reason, fp8=True)
    known = platform in ("gpu", "cuda") and compute_capability
    if not known or tuple(map(int, compute_capability.split("."))) < _FP8_CAPABILITY:
        has = f"has {compute_capability}" if compute_capability else "is not a known GPU"
        raise UserError(
            "--mixed_precision fp8 needs an NVIDIA GPU of compute capability 8.9 or later (Ada, "
            f"Hopper), but {device} {has}. Use --mixed_precision auto."
        )
    reason = f"{matmuls} {device} multiplies 8-bit floats twice as fast as bf16"
    return PrecisionChoice(jnp.bfloat16, reason, fp8=True)


# --------------------------------------------------------------------------------------- loss scale

FIRST_SCALE = 2.0**16
# The inverse of the largest scale is still far above float32's smallest number.
SMALLEST_SCALE, LARGEST_SCALE = 1.0, 2.0**64
GROWTH_STEPS = 2000  # finite steps in a row after which the scale is doubled


class ScaledState(NamedTuple):
    """The state of an optimizer, with a loss scale.

    Attributes:
        scale: Factor by which the mean loss is multiplied in the backward pass.
        good_steps: Number of consecutive steps with finite gradients since the scale changed.
        skipped_steps: Number of steps so far whose update was skipped.
    """

    optimizer: optax.OptState
    scale: Float[Array, ""]
    good_steps: Int[Array, ""]
    skipped_steps: Int[Array, ""]


def with_loss_scale(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wrap `optimizer` so that it skips non-finite gradients, and adapts the loss scale.

    A skipped step changes neither the parameters nor the optimizer's state, including its count of
    updates. It halves the scale, which stays at least 1. After 2,000 consecutive finite steps, the
    scale doubles (Micikevicius et al., 2018, with the constants of torch.amp.GradScaler).
    """

    def init(params: Params) -> ScaledState:
        return ScaledState(
            optimizer.init(params), jnp.float32(FIRST_SCALE), jnp.int32(0), jnp.int32(0)
        )

    def update(
        gradients: Params, state: Any, params: Params | None = None
    ) -> tuple[Params, ScaledState]:
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(gradients)]))
        updates, new = optimizer.update(gradients, state.optimizer, params)
        updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)
        new = jax.tree.map(
            lambda after, before: jnp.where(finite, after, before), new, state.optimizer
        )
        good_steps = jnp.where(finite, state.good_steps + 1, 0)
        grows = good_steps == GROWTH_STEPS
        after_good = jnp.where(grows, jnp.minimum(2 * state.scale, LARGEST_SCALE), state.scale)
        scale = jnp.where(finite, after_good, jnp.maximum(state.scale / 2, SMALLEST_SCALE))
        return updates, ScaledState(
            new, scale, jnp.where(grows, 0, good_steps), state.skipped_steps + ~finite
        )

    return optax.GradientTransformation(init, update)


def make_scaled_train_step(
    objective: Objective, optimizer: optax.GradientTransformation, max_grad_norm: Number
) -> Step:
    """Make a step as `make_train_step` does, but with gradients of the scaled loss.

    The metrics also include `loss_scale`, the scale of this step; `skipped`, 1 for a step whose
    update was skipped, otherwise 0; and `skipped_steps`, the number of skipped steps up to and
    including this one. In a skipped step, `grad_norm` is not finite, and `clipped` is 0.

    Args:
        optimizer: Optimizer from `with_loss_scale`.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        before: Any = state.opt_state
        # The objective is a sum over tokens or pairs, but the scale is for their mean.
        factor = before.scale / jnp.maximum(num_terms(batch), 1.0)
        step = make_train_step(_scaled(objective, factor), optimizer, max_grad_norm)
        after, metrics = step(state, batch)
        new: Any = after.opt_state
        skipped = new.skipped_steps - before.skipped_steps
        return after, metrics | {
            "loss_scale": before.scale,
            "skipped": skipped,
            "skipped_steps": new.skipped_steps,
            "clipped": metrics["clipped"] * (1 - skipped),
        }

    return train_step


def _scaled(objective: Objective, factor: Float[Array, ""]) -> Objective:
    """Return a function with the same value, whose gradient is multiplied by `factor`."""

    def scaled(params: Params, batch: Batch) -> tuple[jax.Array, Sums]:
        divided = jax.tree.map(lambda p: _times_in_backward(p, 1 / factor), params)
        value, sums = objective(divided, batch)
        return _times_in_backward(value, factor), sums

    return scaled


@jax.custom_vjp
def _times_in_backward(x: Float[Array, "..."], factor: Float[Array, ""]) -> Float[Array, "..."]:
    return x


_times_in_backward.defvjp(lambda x, factor: (x, factor), lambda factor, dx: (dx * factor, None))
