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
        "the model, also without this flag's name: a model directory, a run (its final/, or else "
        "best/, or else its newest checkpoint), RUN/checkpoints/STEP, or a hub id",
    )
    step: int | None = flag(None, "take this checkpoint of a run")
    average: str | None = flag(
        None,
        "average several checkpoints of a run: 5 means the newest 5; 100,200,300 means these steps",
    )
    merge_lora: bool = flag(
        False, "the model is an adapter: add it to the weights of its base, and write the sum"
    )


@dataclass(frozen=True)
class TargetOptions:
    """Format and place of the result."""

    to: str = flag("hf", "format of the result", choices=FORMATS)
    output: str | None = flag(
        None, "directory of the result, or the file of a GGUF; it must not exist"
    )
    dtype: str | None = flag(
        None,
        "number type of the weights; q8_0 only with --to gguf (that of the model)",
        choices=NUMBER_TYPES,
    )
    shard_size: str = flag("5GB", "with --to hf: largest size of a weights file, as in 500MB")
    context: int | None = flag(None, "context that a GGUF declares, in tokens (that of the model)")
    license: str | None = flag(None, "license in the model card, as in apache-2.0 (not stated)")
    push_to_hub: str | None = flag(
        None, "upload the result to this model of the Hugging Face Hub, as owner/name"
    )


@dataclass(frozen=True)
class ConvertConfig:
    """All settings of one `consyn-convert` command."""

    source: SourceOptions = SourceOptions()
    target: TargetOptions = TargetOptions()
