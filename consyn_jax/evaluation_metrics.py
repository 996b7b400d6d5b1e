"""Evaluation metrics that can select the best model. Imports only the standard library."""

from __future__ import annotations

# Each evaluation metric, and whether a larger value is better.
EVALUATION_METRICS = {
    "eval/loss": False,
    "eval/perplexity": False,
    "eval/bits_per_byte": False,
    "eval/accuracy": True,
    "eval/rewards/margins": True,
    "eval/rewards/accuracies": True,
}
# Metrics of --eval_requests, logged as eval/TASK/METRIC: whether a larger value is better.
REQUEST_METRICS = {
    "accuracy": True,
    "accuracy_per_character": True,
    "accuracy_per_byte": True,
    "accuracy_per_token": True,
    "greedy_match": True,
    "perplexity": False,
    "bits_per_byte": False,
}


def is_greater_better(metric: str) -> bool | None:
    """Whether larger values of an evaluation metric are better; None for an unknown metric.

    >>> is_greater_better("eval/loss"), is_greater_better("eval/arc/accuracy")
    (False, True)
    """
    return (
        REQUEST_METRICS[metric.split("/")[-1]]
        if is_of_requests(metric)
        else (EVALUATION_METRICS.get(metric))
    )


def is_of_requests(metric: str) -> bool:
    """Whether a name has the form eval/TASK/METRIC with a metric of --eval_requests.

    >>> is_of_requests("eval/arc/accuracy"), is_of_requests("eval/rewards/margins")
    (True, False)
    """
    parts = metric.split("/")
    is_name = len(parts) > 2 and parts[0] == "eval" and all(parts)
    return is_name and parts[-1] in REQUEST_METRICS
