"""Compiled programs shared by trials that differ only in numbers, such as the learning rate.

In `consyn-train`, learning rates, decay, betas, clipping, dropout and seed are constants of the
train step. Here they are arrays in the batch, under the key `NUMBERS`. The code is the same:
`with_numbers` puts these arrays into a `Program`, which then makes its usual train step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from consyn_jax.config import RunConfig
from consyn_jax.flags import flags
from consyn_jax.model.parameters import Params
from consyn_jax.model_config import ModelConfig
from consyn_jax.training.optim.groups import mup_rates
from consyn_jax.training.optim.optimizers import build_optimizer
from consyn_jax.training.optim.schedules import build_schedule
from consyn_jax.training.program import TRAIN_AXES, Program
from consyn_jax.training.program_arguments import is_used
from consyn_jax.training.run.identity import SCHEDULE_FLAGS
from consyn_jax.training.step import Batch, Metrics, Step, TrainState, new_scales
from consyn_jax.tuning.search_space import Dimension, as_text
from consyn_jax.tuning.varied_run import VariedRun
from consyn_jax.validation import parse_multipliers

NUMBERS = "numbers"  # key in a batch: a trial's numeric hyperparameters by flag, and its rates
RATES = "rates"  # the learning rate of each update [steps]
MULTIPLIERS = "lr_multipliers"  # by group
Numbers = dict[str, Any]

_OF_OPTIMIZER = ("weight_decay", "beta1", "beta2", "eps", "momentum")
# A 0 turns each of these off, and the program then has no code for it.
_OF_TRAINING = ("dropout", "label_smoothing", "z_loss")
_ARGUMENTS = {*_OF_OPTIMIZER, *_OF_TRAINING, "max_grad_norm", "seed", MULTIPLIERS}
# The host applies the plateau schedule, so the program does not depend on these settings.
_OF_HOST = {"plateau_factor", "plateau_patience", "plateau_cooldown", "plateau_threshold"}
_GROUPS = {"model", "budget", "optimizer", "regularisation", "lora", "hardware"}
# Flags whose values trials may change without another program. Exceptions: the program depends on
# whether momentum and the flags of `_OF_TRAINING` are 0, on whether the schedule is plateau, and on
# which groups have a multiplier.
FREE_FLAGS = frozenset(SCHEDULE_FLAGS | {"decay_from"} | _ARGUMENTS | _OF_HOST)
Made = TypeVar("Made")


def numbers_of(run: RunConfig, total_steps: int, num_rates: int | None = None) -> Numbers:
    """The numeric hyperparameters of a run, as arguments of its train step.

    Momentum and the flags of `_OF_TRAINING` are left out if they are 0.

    Args:
        num_rates: length of the array of learning rates; by default, the number of steps of the
            run. A longer array, padded with zeros, fits a program shared with longer runs.
    """
    options = run.optimizer
    rates = build_schedule(options, total_steps)(np.arange(total_steps))
    found: dict[str, Any] = {name: getattr(options, name) for name in _OF_OPTIMIZER}
    found["momentum"] = options.momentum_decay or None
    found["max_grad_norm"] = options.max_grad_norm or np.inf
    found |= {name: getattr(run.regularisation, name) or None for name in _OF_TRAINING}
    used = {name: np.float32(value) for name, value in found.items() if value is not None}
    rates = np.broadcast_to(np.asarray(jax.device_get(rates), np.float32), (total_steps,))
    if num_rates is not None:
        rates = np.pad(rates, (0, num_rates - total_steps))
    multipliers = parse_multipliers(options.lr_multipliers)
    used |= {MULTIPLIERS: jax.tree.map(np.float32, multipliers)}
    return {**used, RATES: rates, "seed": np.uint32(run.budget.seed)}


def with_numbers(program: Program, run: RunConfig, numbers: Numbers) -> Program:
    """Replace the numeric hyperparameters of a program.

    Args:
        program: the program of `run`.
        numbers: result of `numbers_of`; its values may be traced.
    """
    rates = numbers[RATES]
    own = {name: numbers[name] for name in _OF_OPTIMIZER if name in numbers}
    axes, options = program.layout.logical_axes, replace(run.optimizer, **own)
    of_training = {name: numbers.get(name, 0.0) for name in _OF_TRAINING}
    factors, multipliers = mup_rates(program.config, options, axes), numbers[MULTIPLIERS]
    return replace(
        program,
        optimizer=build_optimizer(
            options, lambda updates: rates[updates], axes, factors, multipliers
        ),
        max_grad_norm=numbers["max_grad_norm"],
        regularisation=replace(program.regularisation, **of_training),
        seed=numbers["seed"],
    )


def program_key(run: RunConfig, model: ModelConfig, total_steps: int) -> Hashable:
    """A key that identifies a trial's program: trials with equal keys differ only in numbers.

    Every flag is part of the key unless it is listed in `FREE_FLAGS`. If a new flag is not listed,
    the only cost is an additional compilation.
    """
    return repr(model), constants_of(run), run.row_length, total_steps


def constants_of(run: RunConfig) -> Hashable:
    """Values of the flags that are constants in a run's program."""
    known = flags(RunConfig)
    constants = tuple(
        (name, getattr(getattr(run, flag.group), name))
        for name, flag in known.items()
        if flag.group in _GROUPS and name not in FREE_FLAGS
    )
    options = run.optimizer
    features = (
        is_used(options.momentum_decay),
        *(is_used(getattr(run.regularisation, name)) for name in _OF_TRAINING),
        options.scheduler == "plateau",
        tuple(sorted(parse_multipliers(options.lr_multipliers))),
    )
    return constants, features


