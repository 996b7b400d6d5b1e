"""The settings of `consyn-tune`: those of the runs and those of the search.

JAX is not imported, so that `consyn-tune --help` is quick.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from consyn_jax.config import PRESETS, RunConfig
from consyn_jax.errors import UserError, nearest
from consyn_jax.evaluation_metrics import EVALUATION_METRICS, is_greater_better
from consyn_jax.flags import flag, flags, flat, grouped
from consyn_jax.integers import natural
from consyn_jax.model_config import WEIGHT_SHAPES
from consyn_jax.resolve import merge
from consyn_jax.tuning.ladder.ladder_options import (
    LadderOptions,
    check_given,
    check_ladder,
    check_run,
    parse_sizes,
)
from consyn_jax.tuning.ladder.model_family import ladder_shapes
from consyn_jax.tuning.search_space import Dimension, parse_search
from consyn_jax.tuning.space.space_checks import check_effects, check_space
from consyn_jax.tuning.varied_run import Settings, VariedRun

SAMPLERS = ("tpe", "random", "qmc", "grid")
PRUNERS = ("median", "halving", "hyperband", "none")
AUTO = "auto"
TRIALS = 20  # number of trials of a study without a limit
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# Flags of training that a study does not support, with the reason.
NOT_HERE = {
    "streaming": "a study prepares its data once, for all trials",
    **dict.fromkeys(
        ("distributed", "coordinator_address", "num_processes", "process_id", "rendezvous_seconds"),
        "a trial runs in one process; start consyn-tune several times with the same --output",
    ),
    "decay_from": "a trial starts at step 0",
    "remote": "a study has many runs, but a bucket URL stores only one",
    "resume": "consyn-tune always continues the study in --output",
    "overwrite_schedule": "every trial has its own schedule",
    **dict.fromkeys(
        ("topology", "fit", "verbose", "replay", "verify", "replay_step", "documents_of", "json"),
        "it is for consyn-train",
    ),
}


@dataclass(frozen=True)
class StudyOptions:
    """The search space, the budget of the study, and Optuna's methods."""

    search: tuple[str, ...] = flag(
        (),
        "flags to vary and their values, as in lr=1e-4:1e-2:log (a range on a logarithmic "
        "scale), weight_decay=0:0.3 (a range) or optimizer=adamw,muon (a list)",
    )
    trials: int | None = flag(
        None,
        "number of trials in the whole study, including the trials of other processes and of "
        f"earlier commands ({TRIALS}; with --sampler grid: all points; with --time_budget: no "
        "limit)",
    )
    time_budget: str | None = flag(
        None,
        "start no new trial once the command has run this long, such as 90s, 30m, 8h or 2d",
    )
    metric: str | None = flag(None, "evaluation metric to optimise (from --metric_for_best_model)")
    sampler: str = flag(
        "tpe", "Optuna's method of choosing the values of the next trial", choices=SAMPLERS
    )
    pruner: str = flag("median", "Optuna's method of choosing trials to end early", choices=PRUNERS)
    vectorize: str | None = flag(
        None,
        "train several trials of a small model side by side in one program; N: number of "
        "trials; auto: the number that fits in memory and gives the most trials per hour (without "
        "this flag: one trial after the other)",
    )
    storage: str | None = flag(
        None,
        "URL of a database for the study, so that processes on several hosts can work on it "
        "(default: a journal file in --output); all hosts must share --output",
    )


@dataclass(frozen=True)
class StudyConfig:
    """The settings of the search, which only `consyn-tune` has."""

    study: StudyOptions = StudyOptions()
    ladder: LadderOptions = LadderOptions()  # noqa: RUF009 - it is frozen


@dataclass(frozen=True)
class TuneConfig(RunConfig):
    """All settings of one `consyn-tune` command."""

    study: StudyOptions = StudyOptions()
    ladder: LadderOptions = LadderOptions()  # noqa: RUF009 - it is frozen


_DEFAULTS = flat(TuneConfig())
_OF_ALL_SIZES = {"scheduler": "wsd"}


