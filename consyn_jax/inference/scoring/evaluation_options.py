"""Settings of `consyn-evaluate`, and their validation, which reads no files."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from consyn_jax.errors import UserError
from consyn_jax.flags import flag


@dataclass(frozen=True)
class EvaluateModelOptions:
    """The models, and how they run."""

    model: tuple[str, ...] = flag(
        (),
        "models to compare: model directories, runs (final/ if it exists, otherwise best/, "
        "otherwise the newest checkpoint), RUN/checkpoints/STEP, or hub ids; the name of this "
        "flag may be left out",
    )
    step: int | None = flag(None, "step of the checkpoint to use from each run")
    tokenizer: str | None = flag(
        None, "tokenizer for models that have none: a path, a hub id, 'default' or 'bytes'"
    )
    dtype: str = flag(
        "auto",
        "number type of the weights and matmuls; auto: float32 on a CPU, bfloat16 on a GPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    mesh: str = flag(
        "auto",
        "devices along each mesh axis; auto: a copy of the model on each device, or sharded "
        "weights if a copy does not fit",
    )
    batch_size: int = flag(8, "sequences per batch; does not change results")


@dataclass(frozen=True)
class EvaluateTextOptions:
    """Perplexity and bits per byte of texts."""

    data: tuple[str, ...] = flag(
        (),
        "texts to evaluate: files, directories, globs, Hugging Face datasets, token stores, or "
        "'sample', as for consyn-train, but without cleaning and deduplication",
    )
    split: str = flag(
        "auto",
        "split of a token store; auto: validation, or train if validation is empty",
        choices=("auto", "train", "validation", "test"),
    )
    window: int | None = flag(None, "tokens in a window (the model's context)")
    stride: int | None = flag(
        None,
        "tokens between the starts of consecutive windows of a long document; a smaller stride "
        "gives tokens more context and takes longer (half the window)",
    )
    score_end: bool = flag(
        False,
        "also score the end-of-text token of each text, as the evaluations of consyn-train do",
    )
    row_format: str = flag(
        "auto",
        "format of the rows; auto: recognised by their keys",
        choices=("auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"),
    )
    text_key: str = flag(
        "text", "field with the text of a row; a.b means field b of the object in field a"
    )
    document_separator: str | None = flag(
        None, r"text that separates the documents of a file, with \n for a newline (none)"
    )


@dataclass(frozen=True)
class EvaluateRequestOptions:
    """Questions with known answers."""

    requests: tuple[str, ...] = flag(
        (),
        "JSON Lines files; each row has the keys (context, continuation), (context, choices, "
        "gold), (prompt, answer) or (messages, answer)",
    )


@dataclass(frozen=True)
class EvaluateAnswerOptions:
    """Generation of answers."""

    max_tokens: int = flag(
        256, "maximum number of tokens of a generated answer, if the row has no max_tokens"
    )
    stop: tuple[str, ...] = flag(
        (), r"stop strings of generated answers, if the row has no field stop; \n is a newline"
    )
    temperature: float = flag(
        0.0, "sampling temperature of generated answers; 0 always takes the likeliest token"
    )


@dataclass(frozen=True)
class EvaluateResultOptions:
    """Options of the report."""

    output: str | None = flag(
        None,
        "JSON file for all metrics, the log-likelihood of every answer, and every generated text",
    )
    page: str | None = flag(None, "HTML file for the table; it needs no network")
    bootstrap: int = flag(
        1000, "number of bootstrap resamples for the 95 % intervals; 0: no intervals"
    )
    seed: int = flag(0, "seed of the bootstrap, and of the sampling with --temperature")
    quiet: bool = flag(False, "show no progress")


@dataclass(frozen=True)
class EvaluateConfig:
    """All settings of one `consyn-evaluate` command."""

    models: EvaluateModelOptions = EvaluateModelOptions()
    texts: EvaluateTextOptions = EvaluateTextOptions()
    questions: EvaluateRequestOptions = EvaluateRequestOptions()
    answers: EvaluateAnswerOptions = EvaluateAnswerOptions()
    results: EvaluateResultOptions = EvaluateResultOptions()


def validate_evaluation(config: EvaluateConfig) -> None:
    """Check all settings of a `consyn-evaluate` command.

    Raises:
        UserError: an invalid value or combination; the message names the flags.
    """
    models, texts, results = config.models, config.texts, config.results
    if not models.model:
        raise UserError(
            "There is no model to evaluate. Give a model directory, a run, or a hub id."
        )
    twice = next((name for name in models.model if models.model.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is given twice. Give each model once.")
    if not texts.data and not config.questions.requests:
        raise UserError("There is no data to evaluate on. Give --data or --requests.")
    above_0 = {
        "batch_size": models.batch_size,
        "window": None if texts.window is None else texts.window - 1,
        "stride": texts.stride,
        "max_tokens": config.answers.max_tokens,
    }
    for name, value in above_0.items():
        if value is not None and value < 1:
            least = 2 if name == "window" else 1
            given = value + least - 1
            raise UserError(f"--{name} must be at least {least}, not {given}.")
    if texts.window is not None and texts.stride is not None and texts.stride > texts.window:
        raise UserError(
            f"--stride {texts.stride} is more than --window {texts.window}, so tokens would be "
            "left out. Lower --stride."
        )
    not_negative: dict[str, float] = {
        "bootstrap": results.bootstrap,
        "seed": results.seed,
        "temperature": config.answers.temperature,
    }
    for name, number in not_negative.items():
        if not number >= 0:
            raise UserError(f"--{name} must not be negative, but is {number}.")
    if not texts.data:
        refuse_given(texts, "is for --data, which is not given")
    if not config.questions.requests:
        refuse_given(config.answers, "is for --requests, which is not given")
    if "" in config.answers.stop:
        raise UserError("--stop has an empty text, which ends no answer. Leave that text out.")
    for name, ending in {"output": ".json", "page": ".html"}.items():
        file = getattr(results, name)
        if file is not None and not file.endswith(ending):
            raise UserError(f"--{name} {file} must be a file whose name ends in {ending}.")


def refuse_given(options: Any, why: str) -> None:
    """Raise an error if the user sets any flag of a group, because the group has no effect.

    Args:
        options: Values of the group of flags.
        why: The reason, which follows the flag's name in the message.

    Raises:
        UserError: A flag of the group differs from its default.
    """
    for each in fields(options):
        if getattr(options, each.name) != each.default:
            raise UserError(f"--{each.name} {why}. Leave --{each.name} out.")
