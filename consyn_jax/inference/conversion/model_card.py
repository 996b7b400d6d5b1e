"""Write the model card: README.md for readers on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import yaml

from consyn_jax import __version__
from consyn_jax.errors import UserError, listed
from consyn_jax.inference.model_source import ModelSource
from consyn_jax.model.arithmetic import num_parameters, padding_parameters
from consyn_jax.model.pretrained.config_json import family_of
from consyn_jax.training.logging.metrics import read_metrics
from consyn_jax.training.run.directory import CONFIG
from consyn_jax.training.run.identity import read_run_config

CARD = "README.md"
LARGEST_CARD = 1 << 20  # characters of the model's own card that are kept
METRICS = ("train/loss", "eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/accuracy")
# Settings of a run to list in the card.
RECIPE = ("optimizer", "lr", "scheduler", "batch_size", "max_tokens", "mixed_precision", "seed")


def model_card(source: ModelSource, name: str, dtype: str, license: str | None) -> str:
    """Make the text of README.md: front matter for the Hub, then facts about the model.

    A card that came with the model is kept, with a new section about the conversion.

    Args:
        name: Name of the model for the title.
        dtype: Number type of the written weights.
        license: A license identifier of the Hub, such as apache-2.0; None if not stated.
    """
    made = f"Made with consyn-convert {__version__} from {source.taken}, as {dtype}."
    own = source.directory / CARD
    if source.step is None and source.base is None and own.is_file():
        with own.open(encoding="utf-8", errors="replace") as file:
            text = file.read(LARGEST_CARD).rstrip()
        return f"{text}\n\n## Conversion\n\n{made}\n"
    family = family_of(source.config).model_type
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {"license": license} if license else {}
    front |= {"base_model": source.base} if source.base else {}
    front |= {"tags": [family, "consyn_jax"]}
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}",
        made,
        "## Model\n\n" + _rows(_size(source, family, dtype)),
        *_training(source.run),
        "## License\n\n" + (license or "Not stated when the model was converted."),
        "## Versions\n\n" + _rows({"consyn_jax": __version__, "JAX": jax.__version__}),
    ]
    return "\n\n".join(sections) + "\n"


def _rows(values: dict[str, Any]) -> str:
    lines = [f"| {name} | {_plain(value)} |" for name, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _plain(value: Any) -> str:
    """Format a value for a cell of a Markdown table."""
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _size(source: ModelSource, family: str, dtype: str) -> dict[str, Any]:
    config, tokenizer = source.config, source.tokenizer
    return {
        "parameters": num_parameters(config) - padding_parameters(config),
        "layout": family,
        "number type": dtype,
        "layers": config.num_layers,
        "width": config.hidden_dim,
        "query heads": config.num_heads,
        "key-value heads": config.num_kv_heads,
        "feed-forward width": config.mlp_dim,
        "context in tokens": config.context,
        "vocabulary": config.vocab_size,
        "chat template": "yes" if source.chat_template else "no",
        "tokenizer": "none" if tokenizer is None else f"SHA-256 {tokenizer.sha256[:16]}",
    }


def _training(run: Path | None) -> list[str]:
    """Sections about a run: its data, its recipe and its last metrics."""
    if run is None:
        return []
    try:
        old = read_run_config(run / CONFIG)
        lines = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    except (UserError, json.JSONDecodeError) as error:
        return [f"## Training\n\nThe record of the run cannot be read: {_plain(error)}"]
    last: dict[str, Any] = {}
    for line in lines:
        last |= {name: line[name] for name in ("step", "tokens", *METRICS) if name in line}
    data = old.get("data") or ["unknown"]
    rows = {"data": listed(data if isinstance(data, list) else [data], 8)}
    rows |= {name: old[name] for name in ("checkpoint", *RECIPE) if old.get(name) is not None}
    numbers = {"steps": last.pop("step", 0), "tokens": last.pop("tokens", 0)}
    numbers |= {name: f"{value:.4f}" for name, value in last.items()}
    return ["## Training\n\n" + _rows(rows), "## Results\n\n" + _rows(numbers)]
