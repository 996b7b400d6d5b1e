"""Count evaluations, and find flags that change the number of tokens, before a study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from consyn_jax.errors import UserError
from consyn_jax.prepare_config import HOLD_OUT
from consyn_jax.training.optim.schedules import count_steps
from consyn_jax.training.run.step_end import interval
from consyn_jax.training.trainer import ConsynTrainer
from consyn_jax.tuning.search_space import Dimension

BATCH_FLAGS = ("batch_size", "gradient_accumulation_steps")


def num_evaluations(trainer: ConsynTrainer, metric: str, pruner: str) -> int:
    """Number of evaluations of a complete trial.

    Args:
        trainer: the trainer of any trial.

    Raises:
        UserError: there are no evaluations, they lack the metric, or they are too few for the
            pruner.
    """
    source, steps = trainer.eval_source, trainer.total_steps
    if source is None:
        raise UserError(
            "A study compares evaluations, but there is no evaluation data: the validation "
            f"split has no document. {HOLD_OUT}"
        )
    if metric == "eval/bits_per_byte" and not source.num_bytes:
        raise UserError(
            "--metric eval/bits_per_byte is never logged, because the size in bytes of the "
            "evaluation text is unknown. Use eval/loss."
        )
    found = math.ceil(steps / interval(trainer.run.evaluation.eval_steps, steps))
    if pruner != "none" and found < 2:
        raise UserError(
            f"--pruner {pruner} compares evaluations during training, but a trial of "
            f"{steps} steps with --eval_steps {trainer.run.evaluation.eval_steps} has only one, "
            "at its end. Lower --eval_steps, or use --pruner none."
        )
    return found


def tokens_grow_with(trainer: ConsynTrainer, space: Sequence[Dimension]) -> list[str]:
    """List the searched batch flags if `--max_steps` ends the trials; the list is empty otherwise.

    With `--max_steps`, trials with larger batches read more tokens.

    Args:
        trainer: the trainer of any trial.
    """
    run, batch = trainer.run, {d.name: min(d.ends) for d in space if d.name in BATCH_FLAGS}
    budget = replace(run.budget, **batch)  # the smallest batch takes the most steps
    steps = count_steps(budget, run.optimizer, run.row_length, trainer.train_source.sequences)
    return list(batch) if steps == budget.max_steps else []
