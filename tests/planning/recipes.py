"""The shipped recipes, compiled once for GPUs that are not here."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from consyn_jax.config import RunConfig, architecture
from consyn_jax.config_file import read_config_file
from consyn_jax.model_config import ModelConfig
from consyn_jax.planning.aot import CompiledProgram, compile_train_step
from consyn_jax.planning.compiled import Instruction, instructions
from consyn_jax.resolve import resolve

CONFIGS = Path(__file__).parents[2] / "configs"


def recipe(name: str, changes: dict[str, Any]) -> tuple[ModelConfig, RunConfig]:
    """The model and run of a recipe with some changed values."""
    run, _ = resolve(changes, read_config_file(CONFIGS / f"{name}.yaml"), file_name=name)
    words = {"vocab_size": 49_152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return architecture(run.model, **words), run


@cache
def _compiled(
    name: str, topology: str, changes: tuple[tuple[str, Any], ...]
) -> tuple[CompiledProgram, str]:
    with tempfile.NamedTemporaryFile(mode="r", encoding="utf-8") as text:
        program = compile_train_step(*recipe(name, dict(changes)), topology, Path(text.name))
        return program, text.read()


def compiled(name: str, topology: str, changes: dict[str, Any]) -> CompiledProgram:
    return _compiled(name, topology, tuple(changes.items()))[0]


def compiled_instructions(name: str, topology: str, changes: dict[str, Any]) -> list[Instruction]:
    return instructions(_compiled(name, topology, tuple(changes.items()))[1])


def attention_calls(kernels: dict[str, int]) -> tuple[int, ...]:
    """How often the attention kernels run: forward, and backward for queries and for keys.

    There must be no others.
    """
    names = [f"document_attention_{kernel}" for kernel in ("forward", "queries", "keys")]
    assert {name for name in kernels if "attention" in name or "fmha" in name} == set(names)
    return tuple(kernels[name] for name in names)
