"""Compile the train step and the evaluation for all lanes at once, with `jax.vmap`.

A lane is a thread that trains one trial after another (see `lane.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from consyn_jax.config import RunConfig
from consyn_jax.distributed.compiler import compiler_options
from consyn_jax.errors import UserError
from consyn_jax.training.program import EVAL_AXES, Program
from consyn_jax.training.runtime.memory import (
    GIB,
    device_bytes,
    explain_out_of_memory,
    step_memory,
)
from consyn_jax.training.step import Batch
from consyn_jax.tuning.lanes.lane import Lane
from consyn_jax.tuning.search_space import parse_search
from consyn_jax.tuning.shared_programs import (
    NUMBERS,
    RATES,
    BoundStep,
    Numbers,
    SharedPrograms,
    batch_of_step,
    flags_of_programs,
    numbered_step,
    numbers_of,
    placed,
    program_key,
)
from consyn_jax.tuning.trial_trainer import TrialTrainer
from consyn_jax.tuning.tune_options import TuneConfig
from consyn_jax.tuning.varied_run import VariedRun

GROWTH = 1.1  # `auto` doubles the lanes if the steps per second grow by at least this factor
FEWEST, MEASURED_S = 4, 1.0  # a measurement takes at least this many steps and seconds
# Flags with one value that needs another program, and advice to leave this value out.
_REMEDIES = {
    **dict.fromkeys(("dropout", "label_smoothing", "momentum", "z_loss"), "Begin it above 0"),
    "scheduler": "Remove plateau from its values",
}


@dataclass
class LanesStep:
    """The train step of all lanes. A call takes the state and the batch of each lane.

    The states are donated.

    Attributes:
        spare: placeholder states for lanes that have ended, because the program needs a state for
            each lane.
    """

    compiled: jax.stages.Compiled
    lanes: int
    state_like: Any
    spare: dict[int, Any] = field(default_factory=dict)
    waits = True

    def __call__(self, calls: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Take an optimizer step in each lane of `calls`."""
        batch = next(iter(calls.values()))[1]
        ended = [i for i in range(self.lanes) if i not in calls]
        states = {i: self.spare.get(i) or _zeros(self.state_like) for i in ended}
        batches = dict.fromkeys(ended, batch)
        for i, (state, own) in calls.items():
            states[i], batches[i] = state, own
        order = range(self.lanes)
        found = self.compiled(tuple(states[i] for i in order), tuple(batches[i] for i in order))
        self.spare = {i: found[i][0] for i in ended}
        return {i: found[i] for i in calls}


@dataclass(frozen=True)
class LanesEvaluation:
    """The evaluation of all lanes, called with parameters and a batch per lane."""

    compiled: jax.stages.Compiled
    lanes: int
    waits = False

    def __call__(self, calls: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Evaluate a batch for each lane of `calls`."""
        any_call = next(iter(calls.values()))
        arguments = [calls.get(i, any_call) for i in range(self.lanes)]
        sums = self.compiled(*(tuple(each) for each in zip(*arguments, strict=True)))
        return {i: sums[i] for i in calls}


@dataclass(frozen=True)
class LaneCall:
    """One lane's handle for calling a program that runs for all lanes at once."""

    lane: Lane
    program: LanesStep | LanesEvaluation

    def __call__(self, *arguments: Any) -> Any:
        """Call the program with this lane's arguments; it runs when all lanes have called it."""
        return self.lane.call(self.program, *arguments)

    def memory_analysis(self) -> Any:
        """Memory analysis of the compiled program."""
        return self.program.compiled.memory_analysis()

    def as_text(self) -> str | None:
        """The compiled program as text."""
        return self.program.compiled.as_text()


class LanePrograms(SharedPrograms):
    """The compiled programs of a study, for a trial that runs in a lane.

    Args:
        shared: the programs of the study.
        lanes: number of lanes.
        lane: the lane in which the trial runs.
    """

    def __init__(self, shared: SharedPrograms, lanes: int, lane: Lane) -> None:
        self._made, self._lanes, self._lane = shared._made, lanes, lane

    def bound_step(
        self, program: Program, run: RunConfig, total_steps: int, num_rates: int | None = None
    ) -> BoundStep:
        """The compiled train step of all lanes, bound to the hyperparameters of this trial."""
        numbers = placed(numbers_of(run, total_steps, num_rates), program.mesh)
        step = lanes_step(self, program, run, numbers, self._lanes)
        return BoundStep(LaneCall(self._lane, step), numbers)

    def evaluation(self, program: Program, key: Hashable, batch_size: int, length: int) -> Any:
        """Return this lane's handle for the compiled evaluation of all lanes."""

        def make() -> LanesEvaluation:
            arguments = (
                program.state_like.params,
                program.batch_like((batch_size, length), EVAL_AXES),
            )
            lowered = _lowered(program, program.loss, arguments, self._lanes)
            return LanesEvaluation(lowered.compile(), self._lanes)

        place = key, batch_size, length, self._lanes
        return LaneCall(self._lane, self.once("evaluation", place, make))


def lanes_step(
    shared: SharedPrograms, program: Program, run: RunConfig, numbers: Numbers, lanes: int
) -> LanesStep:
    """Compile the train step for this number of lanes, or reuse the step of an earlier trial.

    Args:
        program: the program to compile; it is the same for all trials.
        run: the run of this trial.
        numbers: hyperparameters of this trial that the compiled step takes as arguments.

    Raises:
        UserError: the device has too little memory.
    """

    def make() -> LanesStep:
        state, limit = program.state_like, device_bytes()
        arguments = state, batch_of_step(program, run, numbers)
        places = jax.tree.map(lambda leaf: leaf.sharding, state)
        lowered = _lowered(program, numbered_step(program, run), arguments, lanes, places)
        compiled = lowered.compile()
        if (needs := step_memory(compiled).total) > limit:
            who, remedy = "A trial needs", "Lower --batch_size."
            if lanes > 1:
                who = f"{lanes} trials side by side need"
                remedy = "Give a smaller number to --vectorize, or auto."
            raise UserError(
                f"{who} {needs / GIB:.1f} GiB, but a device has {limit / GIB:.1f}. {remedy}"
            )
        return LanesStep(compiled, lanes, state)

    key = program_key(run, program.config, len(numbers[RATES]))
    return shared.once("step", (key, lanes), make)


def _lowered(
    program: Program,
    function: Callable[..., Any],
    arguments: tuple[Any, Any],
    lanes: int,
    places: Any = None,
) -> jax.stages.Lowered:
    """Lower a function of two arguments so that it runs for all lanes.

    The lowered function takes two tuples, with an entry for each lane.

    Args:
        arguments: shapes, dtypes and shardings of the two arguments of one lane.
        places: shardings of the first of two results, which reuses the memory of the donated first
            argument; None for a function with one result.
    """

    def of_lanes(*each: tuple[Any, ...]) -> Any:
        stacked = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *lane) for lane in each)
        found = jax.vmap(function)(*stacked)
        return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(lanes))

    options = compiler_options(list(program.mesh.devices.flat)) or None
    donated: dict[str, Any] = {}
    if places is not None:
        donated = {"donate_argnums": 0, "out_shardings": ((places, None),) * lanes}
    # As in `Program.lower_step`: random numbers depend on the index of the element.
    with jax.set_mesh(program.mesh), jax.threefry_partitionable(True):
        jitted = jax.jit(of_lanes, compiler_options=options, **donated)
        return jitted.lower(*((argument,) * lanes for argument in arguments))


