"""In which type a run computes, and what float16 needs beside it: a scale of the loss that follows the gradients.

Weights, their gradients, sums over micro-batches, norms, logits, softmax and loss are float32 whatever that type is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from consyn_jax.config import UserError
from consyn_jax.training.loss import LossSums
from consyn_jax.training.step import Batch, Metrics, Objective, Params, Step, TrainState, make_train_step

# ------------------------------------------------------------------------------------------------------------------ which type


@dataclass(frozen=True)
class PrecisionChoice:
    """The type of activations and products, and why.

    Attributes:
        fp8: the products of the blocks are of 8-bit numbers (model/fp8.py).
    """

    dtype: Any
    reason: str
    fp8: bool = False


_DTYPES = {"no": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}
_FP8_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


def choose_precision(wanted: str, platform: str, compute_capability: str = "", device_kind: str = "") -> PrecisionChoice:
    """What `--mixed_precision` means on a device.

    Args:
        wanted: "no", "bf16", "fp16", "fp8", or "auto" for what the device does well.
        platform: "cpu", "gpu", "cuda", as `jax.Device.platform` names it.
        compute_capability: "9.0" for Hopper; empty where it is not known.
        device_kind: the device's name, for the reason.

    Raises:
        UserError: fp8 on a GPU that has no such numbers.

    >>> choose_precision("auto", "gpu", "7.0", "Tesla V100").reason
    'float16 over float32 weights: the Tesla V100 multiplies it faster than float32, and has no bfloat16'
    """
    device = f"the {device_kind or platform}" if platform != "cpu" else "a CPU"
    if wanted == "fp8":
        return _fp8(device, platform, compute_capability)
    major = int(compute_capability.split(".")[0]) if compute_capability[:1].isdigit() else 8
    if platform not in ("gpu", "cuda"):
        best, reason = "no", f"{device} gains nothing from a narrower type"
    elif major >= 8:
        best, reason = "bf16", f"{device} multiplies it at full rate"
    elif major == 7:
        best, reason = "fp16", f"{device} multiplies it faster than float32, and has no bfloat16"
    else:
        best, reason = "no", f"{device} is of compute capability {compute_capability}, and narrower types are fast from 7.0 on"
    if wanted not in ("auto", best):
        reason = f"asked for; {reason if best == 'no' else f'{jnp.dtype(_DTYPES[best]).name} is what {device} does well'}"
    dtype = _DTYPES[best if wanted == "auto" else wanted]
    return PrecisionChoice(dtype, f"{jnp.dtype(dtype).name}{'' if dtype == jnp.float32 else ' over float32 weights'}: {reason}")


def _fp8(device: str, platform: str, compute_capability: str) -> PrecisionChoice:
    products = "bfloat16 over float32 weights, the products of the blocks in 8 bits"
    if platform == "cpu":
        return PrecisionChoice(jnp.bfloat16, f"{products}: asked for; {device} simulates them, and gains nothing", fp8=True)
    has = f", and {device} has {compute_capability}" if compute_capability else f", and {device} is none that is known"
    if platform not in ("gpu", "cuda") or not compute_capability or tuple(map(int, compute_capability.split("."))) < _FP8_CAPABILITY:
        raise UserError(f"--mixed_precision fp8 needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper){has}. Use --mixed_precision auto.")
    return PrecisionChoice(jnp.bfloat16, f"{products}: asked for; {device} multiplies those at twice the rate", fp8=True)


# ----------------------------------------------------------------------------------------------------------- scale of the loss

FIRST_SCALE = 2.0**16
SMALLEST_SCALE, LARGEST_SCALE = 1.0, 2.0**64  # the inverse of the largest is still far from the end of float32
GROWTH_STEPS = 2000  # good steps in a row after which the scale is doubled


class ScaledState(NamedTuple):
    """An optimizer's state beside the scale of the loss.

    Attributes:
        scale: what the mean loss is multiplied by before it is differentiated.
        good_steps: steps in a row with finite gradients since the scale last changed.
        skipped_steps: steps so far that changed nothing.
    """

    optimizer: optax.OptState
    scale: Float[Array, ""]
    good_steps: Int[Array, ""]
    skipped_steps: Int[Array, ""]


def with_loss_scale(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer`, which leaves parameters and its own state (the count of its schedule, too) alone when a gradient is not finite.

    The scale is halved then, but stays at least 1; it is doubled after 2,000 finite steps in a row (Micikevicius et al., 2018, with the
    constants of torch.amp.GradScaler).
    """

    def init(params: Params) -> ScaledState:
        return ScaledState(optimizer.init(params), jnp.float32(FIRST_SCALE), jnp.int32(0), jnp.int32(0))

    def update(gradients: Params, state: Any, params: Params | None = None) -> tuple[Params, ScaledState]:
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(gradients)]))
        updates, new = optimizer.update(gradients, state.optimizer, params)
        updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)
        new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state.optimizer)
        good_steps = jnp.where(finite, state.good_steps + 1, 0)
        grows = good_steps == GROWTH_STEPS
        after_good = jnp.where(grows, jnp.minimum(2 * state.scale, LARGEST_SCALE), state.scale)
        scale = jnp.where(finite, after_good, jnp.maximum(state.scale / 2, SMALLEST_SCALE))
        return updates, ScaledState(new, scale, jnp.where(grows, 0, good_steps), state.skipped_steps + ~finite)

    return optax.GradientTransformation(init, update)


def make_scaled_train_step(objective: Objective, optimizer: optax.GradientTransformation, max_grad_norm: float) -> Step:
    """The train step of `make_train_step`, whose backward pass runs on the scaled loss.

    Its metrics say more: `loss_scale`, the scale of this step; `skipped`, 1 for a step that changed nothing, else 0; `skipped_steps`, how
    many have been skipped, this one included. Of a skipped step `grad_norm` is not finite, and `clipped` is 0.

    Args:
        optimizer: of `with_loss_scale`.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        before: Any = state.opt_state
        # the objective is a sum over tokens; the scale is that of the mean
        factor = before.scale / jnp.maximum(jnp.sum(batch["loss_mask"], dtype=jnp.float32), 1.0)
        after, metrics = make_train_step(_scaled(objective, factor), optimizer, max_grad_norm)(state, batch)
        new: Any = after.opt_state
        skipped = new.skipped_steps - before.skipped_steps
        more = {"loss_scale": before.scale, "skipped": skipped, "skipped_steps": new.skipped_steps, "clipped": metrics["clipped"] * (1 - skipped)}
        return after, metrics | more

    return train_step


def _scaled(objective: Objective, factor: Float[Array, ""]) -> Objective:
    """The same function with the same gradient, between whose two ends the backward pass is `factor` times as large."""

    def scaled(params: Params, batch: Batch) -> tuple[jax.Array, LossSums]:
        value, sums = objective(jax.tree.map(lambda p: _times_in_backward(p, 1 / factor), params), batch)
        return _times_in_backward(value, factor), sums

    return scaled


@jax.custom_vjp
def _times_in_backward(x: Float[Array, "..."], factor: Float[Array, ""]) -> Float[Array, "..."]:
    return x


_times_in_backward.defvjp(lambda x, factor: (x, factor), lambda factor, dx: (dx * factor, None))