def resolve_tuning(
    given: Mapping[str, Any], file: Mapping[str, Any] | None = None, *, file_name: str = ""
) -> tuple[TuneConfig, dict[str, str]]:
    """Merge defaults, preset, file and flags, as `resolve.resolve` does for a run.

    The resulting run has the first value of each searched flag. With `--ladder`, it is the base run
    of the ladder.

    Raises:
        UserError: a name is unknown, a value is invalid, or the search space contains an invalid
            run.
    """
    of_flags, own = _split(given)
    of_file, own_of_file = _split(file or {})
    origin = f"file {file_name}"
    _check_search_of_file(own_of_file.get("search", []), origin)
    values, origins = merge(StudyConfig, ((own_of_file, origin), (own, "flag")))
    own_settings = grouped(StudyConfig, values)
    study, ladder = own_settings.study, own_settings.ladder
    check_ladder(ladder, study.search)
    run_values, _ = merge(RunConfig, ((of_file, origin), (of_flags, "flag")))
    if ladder.ladder is not None:
        check_given({**run_values, **values}, _DEFAULTS)
        _check_run(grouped(RunConfig, run_values))
        run = VariedRun(of_flags, of_file, file_name)
        config, run_origins = scaled_run(run)
        largest_size(run, ladder.ladder)
        return grouped(TuneConfig, {**flat(config), **values}), {**run_origins, **origins}
    _check_study(study)
    space = parse_search(study.search)
    check_sampler(study.sampler, space)
    _check_given(space, of_flags)
    _check_run(grouped(RunConfig, run_values))
    run = VariedRun(_with_metric(of_flags, of_file, study.metric), of_file, file_name)
    with _naming_metric(study.metric):
        config, run_origins = _first_run(run, space)
    if study.metric is None:
        values["metric"] = config.evaluation.metric_for_best_model
        origins["metric"] = "metric_for_best_model"
    return grouped(TuneConfig, {**flat(config), **values}), {**run_origins, **origins}


def _check_search_of_file(search: Any, origin: str) -> None:
    """Check that `search` in a config file is a list of texts, as on the command line.

    Raises:
        UserError: it has another form, such as a mapping, or one text for several flags.
    """
    is_list, known = isinstance(search, list), flags(RunConfig)
    items = search if is_list else [search]
    is_text = all(isinstance(item, str) for item in items)
    if not is_text or (not is_list and any(n in known for n in re.findall(r"\s(\w+)=", search))):
        raise UserError(
            f"search ({origin}) must be a list of FLAG=VALUES. Write search: "
            "['lr=1e-4:1e-2:log', 'optimizer=adamw,muon']."
        )


def _first_run(run: VariedRun, space: Sequence[Dimension]) -> Settings:
    """Check the runs of a search, and return the one with the first value of each searched flag.

    Raises:
        UserError: a run is refused, or a searched flag has no effect.
    """
    plain: UserError | None = None
    try:
        run.with_values({})
    except UserError as error:  # a value of --search may mend it
        plain = error
    runs = check_space(space, run.with_values, plain)
    config, origins = run.with_values({d.name: d.ends[0] for d in space})
    of_weights = [d.name for d in space if d.name in WEIGHT_SHAPES]
    if of_weights and config.model.checkpoint is not None:
        raise UserError(
            f"--search {of_weights[0]} cannot vary, because all trials start from the weights of "
            f"{config.model.checkpoint}, and the shapes of these weights are fixed. Leave "
            f"{of_weights[0]} out of --search, or leave "
            f"--{'checkpoint' if config.model.model in PRESETS else 'model'} out."
        )
    check_effects(space, [config for config, _ in runs])
    return config, origins


@contextmanager
def _naming_metric(metric: str | None) -> Iterator[None]:
    """If the user gave `--metric`, name it instead of `--metric_for_best_model` in errors."""
    try:
        yield
    except UserError as error:
        if metric is None:
            raise
        text = str(error).replace("--metric_for_best_model", "--metric")
        raise UserError(text) from error


def scaled_run(run: VariedRun) -> Settings:
    """The base run that a ladder scales.

    Raises:
        UserError: the run does not suit a ladder.
    """
    config, origins = run.with_values(_OF_ALL_SIZES)
    check_run(config)
    return config, origins


def largest_size(run: VariedRun, sizes: str) -> Settings:
    """Return the settings of the run with the largest model of a ladder.

    Args:
        sizes: the value of `--ladder`.

    Raises:
        UserError: the sizes do not suit the model.
    """
    shapes = ladder_shapes(scaled_run(run)[0].model, parse_sizes(sizes))
    return run.with_values({**_OF_ALL_SIZES, **shapes[-1].flags})


