"""The table of optimizers, and the options of the optimizer and of the learning-rate schedule."""

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


class BaseShape(NamedTuple):
    """The shape of muP's base model, on which the rates were found (see `MupFactors`)."""

    hidden_dim: int
    num_layers: int
    head_dim: int


@dataclass(frozen=True)
class Optimizer:
    """Facts about an update rule, without JAX; `training.optim.optimizers.RULES` has the rule.

    Attributes:
        moments: arrays of a parameter's size that it keeps in `--moment_dtype`; 0 for a rule that
            keeps its momentum only.
        momentum: default of `--momentum`; None for a rule that has `--beta1` instead.
        factors: by flag, what to multiply the recipe's value by, as recipes are for AdamW.
        defaults: by flag, values that replace the recipe's.
        first_lr: a rate to suggest if the recipe's cannot be scaled; `--lr` is then required.
        lr_bounds: the lowest usual peak rate of pretraining, and the highest of full fine-tuning.
        lr_range: rates for `--lr_find`, from too low to change anything to too high to train.
        block_matrices_only: AdamW updates everything but the matrices inside the blocks.
        layerwise: the update of a layer does not depend on the others, and the state is moments
            only, so `--optimizer_memory host` can update one layer at a time.
        scale_free: an update's size does not depend on the gradient's, element by element.
        averages_weights: evaluation and export use an average of the weights, kept in float32.
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


# Bounds of AdamW: 6e-5 for GPT-3 175B (Brown et al., 2020, table 2.1); 2e-5 is usual for a full
# fine-tune (docs/finetuning.md), and five times that is a lot. Adafactor and Muon have AdamW's
# units here. Schedule-free: AdamW's, up to 10 times higher (Defazio et al., 2024). Lion moves every
# element by the rate, so its rate is 3 to 10 times lower and its decay as much higher (Chen et al.,
# 2023).
_ADAMW_BOUNDS = (5e-5, 1e-4)
OPTIMIZERS = {
    "adamw": Optimizer(moments=2, lr_bounds=_ADAMW_BOUNDS, layerwise=True, scale_free=True),
    "adafactor": Optimizer(moments=0, momentum=0.0, lr_bounds=_ADAMW_BOUNDS),
    "lion": Optimizer(
        moments=1,
        factors={"lr": 0.2, "weight_decay": 5.0},
        defaults={"beta2": 0.99},
        lr_bounds=(5e-6, 3e-5),
        lr_range=(1e-8, 0.1),
        layerwise=True,
        scale_free=True,
    ),
    "muon": Optimizer(
        moments=1,
        momentum=0.95,
        lr_bounds=_ADAMW_BOUNDS,
        block_matrices_only=True,
        layerwise=True,
        scale_free=True,
    ),
    "sgd": Optimizer(moments=0, momentum=0.9, first_lr=0.1, lr_range=(1e-5, 100.0), layerwise=True),
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
    """A value of all optimizers that have one, for the help of a flag: `0.2 for lion`."""
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
        f"peak learning rate (from --model, times {_each(lambda rule: rule.factors.get('lr'))})",
        aliases=("learning_rate",),
        math=True,
    )
    lr_multipliers: str | None = flag(
        None,
        f"multiples of --lr, as in embedding=2,head=0.5; groups: {', '.join(PARAMETER_GROUPS)}",
        math=True,
    )
    parametrization: str = flag(
        "standard",
        "mup: scale initial values and rates by width and depth, so that --lr and --weight_decay "
        "found on a small model suit a large one",
        choices=PARAMETRIZATIONS,
        math=True,
    )
    base_hidden_dim: int = flag(
        128, "width of mup's base model, on which --lr was found", math=True
    )
    base_num_layers: int = flag(4, "number of decoder blocks of that model", math=True)
    base_head_dim: int = flag(32, "width of a head of that model", math=True)
    weight_decay: float | None = flag(
        None,
        "decoupled weight decay of matrices, not of norms and biases (from --model, times "
        f"{_each(lambda rule: rule.factors.get('weight_decay'))})",
        math=True,
    )
    beta1: float = flag(
        0.9,
        "decay of the first moment; schedule_free_adamw takes gradients at "
        "beta1 * average + (1 - beta1) * iterate of the weights",
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
        "type in which moments and momentum are kept",
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
        "final rate as a share of the peak; not for constant schedules and inverse_sqrt",
        math=True,
    )
    num_cycles: int = flag(3, "number of cycles of cosine_with_restarts", math=True)
    power: float = flag(2.0, "exponent of polynomial", math=True)
    decay_ratio: float = flag(
        0.2, "share of the steps over which wsd decays, at the end", math=True
    )
    decay_shape: str = flag("sqrt", "shape of the decay of wsd", choices=DECAY_SHAPES, math=True)
    decay_from: int | None = flag(
        None,
        "start a new run, OUTPUT-decay-STEP, at this checkpoint of a wsd or constant run, and "
        "decay its rate over --decay_ratio of the steps",
        math=True,
    )
    plateau_factor: float = flag(
        0.5, "factor by which plateau lowers the rate when evaluations stop improving", math=True
    )
    plateau_patience: int = flag(
        2, "evaluations without improvement before the rate is lowered", math=True
    )
    plateau_cooldown: int = flag(
        0, "evaluations that plateau ignores after it lowered the rate", math=True
    )
    plateau_threshold: float = flag(
        1e-4, "smallest relative improvement that counts for plateau", math=True
    )

    @property
    def rule(self) -> Optimizer:
        """The optimizer's entry in the table."""
        return OPTIMIZERS[self.optimizer]

    @property
    def base(self) -> BaseShape | None:
        """The shape of muP's base model; None in the standard parametrization."""
        if self.parametrization == "standard":
            return None
        return BaseShape(self.base_hidden_dim, self.base_num_layers, self.base_head_dim)

    @property
    def momentum_decay(self) -> float:
        """`momentum`, or the optimizer's default; 0 for none."""
        return (self.rule.momentum or 0.0) if self.momentum is None else self.momentum

    @property
    def moment_bytes(self) -> int:
        """Bytes that the optimizer keeps for one parameter.

        For Muon, it is the figure inside the blocks. Adafactor's factors are not counted.

        >>> OptimizerOptions().moment_bytes, OptimizerOptions(moment_dtype="bfloat16").moment_bytes
        (8, 4)
        """
        moments = self.rule.moments or int(self.momentum_decay > 0)
        average = 4 if self.rule.averages_weights else 0
        return moments * {"float32": 4, "bfloat16": 2}[self.moment_dtype] + average
