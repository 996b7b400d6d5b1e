"""The table of optimizers, and the flags of the optimizer and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from consyn_jax.flags import flag

PARAMETER_GROUPS = ("embedding", "head", "attention", "mlp", "norms")
PARAMETRIZATIONS = ("standard", "mup")
SCHEDULERS = (
    *("cosine", "linear", "constant", "constant_with_warmup", "wsd"),
    *("cosine_with_restarts", "inverse_sqrt", "polynomial", "plateau"),
)
DECAY_SHAPES = ("linear", "cosine", "sqrt")
# With --checkpoint: rate and weight decay as in Alpaca, Llama 2 and TRL; docs/finetuning.md has the
# sources. Beta2 is AdamW's default, because batches are small and the loss is smooth.
FINE_TUNING = {"lr": 2e-5, "weight_decay": 0.0, "beta2": 0.999, "warmup_ratio": 0.03}
PREFERENCE_TUNING = {"lr": 1e-6}  # TRL's DPOConfig
# LoRA needs about ten times the rate of a full fine-tune (Schulman et al., 2025; QLoRA has 2e-4).
LORA_TUNING = {"lr": 2e-4}
LORA_PREFERENCE_TUNING = {"lr": 1e-5}
OTHER_RECIPE = {"lr": 3e-4, "weight_decay": 0.1, "beta2": 0.95}  # if --model is not a preset


class BaseShape(NamedTuple):
    """The shape of muP's base model, on which the learning rates were tuned (see `MupFactors`)."""

    hidden_dim: int
    num_layers: int
    head_dim: int


@dataclass(frozen=True)
class Optimizer:
    """Facts about an update rule that need no JAX; `training.optim.optimizers` has the rules.

    Attributes:
        moments: number of moment arrays, each of the parameter's size and stored in
            `--moment_dtype`; 0 if the rule stores only a momentum.
        momentum: default of `--momentum`; None if the rule uses `--beta1` instead.
        factors: for each flag, the factor that multiplies the recipe's value, which suits AdamW.
        defaults: for each flag, the value that replaces the recipe's value.
        first_lr: learning rate to suggest where the recipe's rate cannot be scaled; `--lr` is then
            required.
        lr_bounds: lowest usual peak rate of pretraining, and highest usual peak rate of full
            fine-tuning.
        lr_range: lowest and highest rate of `--lr_find`. The lowest hardly changes the loss, and
            training diverges at the highest.
        block_matrices_only: whether the rule updates only the matrices inside the blocks. AdamW
            then updates all other parameters.
        layerwise: whether `--optimizer_memory host` can update one layer at a time: the update of a
            layer does not depend on other layers, and the state has only moments.
        scale_free: whether the size of an element's update is independent of the gradient's size.
        averages_weights: whether evaluation and export use an average of the weights, which is
            stored in float32.
        unused: flags among `--beta1`, `--beta2` and `--eps` that the rule does not use.
    """

    moments: int
    momentum: float | None = None
    factors: Mapping[str, float] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    first_lr: float | None = None
    lr_bounds: tuple[float, float] | None = None
    lr_range: tuple[float, float] = (1e-7, 1.0)
    block_matrices_only: bool = False
    layerwise: bool = False
    scale_free: bool = False
    averages_weights: bool = False
    unused: tuple[str, ...] = ()


# Sources of lr_bounds. AdamW: GPT-3 175B was pretrained at 6e-5 (Brown et al., 2020, table 2.1); a
# full fine-tune usually uses 2e-5 (docs/finetuning.md), and five times this rate is high. Adafactor
# and Muon have the same scale as AdamW here. Schedule-free AdamW: up to 10 times AdamW's rate
# (Defazio et al., 2024). Lion changes every element by the full rate, so its rate is 3 to 10 times
# lower and its weight decay 3 to 10 times higher (Chen et al., 2023).
_ADAMW_BOUNDS = (5e-5, 1e-4)
OPTIMIZERS = {
    "adamw": Optimizer(moments=2, lr_bounds=_ADAMW_BOUNDS, layerwise=True, scale_free=True),
    "adafactor": Optimizer(
        moments=0, momentum=0.0, lr_bounds=_ADAMW_BOUNDS, unused=("beta1", "beta2", "eps")
    ),
    "lion": Optimizer(
        moments=1,
        factors={"lr": 0.2, "weight_decay": 5.0},
        defaults={"beta2": 0.99},
        lr_bounds=(5e-6, 3e-5),
        lr_range=(1e-8, 0.1),
        layerwise=True,
        scale_free=True,
        unused=("eps",),
    ),
    "muon": Optimizer(
        moments=1,
        momentum=0.95,
        lr_bounds=_ADAMW_BOUNDS,
        block_matrices_only=True,
        layerwise=True,
        scale_free=True,
    ),
    "sgd": Optimizer(
        moments=0,
        momentum=0.9,
        first_lr=0.1,
        lr_range=(1e-5, 100.0),
        layerwise=True,
        unused=("beta1", "beta2", "eps"),
    ),
    "schedule_free_adamw": Optimizer(
        moments=1,
        defaults={"scheduler": "constant_with_warmup"},
        lr_bounds=(5e-5, 1e-3),
        scale_free=True,
        averages_weights=True,
    ),
    "cautious_adamw": Optimizer(
        moments=2, lr_bounds=_ADAMW_BOUNDS, layerwise=True, scale_free=True
    ),
}


def _each(value: Callable[[Optimizer], float | None]) -> str:
    """Format the value for each optimizer that has one, such as "0.2 for lion", for a help text."""
    found = ((name, value(rule)) for name, rule in OPTIMIZERS.items())
    return ", ".join(f"{number:g} for {name}" for name, number in found if number is not None)


