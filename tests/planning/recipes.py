"""The shipped recipes, compiled once for GPUs that are not here."""

import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import pytest

from consyn_jax.config import RunConfig, architecture
from consyn_jax.config_file import read_config_file
from consyn_jax.distributed.compiled import Instruction, instructions
from consyn_jax.model_config import ModelConfig
from consyn_jax.planning.aot import CompiledProgram, compile_train_step, environment
from consyn_jax.resolve import resolve

# XLA's schedules and register counts differ from those of JAX 0.10; tests have figures for both.
IS_NEWEST = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 12)
CONFIGS = Path(__file__).parents[2] / "configs"
VERSE, STANZA = "verse-1xh200", "stanza-8xh200"  # heads of 64 and 128
# The default steps on the GPUs whose kernels are looked at.
STEPS = [
    *((VERSE, gpu) for gpu in ("h200", "b200", "a100", "rtx4090", "rtx3090", "l40s")),
    (STANZA, "h200"),
    *(
        pytest.param(STANZA, gpu, marks=[pytest.mark.slow, pytest.mark.exhaustive])
        for gpu in ("b200", "a100", "rtx4090", "rtx3090", "l40s")
    ),
]
# What is changed in these steps.
ONE_LAYER = {"num_layers": 1, "batch_size": 4, "gradient_accumulation_steps": 1}


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


def compiled_text(name: str, topology: str, changes: dict[str, Any]) -> str:
    return _compiled(name, topology, tuple(changes.items()))[1]


def compiled_instructions(name: str, topology: str, changes: dict[str, Any]) -> list[Instruction]:
    return instructions(compiled_text(name, topology, changes))


def attention_calls(kernels: dict[str, int]) -> tuple[int, ...]:
    """How often the attention kernels run: forward, and backward for queries and for keys.

    There must be no others.
    """
    names = [f"document_attention_{kernel}" for kernel in ("forward", "queries", "keys")]
    assert {name for name in kernels if "attention" in name or "fmha" in name} == set(names)
    return tuple(kernels[name] for name in names)


def run_apart(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process that can compile for absent devices.

    It has no cache of programs: a program from there gives no warning, and a compiler without a
    device cannot read it.
    """
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment() | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
        check=True,
    )


def dumping(place: Path) -> str:
    """XLA's flags to write a program and its kernels' code.

    From JAX 0.12 on, the code is written on request only. A request for more than the code also
    writes each kernel in all stages of its compilation, which takes minutes.
    """
    return f"--xla_dump_to={place}" + " --xla_dump_emitter_re=^ptx$" * IS_NEWEST


class Dumped(NamedTuple):
    """A step as it was compiled, its instructions, and the PTX of each kernel by its name."""

    program: CompiledProgram
    instructions: list[Instruction]
    ptx: dict[str, str]


def dumped(
    name: str,
    gpu: str,
    precision: str = "bf16",
    logits: str = "float32",
    optimizer: str = "adamw",
) -> Dumped:
    """One layer of a recipe's step for one GPU, with the kernels' code."""
    return _dumped(name, gpu, precision, logits, optimizer)


@cache  # however a default is given
def _dumped(name: str, gpu: str, precision: str, logits: str, optimizer: str) -> Dumped:
    changes = {"mixed_precision": precision, "logits_dtype": logits, "optimizer": optimizer}
    with tempfile.TemporaryDirectory() as place:
        text = Path(place) / "program"
        with mock.patch.dict(os.environ, XLA_FLAGS=dumping(Path(place) / "dump")):
            program = compile_train_step(*recipe(name, ONE_LAYER | changes), f"{gpu}:1x1", text)
        files = [path.read_text() for path in Path(place).glob("dump/*train_step*.ptx")]
        ptx = {kernel: file for file in files for kernel in re.findall(r"\.entry (\w+)", file)}
        return Dumped(program, instructions(text.read_text()), ptx)
