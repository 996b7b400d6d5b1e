"""`config.json` of a model directory, to and from `ModelConfig`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from consyn_jax.errors import UserError, parse_fault
from consyn_jax.files import refuse_strays
from consyn_jax.model.pretrained.families.family import Family
from consyn_jax.model.pretrained.families.hf_config import Fields, Unsupported
from consyn_jax.model.pretrained.families.llama import ARCHITECTURE, LLAMA, TOKENS
from consyn_jax.model.pretrained.families.ministral import MINISTRAL
from consyn_jax.model.pretrained.families.mistral import MISTRAL
from consyn_jax.model.pretrained.families.phi3 import PHI3
from consyn_jax.model.pretrained.families.qwen2 import QWEN2
from consyn_jax.model.pretrained.families.qwen3 import QWEN3
from consyn_jax.model.pretrained.families.rotary import KEYS, write_rotary
from consyn_jax.model.pretrained.families.smollm3 import SMOLLM3
from consyn_jax.model_config import ModelConfig

# A model is saved in the layout from which it was loaded, or else in the first suitable layout.
LAYOUTS = (LLAMA, MISTRAL, QWEN3, QWEN2, MINISTRAL, SMOLLM3, PHI3)
FAMILIES = {family.model_type: family for family in LAYOUTS}
GENERATION = "generation_config.json"
# Keys of generation_config.json that are used, besides eos_token_id.
WHOLE = ("top_k", "max_new_tokens")
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
READ = ("*.json", "*.safetensors", "orbax", "orbax/**/*")  # patterns of a model's files
DTYPE_KEYS = ("torch_dtype", "dtype")  # of transformers 4 and 5
QUANTISED = ("quantization_config", "compression_config")
# Keys that are not written; auto_map names code in the directory, which is not copied or executed.
DROPPED = ("auto_map", "_name_or_path")


def family_of(config: ModelConfig) -> Family:
    """The Hugging Face layout in which a model is saved.

    Raises:
        UserError: No layout can describe the model.
    """
    own = FAMILIES.get(config.files.model_type or "")
    for family in LAYOUTS if own is None else (own, *LAYOUTS):
        if family.holds(config):
            return family
    raise UserError(
        "No Hugging Face layout supports this combination of norms, biases, windows and rotations, "
        f"so the model could not be saved. Set them as in one of {', '.join(FAMILIES)}."
    )


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json` for transformers, vLLM and llama.cpp.

    For a model loaded from a config.json, keep the content of that file, except changed values.
    """
    family, original = family_of(config), json.loads(config.files.config)
    kept = {key: value for key, value in original.items() if key not in DROPPED}
    before = _read(original, family) if family.model_type == original.get("model_type") else {}

    def changed(names: Any) -> bool:
        return not before or any(before[name] != getattr(config, name) for name in names)

    written: dict[str, Any] = {}
    if changed(before.keys() - TOKENS.keys()):
        written = _architecture(family, config)
        kept = {key: value for key, value in kept.items() if key not in KEYS}
    for name, option in TOKENS.items():
        if changed([name]):
            written[option.key] = getattr(config, name)
    dtypes = [key for key in DTYPE_KEYS if key in kept] or DTYPE_KEYS[:1]
    return kept | written | dict.fromkeys(dtypes, config.files.dtype)


def _architecture(family: Family, config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{option.key: getattr(config, name) for name, option in ARCHITECTURE.items()},
        **write_rotary(config),
        "hidden_act": "silu",
        "use_cache": True,
        **family.write(config),
    }


def _read(hf: dict[str, Any], family: Family) -> Fields:
    """Read all fields of `ModelConfig`, except `files`, from a config.json of this family."""
    complete = family.complete(hf)
    options = ARCHITECTURE | TOKENS
    read = {name: option.read(complete) for name, option in options.items()}
    return read | family.read_more(complete)


