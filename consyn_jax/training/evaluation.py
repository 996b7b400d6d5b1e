"""Evaluation: mean loss over a whole dataset, in which every token has the same weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from consyn_jax.data.loader import prefetch
from consyn_jax.distributed.mesh import local_rows, placer
from consyn_jax.errors import UserError
from consyn_jax.model.parameters import Params
from consyn_jax.training.inputs.batch_source import BatchSource
from consyn_jax.training.inputs.request_evaluation import request_scorer
from consyn_jax.training.loss import LossSums
from consyn_jax.training.preference.pair_loss import PairSums
from consyn_jax.training.program import EVAL_AXES, Program
from consyn_jax.training.step import BASE, Sums


def compile_evaluation(
    program: Program,
    source: BatchSource,
    batch_size: int,
    length: int,
    tick: Callable[[], None] = lambda: None,
    base: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[[Params], dict[str, float]]:
    """Compile the evaluation on `source`, and return it as a function of the model's parameters.

    The function returns the metrics of `evaluate` and of `source.requests`.

    Args:
        batch_size: Sequences per batch.
        length: Tokens per sequence.
        tick: Function that is called for every batch.
        base: Frozen weights of an adapter run, as in `Program.base_like`; empty for other runs.
    """
    step = program.lower_eval_step(batch_size, length).compile()
    rows = local_rows(program.mesh, batch_size)

    def evaluation(params: Params) -> dict[str, float]:
        def sums_of(batch: Any) -> Sums:
            tick()
            return step(params, batch | base)

        batches = source.evaluation(batch_size, rows)
        with prefetch(batches, transform=placer(program.mesh, EVAL_AXES)) as ready:
            found = evaluate(sums_of, ready, source.num_bytes)
        if source.requests is not None:
            parts = program.compute.dtype, program.compute.attention, batch_size
            whole = program.whole(params, base.get(BASE))
            scorer = request_scorer(program.config, program.mesh, whole, *parts)
            found |= source.requests.scores(scorer, tick)
        return found

    return evaluation


def evaluate(
    sums_of: Callable[[Any], Sums], batches: Iterable[Any], num_bytes: int | None = None
) -> dict[str, float]:
    """Compute metrics over one pass of the batches.

    The metrics are `eval/loss` (nats per token), `eval/perplexity`, `eval/accuracy`, `eval/tokens`
    and `eval/bits_per_byte`. For pairs, they are `eval/pairs`, `eval/tokens`, and the metrics
    of `PairSums.means` with the prefix `eval/`. The host adds up the sums in float64, one batch
    late, so that the device never waits for the host.

    Args:
        sums_of: Function that returns the loss sums of a batch, on the device.
        num_bytes: Bytes of source text that the tokens encode; without it, `eval/bits_per_byte` is
            left out.

    Raises:
        UserError: No token counts in the loss.
    """
    totals: np.ndarray | float = 0.0
    pending: Sums | None = None
    kind: Any = LossSums
    for batch in batches:
        sums = sums_of(batch)
        if pending is not None:
            totals += np.array(jax.device_get(pending), np.float64)
        pending, kind = sums, type(sums)
    if pending is not None:
        totals += np.array(jax.device_get(pending), np.float64)
    found = kind(*np.broadcast_to(totals, len(kind._fields)).tolist())
    if not found.terms:  # a loss of 0 / 0 would count as a loss that does not improve
        raise UserError(
            "No token of the evaluation data counts in the loss: all are masked. Check its labels, "
            "loss_mask and attention_mask."
        )
    means = {f"eval/{name}": value for name, value in found.means(found.terms).items()}
    if isinstance(found, PairSums):
        return means | {"eval/pairs": int(found.pairs), "eval/tokens": int(found.tokens)}
    loss = means["eval/loss"]
    metrics = means | {
        "eval/perplexity": math.exp(loss) if loss < 700 else math.inf,
        "eval/accuracy": found.correct / found.tokens,
        "eval/tokens": int(found.tokens),
    }
    if num_bytes:
        metrics["eval/bits_per_byte"] = found.nll / math.log(2) / num_bytes
    return metrics
