"""Convert a model: check, load, write to a temporary path, read back, compare, rename."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from consyn_jax.errors import UserError
from consyn_jax.inference.conversion import directories, gguf_file
from consyn_jax.inference.conversion.averaging import averaged_source
from consyn_jax.inference.conversion.comparison import check_logits, probe_logits
from consyn_jax.inference.conversion.conversion_options import ConvertConfig, TargetOptions
from consyn_jax.inference.conversion.gguf_architecture import architecture_of
from consyn_jax.inference.conversion.gguf_tokenizer import vocabulary
from consyn_jax.inference.conversion.hub_upload import check_hub_name, push
from consyn_jax.inference.conversion.model_card import CARD, model_card
from consyn_jax.inference.conversion.whole_output import check_target, written_aside
from consyn_jax.inference.model_source import ModelSource, find_source
from consyn_jax.model.parameters import Params
from consyn_jax.model_config import ModelConfig
from consyn_jax.training.run.model_manifest import MANIFEST, disagreement, has_manifest

Say = Callable[[str], None]
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(K|M|G|T)B?", re.IGNORECASE)
UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Conversion:
    """A planned conversion, checked except for the weights.

    Attributes:
        name: Name of the model for its model card.
        dtype: The number type to write; None to keep the number types of the source's files.
        exact: The number type that represents the source's weights without rounding.
        shard_bytes: Maximum size of a weight file, in bytes.
    """

    source: ModelSource
    options: TargetOptions
    output: Path
    name: str
    dtype: str | None
    exact: str
    shard_bytes: int

    @property
    def written_dtype(self) -> str:
        """The number type of the written weights, from --dtype or from the source's files."""
        return self.dtype or self.source.config.files.dtype


def plan_conversion(config: ConvertConfig) -> Conversion:
    """Find the model, and refuse an impossible conversion before reading weights.

    Raises:
        UserError: The model, the format or the output cannot be used.
    """
    options, source = config.target, _source(config)
    _check_adapter(source, config.source.merge_lora)
    if options.output is None:
        raise UserError(
            f"--output is missing. Name what to write, as in --output model-{options.to}."
        )
    if options.push_to_hub is not None:
        check_hub_name(options.push_to_hub)
    _check_format(options)
    output, files, dtype = Path(options.output), source.config.files, options.dtype
    in_half = files.dtype in ("bfloat16", "float16") and not files.other_dtypes
    is_sum = config.source.average is not None or source.base is not None
    exact = "float32" if is_sum or not in_half else files.dtype
    name = options.push_to_hub or output.name.removesuffix(".gguf")
    plan = Conversion(source, options, output, name, dtype, exact, _bytes(options.shard_size))
    if options.to == "gguf":
        _check_gguf(plan)
        size = gguf_file.gguf_bytes(source.config, plan.written_dtype)
    else:
        size = directories.tensor_bytes(directories.file_config(source, dtype))
    check_target(output, size, options.push_to_hub)
    return plan


def _check_format(options: TargetOptions) -> None:
    """Check that all given options apply to the chosen format."""
    if options.to != "gguf" and options.dtype == "q8_0":
        raise UserError(f"--dtype q8_0 needs --to gguf; --to {options.to} does not support it.")
    if options.to != "gguf" and options.context is not None:
        raise UserError("--context is for --to gguf only. Leave --context out.")
    if options.to != "gguf" and str(options.output).endswith(".gguf"):
        raise UserError(
            f"--output {options.output} is the name of a GGUF file, but --to {options.to} "
            "writes a directory. Give --to gguf, or a directory as --output."
        )
    if options.to != "hf" and options.shard_size != TargetOptions.shard_size:
        raise UserError("--shard_size is for --to hf only. Leave --shard_size out.")


def _source(config: ConvertConfig) -> ModelSource:
    options = config.source
    if options.model is None:
        raise UserError("No model is given. Write consyn-convert MODEL --to hf --output DIR.")
    if options.average is None:
        source = find_source(options.model, options.step)
        _check_manifest(source.directory)
        return source
    if options.step is not None:
        raise UserError("--step and --average do not work together. Leave one of them out.")
    return averaged_source(options.model, options.average)