def from_hf_config(hf: dict[str, Any], where: str) -> ModelConfig:
    """Convert the content of a `config.json` to a `ModelConfig`.

    Args:
        hf: Content of the file.
        where: Path of the file, for error messages.

    Raises:
        UserError: The family or a feature is not supported, or a value is missing or wrong.
    """
    for key in QUANTISED:
        if hf.get(key):
            method = hf[key].get("quant_method", "") if isinstance(hf[key], dict) else ""
            raise UserError(
                f"{where} has a {key} ({method or 'no method'}): the weights are quantised, and "
                "cannot be trained. Use the original model, before quantisation."
            )
    family = FAMILIES.get(str(hf.get("model_type")))
    if family is None:
        raise UserError(
            f"{where} has model_type {hf.get('model_type')!r}, which is not supported. "
            f"Give a model of {', '.join(FAMILIES)}."
        )
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"{where} has hidden_act {hf['hidden_act']!r}, and only 'silu' is supported. Give a "
            "model with 'silu'."
        )
    try:
        config = ModelConfig(**_read(hf, family))
    except Unsupported as lacking:
        raise UserError(f"{where} has {lacking}.") from None
    except UserError as wrong:
        raise UserError(f"{where}: {_in_its_keys(str(wrong))}") from None
    except KeyError as missing:
        raise UserError(f"{where} has no {missing.args[0]!r}. Add it.") from None
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as wrong:
        raise UserError(
            f"{where} has a value of the wrong type: {wrong}. Correct it, or download the file "
            "again."
        ) from None
    files = replace(config.files, model_type=family.model_type, config=json.dumps(hf))
    return replace(config, files=files)


def _in_its_keys(message: str) -> str:
    """Replace names of flags in an error message by the corresponding keys of config.json."""
    for name, option in ARCHITECTURE.items():
        message = message.replace(f"--{name} ", f"{option.key} ")
    return message


def read_config(path: Path) -> ModelConfig:
    """Read the configuration of a model from its directory, or from a config.json.

    Args:
        path: A directory, or a config.json. From a directory, generation_config.json is read as
            well.

    Raises:
        UserError: There is no config.json, the model is not supported, or the directory has links
            to files outside of it.
    """
    if path.is_dir():
        refuse_strays(path, READ)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{path} is not a model: it has no config.json. Give the best/ or final/ directory of "
            f"a run, or a Hugging Face model of {', '.join(FAMILIES)}."
        )
    config = from_hf_config(read_json(file), str(file))
    generation = path / GENERATION
    if path.is_file() or not generation.is_file():
        return config
    read_json(generation)
    text = generation.read_text(encoding="utf-8")
    return with_generation_config(config, text, str(generation))


def with_generation_config(config: ModelConfig, text: Any, where: str) -> ModelConfig:
    """Check the text of a generation_config.json, and add it to the configuration of the model.

    Args:
        text: Content of the file.
        where: Path of the file, for error messages.

    Raises:
        UserError: `text` is not a JSON object, or one of its values has the wrong type.
    """
    try:
        content = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{where} is not a JSON object. Replace it with a good copy.")
    ends = content.get("eos_token_id")
    values = [("eos_token_id", end) for end in (ends if isinstance(ends, list) else [ends])]
    values += [(name, content.get(name)) for name in (*WHOLE, *NUMBERS)]
    for name, value in values:
        kinds = (int, float) if name in NUMBERS else (int,)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        least = 0 if name == "max_new_tokens" else -(2**31)
        if value is not None and not (is_number and least <= value < 2**31):
            kind = "number" if name in NUMBERS else "whole number"
            kind += " from 0" if least == 0 else ""
            raise UserError(f"{where} has {name} {value!r:.60}. Put a {kind} there.")
    return replace(config, generation_config=text)


def write_generation_config(directory: Path, config: ModelConfig) -> None:
    """Write generation_config.json.

    If the model was loaded with such a file, its text is kept. Otherwise, the new file has the ids
    of the special tokens.
    """
    if config.generation_config is not None:
        (directory / GENERATION).write_text(config.generation_config, encoding="utf-8")
        return
    special = {option.key: getattr(config, name) for name, option in TOKENS.items()}
    write_json(
        directory / GENERATION,
        {name: token for name, token in special.items() if token is not None},
    )


def read_json(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        UserError: The file is not valid JSON, or its value is not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as wrong:
        raise UserError(
            f"{file} {parse_fault(wrong)}. Download the file again, or correct it."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object. Download it again, or correct it.")
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write an object as indented JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
