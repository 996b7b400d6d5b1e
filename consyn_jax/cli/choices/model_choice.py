"""Choose the model of a run from `--model` and `--checkpoint`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from consyn_jax.config import PRESETS, ModelOptions, RunConfig, architecture
from consyn_jax.errors import UserError, nearest
from consyn_jax.flags import flat, with_flags
from consyn_jax.hub_download import is_elsewhere
from consyn_jax.model_config import WEIGHT_SHAPES, FileFormat, ModelConfig
from consyn_jax.validation import check_context

if TYPE_CHECKING:
    from consyn_jax.training.inputs.initial_model import DeferredModel

Tokens = Callable[[ModelConfig], ModelConfig]

_NOT_SIZES = ("model", "checkpoint", "gradient_accumulation_steps", "seed")


class ModelChoice(NamedTuple):
    """The architectures and weights that `--model` and `--checkpoint` name.

    Attributes:
        base: architecture of `--model`; None for a preset.
        stored: architecture of `--checkpoint`; None without one.
        weights: directory of `--checkpoint`; None without one.
    """

    base: ModelConfig | None = None
    stored: ModelConfig | None = None
    weights: Path | None = None


def choose_model(options: ModelOptions) -> ModelChoice:
    """Find and check the models that `--model` and `--checkpoint` name.

    Raises:
        UserError: there is no usable model, or the checkpoint does not fit the architecture.
    """
    is_preset = options.model in PRESETS
    if options.checkpoint is None and is_preset:
        return ModelChoice()
    _check_names(options)

    from consyn_jax.model.pretrained.inspection import read_checkpoint
    from consyn_jax.model.pretrained.peft_files import is_adapter
    from consyn_jax.model.pretrained.weights import find_model

    if options.checkpoint is None:
        return ModelChoice(_architecture_of(options.model))
    weights = find_model(options.checkpoint)
    if is_adapter(weights):
        raise UserError(
            f"--checkpoint {options.checkpoint} is an adapter. Merge it into its base model "
            f"with consyn-convert {options.checkpoint} --merge_lora --output MERGED, and give "
            "--checkpoint MERGED."
        )
    stored = read_checkpoint(weights)
    if is_preset:
        base = None
    else:
        same = options.model == options.checkpoint
        base = stored if same else _architecture_of(options.model)
    wanted = architecture(options, base, vocab_size=stored.vocab_size)
    wrong = [
        f"{name} {getattr(stored, name)}, not {getattr(wanted, name)}"
        for name in WEIGHT_SHAPES
        if getattr(stored, name) != getattr(wanted, name)
    ]
    if wrong:
        raise UserError(
            f"--checkpoint {options.checkpoint} has {'; '.join(wrong)}. Leave out --model and "
            "the flags that set these values, or leave out --checkpoint."
        )
    return ModelChoice(base, stored, weights)


def check_start(config: RunConfig, *, is_planned: bool = False) -> None:
    """Check that DPO or LoRA starts from trained weights.

    Args:
        is_planned: whether the run is only planned; LoRA then needs no weights.

    Raises:
        UserError: the run would start from new weights.
    """
    if config.trains_on_pairs and config.model.checkpoint is None:
        raise UserError(
            "--objective dpo tunes a model that can already answer, but --model "
            f"{config.model.model} has new weights. Give --checkpoint, for example the final/ "
            "directory of a fine-tuning run."
        )
    if config.lora.is_used and config.model.checkpoint is None and not is_planned:
        raise UserError(
            f"--lora_rank {config.lora.rank} adapts trained weights, but --model "
            f"{config.model.model} starts from new weights. Give --checkpoint, or leave "
            "--lora_rank out."
        )


def _architecture_of(model: str) -> ModelConfig:
    """Read the architecture of a config.json, a model directory or a hub id."""
    from consyn_jax.model.pretrained.config_json import read_config
    from consyn_jax.model.pretrained.weights import find_model

    return read_config(find_model(model) if is_elsewhere(model) else Path(model))


def _check_names(options: ModelOptions) -> None:
    """Refuse names that look like a mistake, and suggest the name that was probably meant."""
    model, checkpoint = options.model, options.checkpoint
    known = model in (*PRESETS, checkpoint) or Path(model).exists() or is_elsewhere(model)
    if not known:
        raise UserError(
            f"--model {model} is neither a preset nor a path{nearest(model, PRESETS)} "
            f"Known: {', '.join(PRESETS)}."
        )
    if checkpoint and checkpoint in PRESETS and not Path(checkpoint).exists():
        raise UserError(
            f"--checkpoint {checkpoint} names a preset, which has no weights. "
            f"Use --model {checkpoint}."
        )
    for name, given in (("model", model), ("checkpoint", checkpoint or "")):
        path = Path(given)
        finals = [path / "final" / kind for kind in ("config.json", "adapter_config.json")]
        is_run = not (path / "config.json").exists() and any(map(Path.is_file, finals))
        if given and is_run:
            raise UserError(
                f"--{name} {given} is a run directory, which contains several models. Use "
                f"{path / 'final'} or {path / 'best'}."
            )


def context_of(config: RunConfig, base: ModelConfig | None) -> int | None:
    """Context length, in tokens, of a model that is not a preset; None for a preset."""
    return None if base is None else config.model.context or base.context


def with_sequence_length(
    config: RunConfig, base: ModelConfig | None, *, from_rows: bool = False
) -> RunConfig:
    """Fill in the length of training sequences for a model that is not a preset.

    Args:
        from_rows: with `--checkpoint`, leave the length unset until the data is read.

    Raises:
        UserError: the user's length is above the model's context.
    """
    context = context_of(config, base)
    if context is None:
        return config
    check_context(config.data.max_tokens, context)
    if from_rows and config.model.checkpoint is not None:
        return config
    return with_flags(config, {"max_tokens": config.data.max_tokens or context})


def weights_note(options: ModelOptions, origin: str, seed: int) -> tuple[str, str]:
    """The header line (name, text) about the initial weights.

    Args:
        origin: origin of the value of `--checkpoint`.
    """
    place = options.checkpoint
    if place is None:
        return "weights", f"new, drawn with seed {seed}"
    alone = (
        f"; to use only its architecture, give --model {place}/config.json"
        if origin == "model"
        else ""
    )
    return "weights", f"initial weights from {place}{alone if Path(place).is_dir() else ''}"


def file_notes(config: RunConfig, origins: Mapping[str, str]) -> list[tuple[str, str]]:
    """Header line about sizes and budget from a config file, if a flag names the model.

    The line tells the user that these values also apply to the model that the flag names. The
    list is empty if no flag names a model, or the file sets no sizes and no budget.
    """
    groups = (config.model, config.budget)
    names = [f.name for group in groups for f in fields(group) if f.name not in _NOT_SIZES]
    names.append("max_tokens")
    values = flat(config)
    of_file = [n for n in names if origins[n].startswith("file ") and values[n] is not None]
    if "flag" not in (origins["model"], origins["checkpoint"]) or not of_file:
        return []
    listed = ", ".join(f"{name} {values[name]}" for name in of_file)
    place = origins[of_file[0]].removeprefix("file ")
    return [("config", f"{place} sets {listed}, also for {config.model.model}")]


def deferred_model(
    config: RunConfig, choice: ModelChoice, vocab_size: int, with_tokens: Tokens
) -> DeferredModel:
    """Return the model to train; its weights are drawn, or loaded from `--checkpoint`, later.

    Args:
        vocab_size: vocabulary size of new weights.
        with_tokens: function that sets the BOS, EOS and padding ids in an architecture.
    """
    from consyn_jax.model.parameters import initial_parameters
    from consyn_jax.model.pretrained.safetensors_files import weights_hash
    from consyn_jax.model.pretrained.weights import load_parameters
    from consyn_jax.training.inputs.initial_model import DeferredModel

    base, stored, weights = choice
    if stored is not None:
        vocab_size = stored.vocab_size
    shape = with_tokens(architecture(config.model, base, vocab_size=vocab_size))
    # Exports have the file format of --checkpoint. A new model is exported in float32, even if the
    # config.json in --model names another type.
    files = FileFormat(model_type=shape.files.model_type, config=shape.files.config)
    shape = replace(shape, files=files if stored is None else stored.files)
    if weights is None:
        seed, mup = config.budget.seed, config.optimizer.base
        return DeferredModel(shape, lambda mesh, _: initial_parameters(shape, seed, mesh, mup))
    name = config.model.checkpoint
    assert name is not None
    return DeferredModel(
        shape,
        lambda mesh, convert: load_parameters(weights, shape, mesh, convert=convert),
        weights_hash(weights),
        str(weights.resolve()) if Path(name).is_dir() else name,
    )
