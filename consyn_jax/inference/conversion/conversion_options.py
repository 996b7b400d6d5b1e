"""The settings of `consyn-convert`."""

from __future__ import annotations

from dataclasses import dataclass

from consyn_jax.flags import flag

FORMATS = ("hf", "gguf", "orbax")
NUMBER_TYPES = ("float32", "bfloat16", "float16", "q8_0")


@dataclass(frozen=True)
class SourceOptions:
    """The model to convert."""

    model: str | None = flag(
        None,
        "a model directory, a run (final/ if it exists, otherwise best/, otherwise the newest "
        "checkpoint), RUN/checkpoints/STEP, or a hub id; the name of this flag may be left out",
    )
    step: int | None = flag(None, "use the checkpoint of this step of the run")
    average: str | None = flag(
        None,
        "average several checkpoints of a run: 5 means the newest 5; 100,200,300 means these steps",
    )
    merge_lora: bool = flag(
        False, "for an adapter: add it to the weights of its base model, and write the merged model"
    )


@dataclass(frozen=True)
class TargetOptions:
    """Format and destination of the result."""

    to: str = flag("hf", "format of the result", choices=FORMATS)
    output: str | None = flag(
        None,
        "path to write, which must not exist yet: a file for --to gguf, a directory for other "
        "formats",
    )
    dtype: str | None = flag(
        None,
        "number type of the written weights; q8_0 only with --to gguf (the model's type)",
        choices=NUMBER_TYPES,
    )
    shard_size: str = flag("5GB", "with --to hf: maximum size of a weights file, as in 500MB")
    context: int | None = flag(
        None,
        "with --to gguf: context length to declare, in tokens (the model's context length)",
    )
    license: str | None = flag(None, "license to name in the model card, such as apache-2.0 (none)")
    push_to_hub: str | None = flag(
        None, "upload the result to this model repository on the Hugging Face Hub"
    )


@dataclass(frozen=True)
class ConvertConfig:
    """All settings of one `consyn-convert` command."""

    source: SourceOptions = SourceOptions()
    target: TargetOptions = TargetOptions()
