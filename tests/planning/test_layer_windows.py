"""Windows and rotations on some layers only, compiled for a GPU that is not here."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from analyses import array_shapes, with_length_twice
from recipes import attention_calls, recipe

from consyn_jax.distributed.compiled import instructions
from consyn_jax.planning.aot import compile_train_step

pytestmark = [pytest.mark.usefixtures("cuda_packages"), pytest.mark.slow]
LENGTH, PRIME = 1664, 13  # 13 divides the length, and no other size
LAYERS = 3


QWEN3: dict[str, Any] = {"sliding_window": 256, "window_layers": (True, False, True)}
SMOLLM3 = QWEN3 | {"qk_norm": False, "rotary_layers": (True, True, False)}


@pytest.mark.parametrize(
    ("kinds", "checkpointing"),
    [(QWEN3, "none"), (QWEN3, "full"), (SMOLLM3, "full")],
    ids=["qwen3, unrolled", "qwen3, in a loop", "smollm3, in a loop"],
)
def test_layers_with_windows_of_their_own_use_the_kernels(
    kinds: dict[str, Any], checkpointing: str, tmp_path: Path
) -> None:
    """No mask or score is in memory, not even in a fusion."""
    changes = {"num_layers": LAYERS, "max_tokens": LENGTH, "gradient_accumulation_steps": 1}
    changes |= {"batch_size": 2, "gradient_checkpointing": checkpointing}
    model, run = recipe("verse-1xh200", changes)
    program = compile_train_step(replace(model, **kinds), run, "h200:1x1", tmp_path / "text")
    forward = 2 * LAYERS if checkpointing == "full" else LAYERS
    assert attention_calls(program.kernels) == (forward, LAYERS, LAYERS)
    found = instructions((tmp_path / "text").read_text())
    assert array_shapes(found)["bf16"]
    assert not with_length_twice(found, PRIME)
