"""GPU kernels, interpreted on a CPU."""

from functools import partial

import pytest
from jax.experimental import pallas

from consyn_jax.model.kernels.document_attention import TILES, Tile, Tiles

SMALL = Tiles(Tile(16, 16, 4, 2), Tile(16, 16, 4, 2), Tile(16, 16, 4, 2))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpret Pallas kernels, with tiles that split even short sequences."""
    monkeypatch.setattr(pallas, "pallas_call", partial(pallas.pallas_call, interpret=True))
    for width in TILES:
        monkeypatch.setitem(TILES, width, SMALL)
