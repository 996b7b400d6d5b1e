"""Plan the sizes of a ladder, and the runs of each size: one long run, and shorter runs from it.

While the learning rate is high, the loss hides part of a model's progress, so losses are comparable
only after a decay. Each size therefore trains once at a constant rate (wsd). Shorter runs start
from its checkpoints, and decay the rate (--decay_from). This gives the losses of several run
lengths for little more than the cost of the longest run (Hägele et al., 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError
from consyn_jax.training.optim.schedules import decay_end, warmup_length
from consyn_jax.tuning.ladder.model_family import Shape, model_of, num_body_parameters

LENGTHS = 4  # runs per size, each twice as long as the previous run
_PARTS = 2 ** (LENGTHS - 1)
FEWEST_STEPS = 5  # fewest steps of the shortest run of a size


@dataclass(frozen=True)
class Rung:
    """A size of the ladder, and its runs.

    Attributes:
        parameters: number of parameters, without embeddings.
        starts: for each run, the step at which its learning rate begins to decay, the shortest run
            first.
        ends: for each run, its last step.
        tokens_per_step: tokens per optimizer step, the same for all runs.
    """

    shape: Shape
    parameters: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    tokens_per_step: int

    @property
    def steps(self) -> int:
        """Number of steps of the longest run."""
        return self.ends[-1]

    @property
    def all_steps(self) -> int:
        """Number of steps of all runs together; steps before a decay are shared and count once."""
        decays = (end - start for start, end in zip(self.starts, self.ends, strict=True))
        return self.starts[-1] + sum(decays)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Number of training tokens of each run."""
        return tuple(end * self.tokens_per_step for end in self.ends)


def plan_rung(run: RunConfig, shape: Shape, tokens_per_parameter: float, most_steps: float) -> Rung:
    """Plan the runs of a size.

    Args:
        run: the configuration from which all sizes take the batch size and the schedule.
        most_steps: maximum number of steps of a run, from the flags that limit its length.

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
            f"With {parameters:,} parameters, the budget is {steps:,} steps of {tokens:,} tokens, "
            f"but the {LENGTHS} runs of this size need {math.ceil(fewest * _PARTS / stable)}. "
            "Lower --batch_size, or raise --tokens_per_parameter or the budget."
        )
    starts = tuple(first * 2**power for power in range(LENGTHS))
    ends = tuple(decay_end(start, options.decay_ratio) for start in starts)
    warmup = warmup_length(ends[-1], options.warmup_steps, options.warmup_ratio)
    if warmup > first:
        flag = "warmup_ratio" if options.warmup_steps is None else "warmup_steps"
        raise UserError(
            f"Warm-up of {warmup} steps is too long for the shortest run with {parameters:,} "
            f"parameters, whose learning rate decays after step {first}. Lower --{flag}."
        )
    return Rung(shape, parameters, starts, ends, tokens)
