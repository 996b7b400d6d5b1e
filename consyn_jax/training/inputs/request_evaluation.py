"""`--eval_requests`: requests with known answers that every evaluation of a run scores."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from consyn_jax.config import EvaluationOptions
from consyn_jax.errors import UserError, counted, nearest
from consyn_jax.evaluation_metrics import EVALUATION_METRICS, REQUEST_METRICS
from consyn_jax.model.parameters import Params
from consyn_jax.model_config import ModelConfig
from consyn_jax.scoring.request_rows import Task, read_tasks
from consyn_jax.scoring.request_scores import TaskScores, score_task
from consyn_jax.scoring.request_tokens import Encoded, encode_requests
from consyn_jax.scoring.scorer import Scorer
from consyn_jax.tokenization import BPETokenizer

ENDINGS = re.compile(r"\.(jsonl|ndjson|json)(\.\w+)?$")


@dataclass(frozen=True)
class EvalRequests:
    """The tasks of `--eval_requests`, tokenised once for all evaluations of a run.

    Attributes:
        tasks: Tasks by name; metrics are named eval/NAME/accuracy, for example.
        encoded: Requests of each task as token ids.
    """

    tasks: dict[str, Task]
    encoded: dict[str, Encoded]

    @property
    def fingerprint(self) -> str:
        """Hash of all requests."""
        content = {
            name: [(request.pairs, request.gold) for request in task.requests]
            for name, task in self.tasks.items()
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def description(self) -> str:
        """The number of requests, and notes about each task, for the header."""
        size = counted(sum(task.size for task in self.tasks.values()), "request")
        notes = [
            f"{name}: {note}"
            for name, task in self.tasks.items()
            for note in (*self.encoded[name].notes, *task.notes)
        ]
        return "; ".join([f"{size} in {counted(len(self.tasks), 'task')}", *notes])

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics that the requests add to an evaluation."""
        found = []
        for name, task in self.tasks.items():
            has_choice = {bool(request.gold) for request in task.requests}
            for metric in REQUEST_METRICS:
                if metric.startswith("accuracy") in has_choice:
                    found.append(f"eval/{name}/{metric}")
        return found

    def scores(
        self,
        scorer: Scorer,
        tick: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Compute the metrics of all tasks."""
        found: dict[str, float] = {}
        for name, task in self.tasks.items():
            scored = score_task(scorer, task, self.encoded[name], lambda done, total: tick())
            found |= {f"eval/{name}/{metric}": value for metric, value in _values(scored)}
        return found


def _values(scored: TaskScores) -> list[tuple[str, float]]:
    values = [(metric, float(a.sum() / b.sum())) for metric, (a, b) in scored.units.items()]
    return [
        (metric, value if metric != "perplexity" else math.exp(min(value, 700.0)))
        for metric, value in values
    ]


def read_eval_requests(
    options: EvaluationOptions, tokenizer: BPETokenizer | None, config: ModelConfig
) -> EvalRequests | None:
    """Read and encode the requests of a run, so that a wrong row is reported before step 1.

    Raises:
        UserError: A file or row is wrong, the run has no tokenizer, or the metric that selects the
            best model is unknown.
    """
    if not options.eval_requests:
        return None
    if tokenizer is None:
        raise UserError(
            "--eval_requests needs a tokenizer, but the data of this run is token ids without one. "
            "Leave --eval_requests out."
        )
    tasks, encoded = dict[str, Task](), dict[str, Encoded]()
    for task in read_tasks(options.eval_requests, "--eval_requests"):
        if task.questions:
            raise UserError(
                f"{task.questions[0].place} asks for a text, but evaluations during a run only "
                "score given answers. Move such rows to a file for consyn-evaluate."
            )
        name = ENDINGS.sub("", task.name)
        if name in tasks:
            raise UserError(
                f"--eval_requests has two tasks named {name}. Rename a file, or give the rows a "
                "key 'task'."
            )
        tasks[name] = task
        encoded[name] = encode_requests(task.requests, tokenizer, config.context)
    found = EvalRequests(tasks, encoded)
    chosen = options.metric_for_best_model
    if chosen not in EVALUATION_METRICS and chosen not in found.metrics:
        raise UserError(
            f"--metric_for_best_model {chosen} is not a metric of --eval_requests"
            f"{nearest(chosen, found.metrics)} Known: {', '.join(found.metrics)}."
        )
    return found


def requests_identity(options: EvaluationOptions, source: Any) -> str | None:
    """Return the requests' fingerprint if their metric selects the best model; otherwise None.

    Args:
        source: Evaluation data with its `requests`; None without evaluations.
    """
    requests: EvalRequests | None = getattr(source, "requests", None)
    if requests is None or options.metric_for_best_model in EVALUATION_METRICS:
        return None
    return requests.fingerprint


def request_scorer(
    config: ModelConfig, mesh: Mesh, params: Params, kind: Any, attention: str, batch_size: int
) -> Scorer:
    """Make a scorer of requests for given parameters, on the mesh of the run.

    Args:
        kind: Dtype of the computation.
        attention: Attention backend.
        batch_size: Rows per batch, rounded up to a multiple of the number of data-parallel devices.
    """
    share = int(np.prod([mesh.shape[axis] for axis in ("data", "fsdp")]))
    return Scorer(config, params, mesh, kind, attention, math.ceil(batch_size / share) * share)
