"""Every command in README and docs is one that the real parser takes."""

from pathlib import Path

import pytest
from documented_commands import MODULES, PAGES, ROOT, Command, commands, filled_in, span_commands

from consyn_jax.cli.train import read_arguments
from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError
from consyn_jax.flags import flags


def refusal(command: Command) -> str:
    """Why the parser of a command refuses it; empty if it does not."""
    tree = flags(RunConfig) if command.name == "consyn-train" else {}
    try:
        command.module.read_arguments(filled_in(command.arguments, tree))
    except UserError as error:
        return f"{command.place}: {command.name} {' '.join(command.arguments)}: {error}"
    except SystemExit as end:  # --help, --version
        return "" if end.code == 0 else f"{command.place}: ends with {end.code}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_parses(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # recipes are named from there
    assert [said for command in commands(page) if (said := refusal(command))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_flag_of_a_command_in_a_sentence_exists(page: Path) -> None:
    """A sentence names a command and flags of it, often without their values."""
    said = [refusal(command) for command in span_commands(page)]
    assert [text for text in said if "There is no flag" in text] == []


def test_all_commands_are_in_the_docs() -> None:
    assert {command.name for page in PAGES for command in commands(page)} == set(MODULES)


@pytest.mark.parametrize(
    "line",
    [
        "consyn-train --no_such_flag 1",
        "!consyn-train --modle haiku",
        ".venv/bin/consyn-generate runs/verse --prompts hello | head",
        "CUDA_VISIBLE_DEVICES=0 consyn-evaluate runs/verse --data",
        "consyn-convert runs/verse --to pdf --output x && true",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    from documented_commands import commands_in

    (command,) = commands_in(line, "here")
    assert refusal(command)


def test_placeholders() -> None:
    words = ("...", "--max_steps", "N", "--config", "mine.yaml", "--data", "N")
    assert filled_in(words, flags(RunConfig)) == ["--max_steps", "1", "--data", "N"]
    config, _, _ = read_arguments(filled_in(words, flags(RunConfig)))
    assert config.budget.max_steps == 1
