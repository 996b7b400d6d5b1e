"""The settings of `consyn-tune --ladder`, and checks that need neither data nor JAX."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from consyn_jax.config import PRESETS, RunConfig
from consyn_jax.errors import UserError, nearest
from consyn_jax.flags import flag
from consyn_jax.integers import natural

RUNGS, FEWEST_RUNGS, MOST_RUNGS = 4, 3, 32
TOKENS_PER_PARAMETER = 20.0  # compute-optimal in Hoffmann et al. (2022)
BUDGETS = ("flops", "tokens")
# Flags of training and of a search that a ladder does not support, with the reason.
_NOT_HERE = {
    "checkpoint": "all sizes start from new weights",
    "lora_rank": "all sizes start from new weights",
    "early_stopping_patience": "every run must reach its last step",
    "save_steps": "a ladder itself decides which checkpoints to save",
    "keep_every": "a ladder itself decides which checkpoints to save",
    **dict.fromkeys(
        ("trials", "time_budget", "sampler", "pruner", "vectorize", "storage"), "it is for --search"
    ),
    "metric": "a scaling law predicts eval/loss",
    "metric_for_best_model": "a scaling law predicts eval/loss",
}


@dataclass(frozen=True)
class LadderOptions:
    """The sizes of a ladder, their training budget, and the budgets to predict for."""

    ladder: str | None = flag(
        None,
        "instead of --search: train models of several sizes, and predict the loss of larger "
        f"ones; N: number of sizes (the bare flag means {RUNGS}), where --model is the largest; "
        "SIZE,...: sizes in parameters without embeddings, such as 1e5,2e5,4e5",
        const=str(RUNGS),
    )
    tokens_per_parameter: float = flag(
        TOKENS_PER_PARAMETER, "with --ladder: training tokens per parameter, for every size"
    )
    predict: tuple[str, ...] = flag(
        (),
        "with --ladder: budgets for which to predict losses, such as flops=1e20 or tokens=20e9; "
        "a budget in FLOPs also predicts the best model size; without this flag, "
        "--tokens_per_parameter gives the budgets",
    )


@dataclass(frozen=True)
class Budget:
    """A budget for a prediction: an `amount` of FLOPs or tokens; `kind` is one of `BUDGETS`."""

    kind: str
    amount: float


def parse_sizes(text: str) -> int | tuple[float, ...]:
    """Parse `--ladder`: return the number of sizes, or the sizes in parameters, ascending.

    Raises:
        UserError: the value has neither form, or gives too few sizes.

    >>> parse_sizes("4"), parse_sizes("4e5,1e5,2e5")
    (4, (100000.0, 200000.0, 400000.0))
    """
    count = natural(text)
    if count is not None:
        if count > MOST_RUNGS:
            raise UserError(
                f"--ladder {text} is a number of sizes above {MOST_RUNGS}, the most that a ladder "
                "trains. Give fewer, or at least three sizes in parameters such as 1e5,2e5,4e5."
            )
        if count < FEWEST_RUNGS:
            raise UserError(
                f"--ladder {text} gives too few sizes to fit a curve. Use at least {FEWEST_RUNGS}."
            )
        return count
    sizes = [_number(part) for part in text.split(",")]
    if not all(size is not None and size >= 1 for size in sizes):
        raise UserError(
            f"--ladder must be a number of sizes up to {MOST_RUNGS}, or sizes in parameters such "
            f"as 1e5,2e5,4e5, not {text!r}."
        )
    if len(set(sizes)) < FEWEST_RUNGS:
        raise UserError(
            f"--ladder {text} gives too few sizes to fit a curve. Name at least {FEWEST_RUNGS}."
        )
    return tuple(sorted({size for size in sizes if size is not None}))


def parse_budgets(words: tuple[str, ...]) -> tuple[Budget, ...]:
    """Parse the budgets of `--predict`.

    Raises:
        UserError: a budget is not flops=X or tokens=X.

    >>> parse_budgets(("flops=1e20",))
    (Budget(kind='flops', amount=1e+20),)
    """
    found = []
    for word in words:
        kind, _, text = word.partition("=")
        amount = _number(text)
        if kind not in BUDGETS or amount is None or amount <= 0:
            raise UserError(
                f"--predict must be flops=X or tokens=X with a number above 0, not {word!r}."
            )
        found.append(Budget(kind, amount))
    return tuple(found)


def check_ladder(options: LadderOptions, search: tuple[str, ...]) -> None:
    """Check the settings of a ladder, independently of the run.

    Raises:
        UserError: a setting is wrong, or has no effect without --ladder.
    """
    if options.ladder is None:
        for name, default in vars(LadderOptions()).items():
            if getattr(options, name) != default:
                raise UserError(f"--{name} is for --ladder. Add --ladder, or leave --{name} out.")
        return
    if search:
        raise UserError(
            "--search and --ladder are two studies. Search on a small model first, then give its "
            "recipe to consyn-tune --ladder with --config."
        )
    parse_sizes(options.ladder)
    parse_budgets(options.predict)
    if not 0 < options.tokens_per_parameter < math.inf:
        raise UserError(
            f"--tokens_per_parameter must be above 0, not {options.tokens_per_parameter:g}."
        )


def check_given(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse flags of the user that a ladder does not support.

    Args:
        values: values of all flags by name, defaults included.
        defaults: default of each flag.

    Raises:
        UserError: a flag that is not supported has a value other than its default.
    """
    for name, reason in _NOT_HERE.items():
        if values[name] != defaults[name]:
            raise UserError(f"--{name} does not work with --ladder: {reason}. Leave it out.")
    if values["scheduler"] not in ("wsd", defaults["scheduler"]):
        raise UserError(
            f"--scheduler {values['scheduler']} does not work with --ladder, because shorter runs "
            "begin where the learning rate of wsd is constant. Leave --scheduler out."
        )


def check_run(run: RunConfig) -> None:
    """Check that the base run suits a ladder.

    Raises:
        UserError: its model is not a preset, or its optimizer does not decay the learning rate.
    """
    if run.model.model not in PRESETS:
        raise UserError(
            f"--ladder scales a preset, but --model {run.model.model} is not "
            f"one{nearest(run.model.model, PRESETS)} Use {', '.join(PRESETS)}."
        )
    if run.optimizer.rule.averages_weights:
        raise UserError(
            f"--optimizer {run.optimizer.optimizer} averages its weights instead of lowering "
            "the learning rate, but the runs of a ladder end with a decay of the rate. Use "
            "adamw or muon."
        )
    if run.optimizer.decay_ratio == 1:
        raise UserError(
            "--decay_ratio 1 leaves no steps before the decay, where the runs of a size branch. "
            "Use 0.2."
        )


def _number(text: str) -> float | None:
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None
