"""Log-likelihoods of a task's answers, and the accuracy of choosing the likeliest answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from consyn_jax.scoring.question_rows import TAKEN, Question, has_number, is_right, taken
from consyn_jax.scoring.request_rows import Request, Task
from consyn_jax.scoring.request_tokens import Encoded
from consyn_jax.scoring.scorer import Scorer

# For each accuracy metric, the unit of an answer's length. The model's choice is the answer with
# the largest log-likelihood per unit; "raw" does not divide.
NORMS = {
    "accuracy": "raw",
    "accuracy_per_character": "characters",
    "accuracy_per_byte": "bytes",
    "accuracy_per_token": "tokens",
}


@dataclass(frozen=True)
class Answers:
    """A model's scores of the answers to one request; arrays have one entry per answer.

    Attributes:
        log_likelihood: Sum over the tokens of the answer, in nats.
        tokens: Number of tokens of the answer.
        is_greedy: Whether greedy decoding gives exactly this answer.
    """

    log_likelihood: np.ndarray
    tokens: np.ndarray
    is_greedy: np.ndarray


@dataclass(frozen=True)
class TaskScores:
    """One model's answers to a task.

    Attributes:
        answers: The scores for each request.
        notes: Notes for the user: about truncated contexts, and about keys that are ignored.
        texts: The generated text for each question.
    """

    task: Task
    answers: tuple[Answers, ...]
    notes: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    @cached_property
    def choices(self) -> dict[str, np.ndarray]:
        """The model's choices by metric.

        For a request with `gold`, a choice is the index of an answer. For a question, it is the
        part of the generated text that the metric compares.
        """
        found: dict[str, list[int]] = {metric: [] for metric in NORMS}
        for request, answers in self._with(gold=True):
            for metric, norm in NORMS.items():
                score = answers.log_likelihood / _lengths(request, answers, norm)
                found[metric].append(int(np.argmax(score)))
        chosen = {metric: np.array(numbers) for metric, numbers in found.items() if numbers}
        written = {
            metric: np.array([taken(metric, text) for _, text in pairs])
            for metric, pairs in self._written.items()
        }
        return chosen | written

    @property
    def _written(self) -> dict[str, list[tuple[Question, str]]]:
        """The questions to which each metric applies, with their generated texts."""
        pairs = list(zip(self.task.questions, self.texts, strict=True))
        found = {
            metric: [pair for pair in pairs if metric == "exact_match" or has_number(pair[0])]
            for metric in TAKEN
        }
        return {metric: judged for metric, judged in found.items() if judged}

    @cached_property
    def units(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For each metric, a numerator and a denominator per request.

        The metric is the sum of the numerators divided by the sum of the denominators. For
        perplexity, the ratio is the logarithm of the metric.
        """
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        gold = [request.gold for request, _ in self._with(gold=True)]
        for metric in NORMS if gold else ():
            chosen = self.choices[metric].tolist()
            right = [n in of for n, of in zip(chosen, gold, strict=True)]
            found[metric] = np.array(right, np.float64), np.ones(len(right))
        for metric, pairs in self._written.items():
            right = [is_right(metric, *pair) for pair in pairs]
            found[metric] = np.array(right, np.float64), np.ones(len(right))
        rest = list(self._with(gold=False))
        if rest:
            nats = np.array([-answers.log_likelihood.sum() for _, answers in rest])
            greedy = np.array([answers.is_greedy.mean() for _, answers in rest])
            tokens, size = (
                np.array(
                    [float(_lengths(request, answers, norm).sum()) for request, answers in rest]
                )
                for norm in ("tokens", "bytes")
            )
            found["greedy_match"] = greedy, np.ones(len(rest))
            found["perplexity"] = nats, tokens
            found["bits_per_byte"] = nats / math.log(2), size
        return found

    def _with(self, *, gold: bool) -> list[tuple[Request, Answers]]:
        pairs = zip(self.task.requests, self.answers, strict=True)
        return [(request, answers) for request, answers in pairs if bool(request.gold) == gold]


def _lengths(request: Request, answers: Answers, norm: str) -> np.ndarray:
    """The length of each answer in the unit `norm`, one of the values of `NORMS`.

    Characters and bytes are counted without white space before the answer, as in lm_eval's acc_norm
    and acc_bytes.
    """
    if norm == "raw":
        return np.ones(len(answers.tokens))
    if norm == "tokens":
        return answers.tokens.astype(np.float64)
    texts = [answer.lstrip() or answer for _, answer in request.pairs]
    sizes = map(len, texts) if norm == "characters" else (len(text.encode()) for text in texts)
    return np.array(list(sizes), np.float64)


def score_task(
    scorer: Scorer,
    task: Task,
    encoded: Encoded,
    progress: Callable[[int, int], None] | None = None,
) -> TaskScores:
    """Score the given answers of all requests of a task.

    The questions of the task are left out, because their answers have to be generated.

    Args:
        encoded: The requests of the task, from `encode_requests`.
        progress: Called with the number of answers scored so far, and their total number.
    """
    done, total = 0, len(encoded.wanted)

    def tick(number: int) -> None:
        nonlocal done
        done += number
        if progress is not None:
            progress(done, total)

    scores = iter(scorer.score(encoded.wanted, tick))
    answers = []
    for request in task.requests:
        own = [next(scores) for _ in request.pairs]
        answers.append(
            Answers(
                np.array([s.log_likelihood.astype(np.float64).sum() for s in own]),
                np.array([len(s.log_likelihood) for s in own]),
                np.array([bool(s.is_greedy.all()) for s in own]),
            )
        )
    return TaskScores(task, tuple(answers), (*encoded.notes, *task.notes))