@dataclass(frozen=True)
class OptimizerOptions:
    """The update rule and the learning rate."""

    optimizer: str = flag(
        "adamw",
        "update rule (muon updates the matrices inside the blocks, and adamw the rest)",
        choices=tuple(OPTIMIZERS),
        math=True,
    )
    lr: float | None = flag(
        None,
        "peak learning rate (from --model, with a factor of "
        f"{_each(lambda rule: rule.factors.get('lr'))})",
        aliases=("learning_rate",),
        math=True,
    )
    lr_multipliers: str | None = flag(
        None,
        "factors that multiply --lr for groups of parameters, as in embedding=2,head=0.5; groups: "
        f"{', '.join(PARAMETER_GROUPS)}",
        math=True,
    )
    parametrization: str = flag(
        "standard",
        "mup: scale initial weights and learning rates by width and depth, so that --lr and "
        "--weight_decay tuned on a small model suit a large one",
        choices=PARAMETRIZATIONS,
        math=True,
    )
    base_hidden_dim: int = flag(
        128, "width of mup's base model, the small model on which --lr was tuned", math=True
    )
    base_num_layers: int = flag(4, "number of decoder blocks of mup's base model", math=True)
    base_head_dim: int = flag(32, "width of an attention head of mup's base model", math=True)
    weight_decay: float | None = flag(
        None,
        "decoupled weight decay of matrices, not of norms and biases (from --model, with a "
        f"factor of {_each(lambda rule: rule.factors.get('weight_decay'))})",
        math=True,
    )
    beta1: float = flag(
        0.9,
        "decay of the first moment; schedule_free_adamw computes gradients at "
        "beta1 * x + (1 - beta1) * z, with averaged weights x and updated weights z",
        math=True,
    )
    beta2: float | None = flag(
        None,
        "decay of the second moment (from --model; "
        f"{_each(lambda rule: rule.defaults.get('beta2'))})",
        math=True,
    )
    eps: float = flag(1e-8, "added to the square root of the second moment", math=True)
    momentum: float | None = flag(
        None, f"decay of the momentum ({_each(lambda rule: rule.momentum)})", math=True
    )
    moment_dtype: str = flag(
        "float32",
        "number type of the stored moments and momentum",
        choices=("float32", "bfloat16"),
        math=True,
    )
    max_grad_norm: float = flag(
        1.0, "clip gradients to this global norm; 0: no clipping", math=True
    )
    on_nonfinite: str = flag(
        "halt",
        "if the loss or a gradient is not finite, halt the run or skip the update",
        choices=("halt", "skip"),
    )
    max_nonfinite_steps: int = flag(10, "halt after this many skipped updates in a row")
    scheduler: str = flag(
        "cosine",
        "learning-rate schedule (constant_with_warmup by default for schedule_free_adamw)",
        choices=SCHEDULERS,
        math=True,
    )
    warmup_ratio: float = flag(0.02, "share of the steps for warm-up", math=True)
    warmup_steps: int | None = flag(None, "steps of warm-up; overrides --warmup_ratio", math=True)
    min_lr_ratio: float = flag(
        0.1,
        "final learning rate as a share of the peak; has no effect on constant schedules and "
        "inverse_sqrt",
        math=True,
    )
    num_cycles: int = flag(3, "number of cycles of cosine_with_restarts", math=True)
    power: float = flag(2.0, "exponent of the polynomial schedule", math=True)
    decay_ratio: float = flag(
        0.2, "share of the steps, at the end of the run, over which wsd decays the rate", math=True
    )
    decay_shape: str = flag("sqrt", "shape of wsd's decay", choices=DECAY_SHAPES, math=True)
    decay_from: int | None = flag(
        None,
        "start a new run in OUTPUT-decay-STEP from checkpoint STEP of --output, which must be a "
        "wsd or constant run; the new run only decays the rate, over the share --decay_ratio of "
        "all steps",
        math=True,
    )
    plateau_factor: float = flag(
        0.5,
        "factor by which the plateau schedule multiplies the rate when evaluations stop improving",
        math=True,
    )
    plateau_patience: int = flag(
        2, "number of evaluations without improvement before plateau lowers the rate", math=True
    )
    plateau_cooldown: int = flag(
        0,
        "number of evaluations that --scheduler plateau ignores after it lowers the rate",
        math=True,
    )
    plateau_threshold: float = flag(
        1e-4,
        "smallest relative improvement that the plateau schedule counts as an improvement",
        math=True,
    )

    @property
    def rule(self) -> Optimizer:
        """The optimizer's entry in the table."""
        return OPTIMIZERS[self.optimizer]

    @property
    def base(self) -> BaseShape | None:
        """The shape of muP's base model; None with the standard parametrization."""
        if self.parametrization == "standard":
            return None
        return BaseShape(self.base_hidden_dim, self.base_num_layers, self.base_head_dim)

    @property
    def momentum_decay(self) -> float:
        """Decay of the momentum: `momentum`, or the optimizer's default, or 0 (no momentum)."""
        return (self.rule.momentum or 0.0) if self.momentum is None else self.momentum

    @property
    def moment_bytes(self) -> int:
        """Bytes of optimizer state per parameter.

        For Muon, this holds for the matrices inside the blocks. Adafactor's factored second moments
        are not counted.

        >>> OptimizerOptions().moment_bytes, OptimizerOptions(moment_dtype="bfloat16").moment_bytes
        (8, 4)
        """
        moments = self.rule.moments or int(self.momentum_decay > 0)
        average = 4 if self.rule.averages_weights else 0
        return moments * {"float32": 4, "bfloat16": 2}[self.moment_dtype] + average
