"""The option dataclasses."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.config import PRESETS, RunConfig
from consyn_jax.flags import flags


def test_every_flag_has_help_and_a_default_of_its_type() -> None:
    for flag in flags(RunConfig).values():
        assert flag.help
        assert flag.default is None or flag.many or isinstance(flag.default, flag.type)


def test_a_run_is_a_frozen_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().budget.seed = 3  # type: ignore[misc]


ROWS = {
    "layers": ["num_layers"],
    "width": ["hidden_dim"],
    "heads / key-value heads / head width": ["num_heads", "num_kv_heads", "head_dim"],
    "feed-forward": ["mlp_dim"],
    "context": ["context"],
    "input and output embedding": ["tie_embeddings"],
    "row length": ["max_tokens"],
    "base of the rotation": ["rope_theta"],
    "norm of queries and keys": ["qk_norm"],
    "peak rate": ["lr"],
    "weight decay": ["weight_decay"],
    "β2": ["beta2"],
}
WORDS: dict[str, Any] = {"one": True, "two": False, "yes": True, "no": False}


def test_presets_are_those_of_their_page() -> None:
    """The page gives the reason for each value, so a changed value needs a changed page."""
    page = Path(__file__).parents[1] / "docs" / "design" / "presets.md"
    lines = page.read_text().split("\n\n")[1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found: dict[str, dict[str, Any]] = {name: {} for name in rows[0][1:]}
    for title, *cells in rows[2:]:
        for name, cell in zip(found, cells, strict=True):
            for option, word in zip(ROWS.get(title, []), cell.split(" / "), strict=False):
                found[name][option] = WORDS[word] if word in WORDS else float(word)
    assert found == PRESETS