def _check_adapter(source: ModelSource, merge: bool) -> None:
    """Check that --merge_lora is given for an adapter, and for no other model."""
    if source.base is not None and not merge:
        raise UserError(
            f"{source.name} is an adapter over {source.base}, and already in PEFT's layout. Add "
            "--merge_lora to write the merged model."
        )
    if merge and source.base is None:
        raise UserError(
            f"--merge_lora is for an adapter, but {source.name} is not one. Leave --merge_lora out."
        )


def _check_manifest(directory: Path) -> None:
    """Check an exported model against its manifest; a checkpoint is verified when it is read."""
    if has_manifest(directory) and (reason := disagreement(directory)):
        raise UserError(
            f"{directory} is damaged: {reason}. Use another model of the run; if you changed the "
            f"files yourself, delete {directory / MANIFEST}."
        )


def _check_gguf(plan: Conversion) -> None:
    gguf_file.require_gguf()
    config = plan.source.config
    architecture_of(config, plan.options.context or config.context)
    if plan.options.context is not None and not 0 < plan.options.context <= config.context:
        raise UserError(
            f"--context {plan.options.context} must be from 1 to {config.context}, the context of "
            "the model."
        )
    if plan.source.tokenizer is not None:
        vocabulary(plan.source.tokenizer, config.vocab_size)


def _bytes(size: str) -> int:
    """Parse `--shard_size` into bytes.

    >>> _bytes("5GB"), _bytes("0.5 mb")
    (5000000000, 500000)
    """
    match = SIZE.fullmatch(size.strip())
    number = float(match[1]) * UNITS[match[2].upper()] if match else 0.0
    if not 0 < number < 2**63:
        raise UserError(f"--shard_size {size} is not a size. Write it as 500MB or 5GB.")
    return int(number)


def convert(plan: Conversion, say: Say) -> None:
    """Write the model to a temporary path, read it back, compare the logits, and rename it.

    Raises:
        UserError: The model cannot be written, or its logits disagree with the source's.
    """
    say(f"takes {plan.source.taken}")
    params = plan.source.parameters(dtype=jnp.dtype(plan.exact))
    before = probe_logits(plan.source.config, params)
    rounded = plan.written_dtype if plan.written_dtype != plan.exact else "float32"
    card = model_card(plan.source, plan.name, plan.written_dtype, plan.options.license)
    with written_aside(plan.output) as aside:
        notes = _write(plan, aside, params, card)
        del params
        share = check_logits(before, _read_back(plan, aside), rounded, plan.output)
    for note in notes:
        say(f"note: {note}")
    agreement = "the same logits" if share == 0 else f"logits with a relative error of {share:.1e}"
    say(f"wrote {plan.output} ({_size(plan.output)}); the written model gives {agreement}")
    if plan.options.push_to_hub is not None:
        say(f"uploaded to {push(plan.output, plan.options.push_to_hub, card)}")


def _write(plan: Conversion, aside: Path, params: Params, card: str) -> tuple[str, ...]:
    """Write the result to `aside`, and return notes for the user."""
    source, options = plan.source, plan.options
    if options.to == "gguf":
        about = {"name": plan.name, "license": options.license or ""}
        if plan.output.suffix == ".gguf":
            file = aside
        else:
            aside.mkdir()
            file = aside / _gguf_name(plan)
        dtype = plan.written_dtype
        notes = gguf_file.write_gguf(file, source, params, dtype, options.context, about)
    elif options.to == "orbax":
        directories.write_orbax(aside, source, params, plan.dtype)
        notes = ()
    else:
        directories.write_hf(aside, source, params, plan.dtype, plan.shard_bytes)
        notes = ()
    if aside.is_dir():
        (aside / CARD).write_text(card, encoding="utf-8")
    return notes


def _gguf_name(plan: Conversion) -> str:
    return f"{plan.output.name}-{gguf_file.TYPES[plan.written_dtype]}.gguf"


def _read_back(plan: Conversion, aside: Path) -> np.ndarray:
    """Read the result back and compute its logits."""
    config: ModelConfig = plan.source.config
    if plan.options.to == "gguf":
        file = aside / _gguf_name(plan) if aside.is_dir() else aside
        return probe_logits(config, gguf_file.read_back(file, config, plan.options.context))
    if plan.options.to == "orbax":
        return probe_logits(config, directories.read_orbax(aside, config))
    read, params = directories.read_hf(aside)
    return probe_logits(read, params)


def _size(path: Path) -> str:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"
