"""The settings of `consyn-generate`. Only the standard library is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from consyn_jax.errors import UserError
from consyn_jax.flags import flag


@dataclass(frozen=True)
class GenerateModelOptions:
    """The model, and how it runs."""

    model: str | None = flag(
        None,
        "a model directory, a run (final/ if it exists, otherwise best/, otherwise the newest "
        "checkpoint), RUN/checkpoints/STEP, or a hub id; --model itself may be left out",
    )
    step: int | None = flag(None, "use the checkpoint of this step of the run")
    dtype: str = flag(
        "auto",
        "number type of the matmuls; int8: 8-bit weights in the blocks, with one scale per "
        "output channel; auto: bfloat16 on a GPU, float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "int8"),
    )
    mesh: str = flag(
        "auto",
        "devices along each mesh axis; auto: one device if the model fits, otherwise all",
    )
    batch_size: int = flag(8, "number of texts to generate at the same time")


@dataclass(frozen=True)
class PromptOptions:
    """Prompts to continue."""

    prompt: tuple[str, ...] = flag((), "texts to continue")
    file: str | None = flag(
        None, "file of prompts: one per line, or JSON Lines with prompt or messages"
    )
    interactive: bool = flag(False, "chat with the model in the terminal")


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling of the next token; the model's generation_config.json has the defaults."""

    max_tokens: int | None = flag(None, "maximum number of new tokens (256)")
    temperature: float | None = flag(
        None,
        "sampling temperature; 0 always takes the likeliest token (1 with --top_k, --top_p or "
        "--min_p, otherwise 0)",
    )
    top_k: int | None = flag(None, "sample from this many of the likeliest tokens")
    top_p: float | None = flag(
        None, "sample from the smallest set of tokens whose probabilities sum to at least this"
    )
    min_p: float | None = flag(
        None, "sample from tokens whose probability is at least this share of the likeliest token's"
    )
    repetition_penalty: float | None = flag(
        None,
        "penalise tokens that are already in the text: divide their positive logits by this, "
        "and multiply their negative logits by it (1)",
    )
    seed: int = flag(0, "sampling seed; each text has independent draws")
    num_return_sequences: int = flag(1, "number of texts for each prompt", aliases=("n",))
    stop: tuple[str, ...] = flag(
        (), r"stop strings: texts that end a continuation, and are left out of it"
    )


@dataclass(frozen=True)
class ResultOptions:
    """Destination of the texts."""

    output: str | None = flag(
        None, "JSON Lines file to write, one line per text; named NAME.partial until complete"
    )
    include_prompt: bool = flag(False, "begin each text with its prompt")
    stream: bool | None = flag(
        None, "print text while it is generated (true for a single text on a terminal)"
    )


@dataclass(frozen=True)
class GenerateConfig:
    """All settings of one `consyn-generate` command."""

    model: GenerateModelOptions = GenerateModelOptions()
    prompts: PromptOptions = PromptOptions()
    sampling: SamplingOptions = SamplingOptions()
    results: ResultOptions = ResultOptions()


def validate_generation(config: GenerateConfig) -> None:
    """Check all values and their combinations.

    Raises:
        UserError: an invalid value or combination; the message names the flags.
    """
    model, prompts = config.model, config.prompts
    if model.model is None:
        raise UserError("--model is missing. Give a model directory, a run, or a hub id.")
    above_0 = {
        "batch_size": model.batch_size,
        "max_tokens": config.sampling.max_tokens,
        "num_return_sequences": config.sampling.num_return_sequences,
    }
    for name, value in above_0.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}.")
    if "" in config.sampling.stop:
        raise UserError("--stop has an empty text, which ends nothing. Leave that text out.")
    has_prompts = bool(prompts.prompt) or prompts.file is not None
    if has_prompts == prompts.interactive:
        raise UserError(
            "--interactive asks for its prompts. Leave --prompt and --file out."
            if has_prompts
            else "There is no prompt. Give --prompt, --file or --interactive."
        )
    if not prompts.interactive:
        return
    for name in ("output", "include_prompt", "stream"):
        if getattr(config.results, name):
            raise UserError(f"--{name} has no effect with --interactive. Leave --{name} out.")
    if config.sampling.num_return_sequences > 1:
        raise UserError("--interactive gives single answers. Leave --num_return_sequences out.")
