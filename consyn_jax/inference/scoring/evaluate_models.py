"""Evaluate models one after the other on the same texts and requests."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consyn_jax import __version__
from consyn_jax.errors import UserError, listed
from consyn_jax.files import write_whole
from consyn_jax.inference.model_source import ModelSource, find_source
from consyn_jax.inference.scoring.comparison_table import Section, task_section, text_section
from consyn_jax.inference.scoring.documents import find_documents
from consyn_jax.inference.scoring.evaluation_options import (
    EvaluateConfig,
    EvaluateModelOptions,
    EvaluateResultOptions,
    refuse_given,
)
from consyn_jax.inference.scoring.evaluation_page import evaluation_page
from consyn_jax.inference.scoring.ready_scorer import load_scorer
from consyn_jax.inference.scoring.text_scores import TextScores, score_texts
from consyn_jax.inference.scoring.written_answers import encoded_questions, with_texts
from consyn_jax.inference.text_generation.generation_options import GenerateModelOptions
from consyn_jax.inference.text_generation.ready_model import load_runtime
from consyn_jax.scoring.question_rows import TAKEN, Question, has_number, is_right
from consyn_jax.scoring.request_rows import Task, read_tasks
from consyn_jax.scoring.request_scores import TaskScores, score_task
from consyn_jax.scoring.request_tokens import encode_requests
from consyn_jax.tokenization import BPETokenizer, load_tokenizer

Say = Callable[[str], None]
EVERY_S = 15.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Evaluated:
    """A model with its scores of all texts and tasks."""

    source: ModelSource
    description: str
    texts: TextScores | None
    tasks: tuple[TaskScores, ...]


@dataclass(frozen=True)
class Evaluation:
    """Everything that `consyn-evaluate` reports."""

    config: EvaluateConfig
    models: tuple[Evaluated, ...]
    sections: tuple[Section, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the models, as the user gave them."""
        return tuple(model.source.name for model in self.models)

    def as_json(self) -> dict[str, Any]:
        """The content of `--output`."""
        texts, results = self.config.texts, self.config.results
        return {
            "version": __version__,
            "models": [
                {"name": each.source.name, "taken": each.source.taken, "run_as": each.description}
                for each in self.models
            ],
            "settings": {
                "data": texts.data,
                "score_end": texts.score_end,
                "requests": self.config.questions.requests,
                "max_tokens": self.config.answers.max_tokens,
                "stop": self.config.answers.stop,
                "temperature": self.config.answers.temperature,
                "bootstrap": results.bootstrap,
                "seed": results.seed,
            },
            "sections": [section.as_json() for section in self.sections],
            "answers": [_answers(each) for each in self.models],
        }


def _answers(model: Evaluated) -> dict[str, list[dict[str, Any]]]:
    """Return records of a model's answers, by task.

    The first records have the generated text for each question, and whether it is right. The later
    records have the log-likelihood of each given answer to a request.
    """
    return {
        scores.task.name: [
            {"row": asked.place, "text": text, "right": _judged(asked, text)}
            for asked, text in zip(scores.task.questions, scores.texts, strict=True)
        ]
        + [
            {
                "row": request.place,
                "log_likelihood": answers.log_likelihood.tolist(),
                "tokens": answers.tokens.tolist(),
                "is_greedy": answers.is_greedy.tolist(),
            }
            for request, answers in zip(scores.task.requests, scores.answers, strict=True)
        ]
        for scores in model.tasks
    }


def _judged(asked: Question, text: str) -> dict[str, bool]:
    """Return for each metric whether the text answers the question correctly."""
    metrics = TAKEN if has_number(asked) else ("exact_match",)
    return {metric: is_right(metric, asked, text) for metric in metrics}


def evaluate_models(config: EvaluateConfig, say: Say) -> Evaluation:
    """Make all quick checks, then load and score one model after the other.

    Args:
        say: Function that prints a line of progress.

    Raises:
        UserError: A model, the data or a row cannot be used.
    """
    tasks = read_tasks(config.questions.requests)
    if not any(task.questions for task in tasks):
        refuse_given(
            config.answers, "is for rows with prompt and answer, but --requests has no such rows"
        )
    sources = [find_source(name, config.models.step) for name in config.models.model]
    tokenizers = [evaluation_tokenizer(source, config.models.tokenizer) for source in sources]
    models = []
    for source, tokenizer in zip(sources, tokenizers, strict=True):
        models.append(_evaluate(config, source, tokenizer, tasks, say))
        gc.collect()  # free the weights of this model before the next is loaded
    resamples, seed = config.results.bootstrap, config.results.seed
    sections = []
    texts = [model.texts for model in models if model.texts is not None]
    if texts:
        sections.append(text_section(listed(config.texts.data), texts, resamples, seed))
    for at in range(len(tasks)):
        sections.append(task_section([model.tasks[at] for model in models], resamples, seed))
    return Evaluation(config, tuple(models), tuple(sections))


