"""Kernels of GPUs and TPUs, interpreted on a CPU."""

from typing import Any

import jax
import pytest
from jax.experimental import pallas
from jax.experimental.pallas import triton

from consyn_jax.model.kernels.document_attention import TILES, Tile, Tiles

# The interpreter of JAX 0.12 runs these kernels. CI tests them with the newest JAX.
IS_NEW = jax.__version_info__ >= (0, 12)
collect_ignore = (
    [] if IS_NEW else ["kernels/mosaic_interpreter.py", "kernels/test_hopper_attention.py"]
)

SMALL = Tiles(Tile(16, 16, 4, 2), Tile(16, 16, 4, 2), Tile(16, 16, 4, 2))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpret Pallas kernels, with tiles that split even short sequences."""
    compiled = pallas.pallas_call

    def interpreted_call(*given: Any, **named: Any) -> Any:
        return compiled(*given, **named | {"interpret": True})

    monkeypatch.setattr(pallas, "pallas_call", interpreted_call)
    # One program runs at a time, and as one thread.
    monkeypatch.setattr(triton, "debug_barrier", lambda: None)
    for width in TILES:
        monkeypatch.setitem(TILES, width, SMALL)