def _zeros(like: Any) -> Any:
    """Arrays of zeros on the device, with the given shapes."""
    return jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), like
    )


def step_seconds(trainer: TrialTrainer, most: int) -> dict[int, float]:
    """Measure the seconds per step, by number of lanes.

    The number of lanes is doubled, from 1, as long as the lanes fit in memory and doubling raises
    the total steps per second by the factor `GROWTH`. The result includes the last number of lanes
    even if the gain was smaller.

    Args:
        trainer: the trainer of any trial.
        most: largest useful number of lanes.

    Raises:
        UserError: the device has too little memory for one lane.
    """
    run, steps, found = trainer.run, trainer.total_steps, dict[int, float]()
    program, lanes = trainer.build().program, 1
    numbers = placed(numbers_of(run, steps), program.mesh)
    batch = _zeros(batch_of_step(program, run, numbers)) | {NUMBERS: numbers}
    while lanes <= most:
        try:
            step = lanes_step(trainer.shared, program, run, numbers, lanes)
            with explain_out_of_memory():
                parameters = (trainer.parameters(program.mesh) for _ in range(lanes))
                found[lanes] = _fastest(step, [program.initial_state(p) for p in parameters], batch)
        except UserError:  # the device has too little memory
            if lanes == 1:
                raise
            break
        if not pays(found, lanes):
            break
        lanes *= 2
    return found


def pays(seconds: Mapping[int, float], lanes: int) -> bool:
    """Whether doubling to `lanes` lanes raises the total steps per second by the factor `GROWTH`.

    Args:
        seconds: time of one step of all lanes, by number of lanes.

    >>> pays({1: 1.0, 2: 1.5}, 2), pays({1: 1.0, 2: 1.9}, 2)
    (True, False)
    """
    return lanes == 1 or 2 * seconds[lanes // 2] >= GROWTH * seconds[lanes]


def _fastest(step: LanesStep, states: list[Any], batch: Batch) -> float:
    """Time several steps, and return the seconds of the fastest."""
    times: list[float] = []
    while len(times) < FEWEST or sum(times) < MEASURED_S:
        began = time.perf_counter()
        found = step({i: (state, batch) for i, state in enumerate(states)})
        states = [found[i][0] for i in range(len(states))]
        jax.block_until_ready(states)
        times.append(time.perf_counter() - began)
    return min(times)


def check_lanes(config: TuneConfig, varied: VariedRun) -> None:
    """Check that the trials of a study can train side by side.

    Raises:
        UserError: a flag of the search changes the program, or another flag does not work with
            `--vectorize`.
    """
    space, logging = parse_search(config.study.search), config.logging
    refused = {
        "lora_rank": config.lora.is_used,
        "optimizer_memory host": config.hardware.optimizer_memory == "host",
        "auto_batch": config.hardware.auto_batch,
        # JAX cannot map the in-place gradient accumulation of `step.accumulate` over lanes.
        "gradient_accumulation_steps": config.budget.gradient_accumulation_steps > 1,
        "profile_steps": logging.profile_steps is not None,
        "logging_backend wandb": bool({"wandb", "both"} & set(logging.logging_backend)),
    }
    for name in (name for name, is_given in refused.items() if is_given):
        raise UserError(f"--{name} does not work with --vectorize. Leave one of the two flags out.")
    for dimension in flags_of_programs(space, varied):
        remedy = _REMEDIES.get(dimension.name, "Leave it out of --search")
        raise UserError(
            "--vectorize needs the same program for all trials, but --search "
            f"{dimension.text()} changes it. {remedy}, or leave --vectorize out."
        )
    if (devices := jax.device_count()) > 1:
        raise UserError(
            f"--vectorize uses one device, but there are {devices}. Start the command once for "
            "each device, with CUDA_VISIBLE_DEVICES=0, 1 and so on; all commands work on the "
            "study in --output."
        )