def flags_of_programs(space: Sequence[Dimension], varied: VariedRun) -> list[Dimension]:
    """The searched flags whose values are constants of the compiled program."""
    first, found = {dimension.name: dimension.ends[0] for dimension in space}, []
    for dimension in space:
        runs = (varied.with_values({**first, dimension.name: end})[0] for end in dimension.ends)
        if len({constants_of(run) for run in runs}) > 1:
            found.append(dimension)
    return found


def compiled_values(space: Sequence[Dimension], varied: VariedRun) -> tuple[list[str], list[str]]:
    """Find which values of the searched flags need a separate program.

    For a range, only the ends and the middle are examined.

    Returns:
        (flags, values). `flags` are those whose values all need separate programs. For the other
        flags, `values` are texts such as "dropout 0": a value that cannot use the same program as
        most values of its flag.
    """
    first = {dimension.name: dimension.ends[0] for dimension in space}
    flags_, others = list[str](), list[str]()
    for d in flags_of_programs(space, varied):
        middle = (
            () if d.choices else ((d.low + d.high) // 2 if d.is_whole else (d.low + d.high) / 2,)
        )
        by_program: dict[Hashable, list[Any]] = {}
        for value in dict.fromkeys((*d.ends, *middle)):
            run = varied.with_values({**first, d.name: value})[0]
            by_program.setdefault(constants_of(run), []).append(value)
        groups = sorted(by_program.values(), key=len)
        if len(groups[-1]) == 1:
            flags_.append(d.name)
        else:
            others += [f"{d.name} {' or '.join(map(as_text, g))}" for g in groups[:-1]]
    return flags_, others


@dataclass(frozen=True)
class BoundStep:
    """A compiled train step that always uses the numeric hyperparameters of one trial.

    Attributes:
        compiled: a `jax.stages.Compiled`, or an object with its interface.
    """

    compiled: Any
    numbers: Numbers

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Take an optimizer step with the trial's hyperparameters."""
        return self.compiled(state, batch | {NUMBERS: self.numbers})

    def memory_analysis(self) -> Any:
        """Memory analysis of the compiled program."""
        return self.compiled.memory_analysis()

    def as_text(self) -> str | None:
        """The compiled program as text."""
        text: str | None = self.compiled.as_text()
        return text


@dataclass(frozen=True)
class _Ready:
    """A compiled program with the interface of a lowered one."""

    compiled: Any

    def compile(self) -> Any:
        """Return the compiled program."""
        return self.compiled


class SharedPrograms:
    """Compiled programs, by the key of the trials that can share them."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self._made)

    def once(self, kind: str, key: Hashable, make: Callable[[], Made]) -> Made:
        """Return the result of `make` for this kind and key; call `make` only the first time."""
        if (kind, key) not in self._made:
            self._made[kind, key] = make()
        found: Made = self._made[kind, key]
        return found

    def bound_step(
        self, program: Program, run: RunConfig, total_steps: int, num_rates: int | None = None
    ) -> BoundStep:
        """Compile the train step of a trial, or reuse the step of a trial with the same key.

        Args:
            program: the trial's program, not yet compiled.
            num_rates: length of the array of learning rates; by default, the number of steps.

        Returns:
            The step, which always uses the numeric hyperparameters of this trial.
        """
        numbers = placed(numbers_of(run, total_steps, num_rates), program.mesh)
        key = program_key(run, program.config, num_rates or total_steps)

        def make() -> jax.stages.Compiled:
            batch = batch_of_step(program, run, numbers)
            return program.lower_step(numbered_step(program, run), batch).compile()

        return BoundStep(self.once("step", key, make), numbers)

    def evaluation(self, program: Program, key: Hashable, batch_size: int, length: int) -> Any:
        """Compile the evaluation of a batch, or reuse an evaluation with the same key and shape.

        Args:
            program: the trial's program, not yet compiled.
            key: result of `program_key` for the trial.
        """

        def make() -> jax.stages.Compiled:
            return Program.lower_eval_step(program, batch_size, length).compile()

        return self.once("evaluation", (key, batch_size, length), make)


def placed(numbers: Numbers, mesh: Mesh) -> Numbers:
    """Replicate the numeric hyperparameters of a trial on all devices of a mesh."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    found: Numbers = jax.device_put(numbers, everywhere)
    return found


def numbered_step(program: Program, run: RunConfig) -> Step:
    """A train step that reads the numeric hyperparameters of a trial from `batch[NUMBERS]`."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        arrays = {name: values for name, values in batch.items() if name != NUMBERS}
        return with_numbers(program, run, batch[NUMBERS]).train_step()(state, arrays)

    return train_step


def batch_of_step(program: Program, run: RunConfig, numbers: Numbers) -> Batch:
    """Shapes, dtypes and shardings of a batch for the train step that `numbered_step` returns."""
    budget = run.budget
    shape = budget.gradient_accumulation_steps, budget.batch_size, run.row_length
    batch = program.batch_like(shape, TRAIN_AXES) | program.base_like
    batch[NUMBERS] = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), numbers
    )
    return batch


@dataclass(frozen=True)
class TrialProgram(Program):
    """The program of a trial, compiled once for all trials with the same key.

    Args:
        shared: the compiled programs.
        run: the configuration of the trial.
        total_steps: number of steps of the trial.
    """

    shared: SharedPrograms | None = None
    run: RunConfig | None = None
    total_steps: int = 0

    @property
    def _key(self) -> tuple[SharedPrograms, RunConfig, Hashable]:
        assert self.shared is not None
        assert self.run is not None
        return self.shared, self.run, program_key(self.run, self.config, self.total_steps)

    def initial_state(self, params: Params) -> TrainState:
        """The state at step 0 with these parameters, as in `Program.initial_state`."""
        if self.host_moments:  # made one by one, because the device cannot hold all moments
            return super().initial_state(params)
        shared, run, key = self._key
        numbers = placed(numbers_of(run, self.total_steps), self.mesh)
        like = self.state_like
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)

        def make(numbers: Numbers, params: Params) -> Any:
            zero = jnp.int32(0)
            opt_state = with_numbers(self, run, numbers).rule.init(params)
            return opt_state, zero, zero

        parts = shardings.opt_state, shardings.step, shardings.nonfinite
        compiled = shared.once("state", key, lambda: jax.jit(make, out_shardings=parts))
        opt_state, step, nonfinite = compiled(numbers, params)
        return TrainState(step, params, opt_state, nonfinite, new_scales(like.scales))

    def lower_eval_step(self, batch_size: int, length: int) -> Any:
        """Return an object whose `compile()` returns the compiled evaluation.

        Trials with the same key share one compiled evaluation.
        """
        shared, _, key = self._key
        return _Ready(shared.evaluation(self, key, batch_size, length))
