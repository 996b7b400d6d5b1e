"""Check a search space before the first trial: refused combinations, and flags without effect."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError, brief
from consyn_jax.tuning.search_space import Dimension, as_text

MOST_VALUES = 1000  # values of a range of whole numbers to check
MOST_POINTS = 2000  # combinations of values to check
MOST_LISTED = 12  # values in a message
Made = TypeVar("Made")


def check_space(
    space: Sequence[Dimension],
    check: Callable[[Mapping[str, Any]], Made],
    plain: UserError | None = None,
) -> list[Made]:
    """Check the runs at the points of the search space that `points_to_check` selects.

    Args:
        check: function that resolves a run, given the values of the searched flags.
        plain: the error of the command without `--search`; None if it has none. If the first
            refused trial has the same error, `--search` is not the cause, and the error is raised
            unchanged.

    Returns:
        The results of `check`.

    Raises:
        UserError: a run is refused; the message names its values, and what to write instead.
    """
    points = points_to_check(space)
    passed: list[Made] = []
    refused: list[tuple[dict[str, Any], UserError]] = []
    for values in points:
        try:
            passed.append(check(values))
        except UserError as error:
            refused.append((values, error))
    if not refused:
        return passed
    values, first = refused[0]
    if str(first) == str(plain):
        raise first
    advice = _advice(space, [values for values, _ in refused])
    reason = str(first) if advice is None else f"{brief(first)}. {advice}"
    raise refusal(values, reason) from first


def refusal(values: Mapping[str, Any], reason: str) -> UserError:
    """Build the error that refuses a trial.

    Args:
        values: the trial's values of the searched flags.
    """
    about = " ".join(f"--{name} {as_text(value)}" for name, value in values.items())
    return UserError(f"A trial of --search with {about} is refused: {reason}")


def points_to_check(space: Sequence[Dimension]) -> list[dict[str, Any]]:
    """Return the combinations of `_values_to_check` for all searched flags.

    If there are more than `MOST_POINTS`, the result has the combinations that vary one flag at a
    time, and a random sample of all combinations.
    """
    values = [_values_to_check(dimension) for dimension in space]
    if math.prod(map(len, values)) <= MOST_POINTS:
        points = list(itertools.product(*values))
    else:
        first, draw = [each[0] for each in values], random.Random(0)
        points = [
            (*first[:i], value, *first[i + 1 :]) for i, each in enumerate(values) for value in each
        ]
        points += [tuple(draw.choice(each) for each in values) for _ in range(MOST_POINTS)]
    names = [dimension.name for dimension in space]
    return [dict(zip(names, point, strict=True)) for point in points]


def _values_to_check(dimension: Dimension) -> Sequence[Any]:
    """Return all choices of a list, the ends of a range, and the numbers in a whole-number range.

    The ends come first, since messages name the first value that is refused.
    """
    if not dimension.is_whole:
        return dimension.ends
    inside = range(int(dimension.low) + 1, int(dimension.high))
    if len(inside) > MOST_VALUES:
        return *dimension.ends, *sorted(random.Random(0).sample(inside, MOST_VALUES))
    return *dimension.ends, *inside


def _advice(space: Sequence[Dimension], refused: Sequence[Mapping[str, Any]]) -> str | None:
    """Say which values to write instead of a whole-number range, so that none is refused."""
    best: tuple[float, str] | None = None
    for dimension in space:
        if not dimension.is_whole:
            continue
        values = sorted(_values_to_check(dimension))
        bad = {point[dimension.name] for point in refused}
        good = [value for value in values if value not in bad]
        share = len(good) / len(values)
        if good and (best is None or share > best[0]):
            is_complete = len(values) == dimension.high - dimension.low + 1
            best = share, _instead(dimension, good, is_complete)
    return None if best is None else best[1]


def _instead(dimension: Dimension, good: Sequence[int], is_complete: bool) -> str:
    name = dimension.name
    if len(good) == 1:
        return f"Write --{name} {good[0]} instead of --search {dimension.text()}."
    if is_complete and good[-1] - good[0] == len(good) - 1:
        scale = ":log" if dimension.is_log else ""
        return f"Write --search {name}={good[0]}:{good[-1]}{scale}."
    count = min(len(good), MOST_LISTED)
    shown = [good[round(i * (len(good) - 1) / (count - 1))] for i in range(count)]
    return f"Write --search {name}={','.join(map(str, shown))}."


# ----------------------------------------------------------------------------- flags without effect


def _scheduler(*names: str) -> Callable[[RunConfig], str | None]:
    """Rule of a flag that only these schedules use."""
    return lambda run: (
        None if run.optimizer.scheduler in names else f"without --scheduler {' or '.join(names)}"
    )


def _not_scheduler(*names: str) -> Callable[[RunConfig], str | None]:
    """Rule of a flag that all schedules except these use."""
    return lambda run: (
        f"with --scheduler {run.optimizer.scheduler}" if run.optimizer.scheduler in names else None
    )


def _of_optimizer(name: str) -> Callable[[RunConfig], str | None]:
    """Rule of a flag that some optimizers do not use."""
    return lambda run: (
        f"with --optimizer {run.optimizer.optimizer}" if name in run.optimizer.rule.unused else None
    )


def _warmup_ratio(run: RunConfig) -> str | None:
    if run.optimizer.warmup_steps is not None:
        return "beside --warmup_steps"
    return _not_scheduler("constant")(run)


def _base(run: RunConfig) -> str | None:
    return None if run.optimizer.base is not None else "without --parametrization mup"


def _moment_dtype(run: RunConfig) -> str | None:
    options = run.optimizer
    if options.rule.moments or options.momentum_decay:
        return None
    return f"with --optimizer {options.optimizer} and no --momentum"


def _max_nonfinite_steps(run: RunConfig) -> str | None:
    return None if run.optimizer.on_nonfinite == "skip" else "without --on_nonfinite skip"


# By flag, a function that says why the flag has no effect in a run; None if it has one. Flags that
# are refused in such a run, such as --dpo_beta, --lora_alpha and --momentum, are not listed.
NO_EFFECT: Mapping[str, Callable[[RunConfig], str | None]] = {
    "num_cycles": _scheduler("cosine_with_restarts"),
    "power": _scheduler("polynomial"),
    **dict.fromkeys(("decay_ratio", "decay_shape"), _scheduler("wsd")),
    **dict.fromkeys(
        ("plateau_factor", "plateau_patience", "plateau_cooldown", "plateau_threshold"),
        _scheduler("plateau"),
    ),
    "min_lr_ratio": _not_scheduler("constant", "constant_with_warmup", "inverse_sqrt"),
    "warmup_steps": _not_scheduler("constant"),
    "warmup_ratio": _warmup_ratio,
    **dict.fromkeys(("base_hidden_dim", "base_num_layers", "base_head_dim"), _base),
    **{name: _of_optimizer(name) for name in ("beta1", "beta2", "eps")},
    "moment_dtype": _moment_dtype,
    "max_nonfinite_steps": _max_nonfinite_steps,
}


def check_effects(space: Sequence[Dimension], runs: Sequence[RunConfig]) -> None:
    """Check that every searched flag has an effect in some run.

    `consyn-train` accepts a flag without effect, because a recipe has the values of all flags. But
    a search over such a flag would train equal trials.

    Args:
        runs: runs at points of the search space.

    Raises:
        UserError: a flag has no effect in any of the runs.
    """
    for dimension in space:
        if dimension.name not in NO_EFFECT:
            continue
        reasons = [NO_EFFECT[dimension.name](run) for run in runs]
        if all(reasons):
            raise UserError(
                f"--search {dimension.text()} has no effect {reasons[0]}. Leave {dimension.name} "
                "out of --search, or change the other setting."
            )
