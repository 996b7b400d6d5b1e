"""One batch, one compiled diagnosis and one bundle for all tests of this folder."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_program import A, B, T, place, program, state_of

from consyn_jax.training.diagnostics import first_nonfinite
from consyn_jax.training.diagnostics.bundle import Incident, write_bundle
from consyn_jax.training.diagnostics.first_nonfinite import Diagnosis, diagnose
from consyn_jax.training.program import Program


@pytest.fixture(scope="session")
def batch() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, 200, (A, B, T + 1)).astype(np.int32)
    segments = np.broadcast_to(np.where(np.arange(T) < 5, 1, 2), (A, B, T)).astype(np.int32)
    return {
        "input_ids": ids[..., :-1],
        "labels": ids[..., 1:],
        "segment_ids": segments,
        "loss_mask": np.ones((A, B, T), bool),
    }


@pytest.fixture(scope="session")
def compiled_once() -> Iterator[Program]:
    """A program whose statistics are compiled once."""
    p, patch = program(fsdp=4), pytest.MonkeyPatch()
    observe, lower = (
        first_nonfinite.lower_step_statistics(p, A, B, T).compile(),
        first_nonfinite.lower_step_statistics,
    )
    patch.setattr(
        first_nonfinite,
        "lower_step_statistics",
        lambda program, *shape: (
            SimpleNamespace(compile=lambda: observe) if program is p else lower(program, *shape)
        ),
    )
    yield p
    patch.undo()


@pytest.fixture
def diagnosed(compiled_once: Program, batch: dict[str, np.ndarray]) -> Callable[..., Diagnosis]:
    """Diagnose the step with changed weights."""
    return lambda change: diagnose(
        compiled_once, state_of(compiled_once, change), place(batch, compiled_once.mesh)
    )


@pytest.fixture(scope="session")
def bundle(
    compiled_once: Program, batch: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path, p = tmp_path_factory.mktemp("run"), compiled_once
    (path / "config.yaml").write_text("model: haiku\nmax_tokens: 8\n")

    def change(params: Any) -> None:
        params["layers"]["q"][1, 0, 0, 0] = np.nan

    incident = Incident(
        7,
        {"loss": math.nan, "grad_norm": -math.inf, "tokens": 64.0},
        20,
        [[f"sample {b}" for b in range(B)]] * A,
    )
    text = write_bundle(
        path / "nonfinite" / "7",
        p,
        state_of(p, change),
        place(batch, p.mesh),
        incident,
        path / "config.yaml",
        pytest.fail,
    )
    assert text.startswith("The first non-finite activations are in layer 1 attention: ")
    assert text.endswith(f"To repeat the step: consyn-train --replay {path / 'nonfinite' / '7'}")
    return path / "nonfinite" / "7"
