"""Every recipe in configs/ resolves, and its first line is its command."""

from pathlib import Path

import pytest

from consyn_jax.cli.train import read_arguments
from consyn_jax.config import RunConfig, architecture
from consyn_jax.config_file import read_config_file
from consyn_jax.flags import flags
from consyn_jax.model.arithmetic import num_parameters
from consyn_jax.resolve import resolve
from consyn_jax.tokenization import BPETokenizer

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_resolves(path: Path) -> None:
    values = read_config_file(path)
    assert set(values) <= set(flags(RunConfig)), "a recipe's keys are the flags' names"
    _, origins = resolve({}, values, file_name=path.name)
    assert all(origins[name] == f"file {path.name}" for name in values)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_starts_with_its_command(path: Path) -> None:
    program, *arguments = path.read_text().splitlines()[0].removeprefix("# ").split()
    assert program == "consyn-train"
    assert arguments[:2] == ["--config", f"configs/{path.name}"]
    config, _, print_config = read_arguments(["--config", str(path), *arguments[2:]])
    assert not print_config
    assert config.budget.max_steps or config.budget.total_tokens or config.budget.epochs


def test_the_large_recipes_have_the_tokens_per_step_of_gpt3() -> None:
    """Brown et al., 2020, table 2.1: 0.5 M, 1 M and 2 M tokens for 125 M, 1.3 B and 13 B
    parameters."""
    tokens = {}
    for path in RECIPES:
        run, _ = resolve({}, read_config_file(path))
        tokens[path.stem] = (
            run.budget.batch_size * run.budget.gradient_accumulation_steps * run.length
        )
    assert (tokens["verse-1xh200"], tokens["stanza-8xh200"], tokens["epic-64xh200"]) == (
        2**19,
        2**20,
        2**21,
    )


def test_the_enwik8_model_is_as_large_as_its_reference() -> None:
    """Transformer-XL's model of 41 M parameters."""
    path = next(path for path in RECIPES if path.stem == "enwik8")
    run, _ = resolve({}, read_config_file(path))
    parameters = num_parameters(architecture(run.model, vocab_size=BPETokenizer.bytes().vocab_size))
    assert 40e6 <= parameters <= 45e6
    assert f"{parameters:,} parameters" in path.read_text()