def _evaluate(
    config: EvaluateConfig,
    source: ModelSource,
    tokenizer: BPETokenizer,
    tasks: list[Task],
    say: Say,
) -> Evaluated:
    options, texts = config.models, config.texts
    documents = find_documents(texts, tokenizer) if texts.data else None
    prompts = encoded_questions(tasks, source, tokenizer)
    encoded = [encode_requests(task.requests, tokenizer, source.config.context) for task in tasks]
    found, answered = None, [TaskScores(task, (), tuple(task.notes)) for task in tasks]
    descriptions = []
    if documents is not None or any(task.requests for task in tasks):
        scorer = load_scorer(source, options.dtype, options.mesh, options.batch_size)
        descriptions.append(scorer.description)
        say(f"{source.taken}: {scorer.description}")
        if documents is not None:
            clock = _Clock(say, "tokens of texts read")
            found = score_texts(scorer, documents, texts.window, texts.stride, clock)
        answered = [
            score_task(scorer, task, its, _Clock(say, f"answers of {task.name} scored"))
            for task, its in zip(tasks, encoded, strict=True)
        ]
        del scorer
        gc.collect()  # free the weights for scoring before those for generation are loaded
    if any(task.questions for task in tasks):
        runtime = load_runtime(source, _as_generator(options), tokenizer)
        descriptions.append(runtime.description)
        say(f"{source.taken}, to write answers: {runtime.description}")
        answered = [
            with_texts(
                scores,
                runtime,
                prompts[scores.task.name],
                config.answers,
                options.batch_size,
                config.results.seed,
                _Clock(say, f"answers of {scores.task.name} written"),
            )
            if scores.task.questions
            else scores
            for scores in answered
        ]
    return Evaluated(source, "; ".join(descriptions), found, tuple(answered))


def _as_generator(options: EvaluateModelOptions) -> GenerateModelOptions:
    return GenerateModelOptions(dtype=options.dtype, mesh=options.mesh)


class _Clock:
    """Reports progress every few seconds."""

    def __init__(self, say: Say, what: str) -> None:
        self._say, self._what, self._last = say, what, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._last >= EVERY_S:
            self._last = time.monotonic()
            self._say(f"{done:,} of {total:,} {self._what}")


def evaluation_tokenizer(source: ModelSource, given: str | None) -> BPETokenizer:
    """Return the model's tokenizer, or the tokenizer of `--tokenizer` if the model has none.

    Raises:
        UserError: There is no tokenizer, or `--tokenizer` differs from the model's tokenizer.
    """
    own = source.tokenizer
    if given is None:
        if own is None:
            raise UserError(
                f"{source.name} has no tokenizer. Give the tokenizer that the model was trained "
                "with: --tokenizer PATH."
            )
        return own
    chosen = load_tokenizer(given)
    if own is not None and own.sha256 != chosen.sha256:
        raise UserError(
            f"--tokenizer {given} differs from the tokenizer that is stored with {source.name}. "
            "Leave --tokenizer out."
        )
    if chosen.vocab_size > source.config.vocab_size:
        raise UserError(
            f"--tokenizer {given} has {chosen.vocab_size:,} tokens, but {source.name} has only "
            f"{source.config.vocab_size:,}. Give the tokenizer that the model was trained with."
        )
    return chosen


def check_files(results: EvaluateResultOptions) -> None:
    """Check early that `--output` and `--page` can be written.

    Raises:
        UserError: A path is a directory, or is in a directory that does not exist.
    """
    for flag, name in (("output", results.output), ("page", results.page)):
        if name is not None and Path(name).is_dir():
            raise UserError(f"--{flag} {name} is a directory. Give the path of a file.")
        if name is not None and not Path(name).parent.is_dir():
            raise UserError(
                f"--{flag} {name} is in a directory that does not exist. Create the directory "
                "first."
            )


def write_results(evaluation: Evaluation) -> None:
    """Write the JSON file and the page atomically.

    Raises:
        UserError: The disk is full, or the directory cannot be written to.
    """
    results = evaluation.config.results
    if results.output is not None:
        text = json.dumps(evaluation.as_json(), indent=1, ensure_ascii=False) + "\n"
        _write("output", results.output, text)
    if results.page is not None:
        _write("page", results.page, evaluation_page(evaluation.as_json(), evaluation.sections))


def _write(flag: str, name: str, text: str) -> None:
    try:
        write_whole(Path(name), text.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(
            f"--{flag} {name} cannot be written: {error.strerror}. Free some space, or give "
            "another file."
        ) from error