def _split(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split values into the settings of the run and of the study."""
    own = flags(StudyConfig)
    of_study = {name: value for name, value in settings.items() if name.replace("-", "_") in own}
    return {name: value for name, value in settings.items() if name not in of_study}, of_study


def _with_metric(
    given: Mapping[str, Any], file: Mapping[str, Any], metric: str | None
) -> dict[str, Any]:
    """Return the flags `given`, with `metric` as the value of `--metric_for_best_model`.

    Raises:
        UserError: the user gives another value of `--metric_for_best_model`.
    """
    name = "metric_for_best_model"
    other = given.get(name, file.get(name))
    if metric is None:
        return dict(given)
    if other is not None and other != metric:
        raise UserError(
            f"--metric {metric} and --{name} {other} differ, but a study has only one metric. "
            "Leave one of the two flags out."
        )
    return {**given, name: metric}


def seconds(text: str) -> float:
    """Parse `--time_budget` into seconds.

    Raises:
        UserError: the value is not a number with a unit.

    >>> seconds("90s"), seconds("1.5h")
    (90.0, 5400.0)
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?) ?([smhd])", text.strip())
    if match is None or not float(match[1]):
        raise UserError(f"--time_budget must be a time such as 90s, 30m, 8h or 2d, not {text!r}.")
    return float(match[1]) * _SECONDS[match[2]]


def parse_lanes(text: str) -> int | None:
    """Parse `--vectorize`: the number of trials that train together, or None for auto.

    Raises:
        UserError: the value is neither a number nor auto.

    >>> parse_lanes("8"), parse_lanes("auto")
    (8, None)
    """
    number = natural(text)
    if text != AUTO and not number:
        raise UserError(f"--vectorize must be a number of trials such as 8, or auto, not {text!r}.")
    return number


def _check_study(study: StudyOptions) -> None:
    """Check the settings of the study, independently of the run.

    Raises:
        UserError: a setting is missing or wrong.
    """
    if not study.search:
        raise UserError(
            "No flag varies. Give --search, as in --search lr=1e-4:1e-2:log "
            "weight_decay=0:0.3, or --ladder."
        )
    if study.trials is not None and study.trials < 1:
        raise UserError(f"--trials must be at least 1, not {study.trials}.")
    if study.time_budget is not None:
        seconds(study.time_budget)
    if study.vectorize is not None:
        parse_lanes(study.vectorize)
    if study.metric is not None and is_greater_better(study.metric) is None:
        known = tuple(EVALUATION_METRICS)
        raise UserError(
            f"--metric {study.metric} is not an evaluation metric{nearest(study.metric, known)} "
            f"Known: {', '.join(known)}, or a metric of --eval_requests."
        )


def check_sampler(sampler: str, space: Sequence[Dimension]) -> None:
    """Check that a sampler can draw from a search space.

    Raises:
        UserError: the sampler needs lists of values, but a flag has a range.
    """
    if sampler == "grid" and (ranges := [d.text() for d in space if not d.choices]):
        raise UserError(
            f"--sampler grid needs lists of values, but --search {ranges[0]} is a range. Give "
            f"{ranges[0].partition('=')[0]}=A,B,C, or use --sampler qmc."
        )


def _check_given(space: Sequence[Dimension], of_flags: Mapping[str, Any]) -> None:
    """Check that no flag of the command line is also searched.

    Raises:
        UserError: a flag has a value on the command line, and values in `--search`.
    """
    given = {name.replace("-", "_"): value for name, value in of_flags.items()}
    for dimension in space:
        names = (dimension.name, *flags(RunConfig)[dimension.name].aliases)
        if found := next((name for name in names if name in given), None):
            raise UserError(
                f"--{found} {given[found]} and --search {dimension.text()} set the same flag. "
                "Leave one of the two out."
            )


def _check_run(config: RunConfig) -> None:
    """Check that the run suits a study.

    Raises:
        UserError: a study does not support a flag of the run, or there are no evaluations.
    """
    known = flags(RunConfig)
    for name, reason in NOT_HERE.items():
        if getattr(getattr(config, known[name].group), name) != known[name].default:
            raise UserError(f"--{name} does not work with consyn-tune: {reason}. Leave it out.")
    data = config.data
    if not (data.validation or data.validation_fraction > 0):
        raise UserError(
            "A study compares evaluations, but --validation_fraction 0 leaves no data for "
            "them. Give --validation or a larger fraction."
        )
