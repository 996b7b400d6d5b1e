import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_program import CONFIG, RUN

from consyn_jax.training.diagnostics.bundle import read_bundle
from consyn_jax.training.diagnostics.replay import repeat_step


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_moved_bundle_replays_on_another_mesh(
    bundle: Path, batch: dict[str, np.ndarray], tmp_path: Path
) -> None:
    bundle = shutil.copytree(bundle, tmp_path / "moved")
    read = read_bundle(bundle)
    assert (read.step, read.total_steps, read.model) == (7, 20, CONFIG)
    assert math.isnan(read.metrics["loss"])
    assert read.metrics["grad_norm"] == -math.inf
    for name, values in batch.items():
        assert read.batch[name].dtype == values.dtype
        np.testing.assert_array_equal(read.batch[name], values)
    record = json.loads((bundle / "replay.json").read_text())
    assert record["began"] == "layer 1 attention"
    assert set(record["versions"]) >= {
        "consyn_jax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
    }
    again = repeat_step(read, RUN)
    assert math.isnan(again.metrics["loss"])
    assert again.text.startswith("The first non-finite activations are in layer 1 attention: ")
    assert again.mesh["data"] == 2 != read.mesh["data"]
