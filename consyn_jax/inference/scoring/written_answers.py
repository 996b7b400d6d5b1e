"""Generate a model's answers to the questions of a task; `request_scores` judges them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from consyn_jax.inference.model_source import ModelSource
from consyn_jax.inference.scoring.evaluation_options import EvaluateAnswerOptions
from consyn_jax.inference.text_generation.continuations import Wish, continuations
from consyn_jax.inference.text_generation.prompts import (
    EncodedPrompt,
    GivenPrompt,
    PromptEncoder,
    check_lengths,
)
from consyn_jax.inference.text_generation.ready_model import Runtime
from consyn_jax.model.generation.draws import Sampling
from consyn_jax.scoring.question_rows import Question
from consyn_jax.scoring.request_rows import Task
from consyn_jax.scoring.request_scores import TaskScores
from consyn_jax.tokenization import BPETokenizer

LIMITS = {
    "length": "{count:,} of {total:,} answers ended by max_tokens",
    "context": "{count:,} of {total:,} answers ended by the model's context, which is full",
}


def encoded_questions(
    tasks: Sequence[Task], source: ModelSource, tokenizer: BPETokenizer
) -> dict[str, list[EncodedPrompt]]:
    """Encode the prompts of all questions, by task.

    Raises:
        UserError: A prompt cannot be encoded or fills the model's context; the message names its
            row.
    """
    encoder = PromptEncoder(tokenizer, tokenizer.chat_template)
    found = {
        task.name: [encoder.encode(_given(asked)) for asked in task.questions] for task in tasks
    }
    for prompts in found.values():
        check_lengths(prompts, source.config.context)
    return found


def _given(asked: Question) -> GivenPrompt:
    messages = None if asked.messages is None else list(asked.messages)
    return GivenPrompt(
        asked.place, asked.prompt, messages, None if asked.tools is None else list(asked.tools)
    )


def with_texts(
    scores: TaskScores,
    runtime: Runtime,
    prompts: Sequence[EncodedPrompt],
    options: EvaluateAnswerOptions,
    batch_size: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> TaskScores:
    """Generate the answers to a task's questions, and add them to its scores.

    Args:
        prompts: Result of `encoded_questions`.
        batch_size: Number of texts to generate at once.
        seed: Seed of the sampling, if the temperature is not 0.
    """
    asked = scores.task.questions
    common = tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in options.stop)
    groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for number, question in enumerate(asked):
        stop = common if question.stop is None else question.stop
        groups.setdefault((question.max_tokens or options.max_tokens, stop), []).append(number)
    texts, ends = [""] * len(asked), dict.fromkeys(LIMITS, 0)
    sampling = Sampling(temperature=options.temperature, seed=seed)
    engine = runtime.engine(min(batch_size, len(asked)), sampling)
    done = 0
    for (most, stop), numbers in groups.items():
        chosen = [prompts[number] for number in numbers]
        for update in continuations(engine, runtime.tokenizer, chosen, Wish(most, stop=stop)):
            if not update.ends:
                continue
            texts[numbers[update.prompt]] = update.text
            if update.ends in ends:
                ends[update.ends] += 1
            done += 1
            if progress is not None:
                progress(done, len(asked))
    notes = [
        text.format(count=ends[end], total=len(asked)) for end, text in LIMITS.items() if ends[end]
    ]
    if any(question.messages for question in asked) and runtime.tokenizer.chat_template is None:
        notes.append(
            "the model has no chat template, so conversations have plain-text role markers"
        )
    return replace(scores, texts=tuple(texts), notes=(*scores.notes, *notes))
