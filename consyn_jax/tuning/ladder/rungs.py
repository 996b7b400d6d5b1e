"""The sizes of a ladder, and the runs of each: one long run, and shorter ones that branch off.

A rate that is still high hides part of what a model has learned, so only the end of a decay tells
what its tokens are worth. A size therefore trains once at a constant rate (wsd), and from some of
its checkpoints the rate decays in a run of its own (--decay_from). That gives the losses of several
lengths for little more than the price of the longest (Hägele et al., 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError
from consyn_jax.training.optim.schedules import decay_end, warmup_length
from consyn_jax.tuning.ladder.model_family import Shape, model_of, num_body_parameters

LENGTHS = 4  # of the runs of a size, each twice the one before
_PARTS = 2 ** (LENGTHS - 1)
FEWEST_STEPS = 5  # of the shortest run of a size


@dataclass(frozen=True)
class Rung:
    """A size of the ladder, and its runs.

    Attributes:
        parameters: without embeddings.
        starts: for each run, the step at which its rate begins to decay, the shortest run first.
        ends: for each run, its last step.
        tokens_per_step: of all its runs.
    """

    shape: Shape
    parameters: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    tokens_per_step: int

    @property
    def steps(self) -> int:
        """The steps of the longest run."""
        return self.ends[-1]

    @property
    def all_steps(self) -> int:
        """The steps of all runs, of which those before a decay are shared."""
        decays = (end - start for start, end in zip(self.starts, self.ends, strict=True))
        return self.starts[-1] + sum(decays)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens of each run."""
        return tuple(end * self.tokens_per_step for end in self.ends)


def plan_rung(run: RunConfig, shape: Shape, tokens_per_parameter: float, most_steps: float) -> Rung:
    """Plan the runs of a size.

    Args:
        run: with the batch and the schedule of all sizes.
        most_steps: of a run, by its other budgets.

    Raises:
        UserError: the budget is too small.
    """
    budget, options = run.budget, run.optimizer
    parameters = num_body_parameters(model_of(run.model, shape))
    tokens = budget.batch_size * budget.gradient_accumulation_steps * run.row_length
    steps = min(math.ceil(tokens_per_parameter * parameters / tokens), most_steps)
    stable = 1 - options.decay_ratio  # the share of a run before its decay
    first = math.floor(steps * stable / _PARTS)
    if first < (fewest := math.ceil(FEWEST_STEPS * stable)):
        raise UserError(
            f"The budget of the size of {parameters:,} parameters is {steps:,} steps of {tokens:,} "
            f"tokens, and its {LENGTHS} runs need {math.ceil(fewest * _PARTS / stable)}. Lower "
            "--batch_size, or raise --tokens_per_parameter or the budget."
        )
    starts = tuple(first * 2**power for power in range(LENGTHS))
    ends = tuple(decay_end(start, options.decay_ratio) for start in starts)
    warmup = warmup_length(ends[-1], options.warmup_steps, options.warmup_ratio)
    if warmup > first:
        flag = "warmup_ratio" if options.warmup_steps is None else "warmup_steps"
        raise UserError(
            f"Warm-up of {warmup} steps is longer than the shortest run of the size of "
            f"{parameters:,} parameters, whose rate decays after {first}. Lower --{flag}."
        )
    return Rung(shape, parameters, starts, ends, tokens)
