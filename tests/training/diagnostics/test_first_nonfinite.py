"""Locating the first non-finite value of a step."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from tiny_program import CONFIG, A, B

from consyn_jax.model.parameters import layout
from consyn_jax.training.diagnostics import first_nonfinite
from consyn_jax.training.diagnostics.first_nonfinite import Diagnosis, Row, locate_first_nonfinite
from consyn_jax.training.diagnostics.step_statistics import Statistics


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_every_parameter_of_every_kind_of_block_has_a_row(
    qk_norm: bool, tie_embeddings: bool
) -> None:
    config = replace(CONFIG, qk_norm=qk_norm, tie_embeddings=tie_embeddings)
    shapes: Any = layout(config).shapes
    expected = {name for name in shapes if name != "layers"}
    expected |= {f"layer {i} {name}" for name in shapes["layers"] for i in range(config.num_layers)}
    number = np.zeros(config.num_layers)
    found = jax.tree.map(lambda _: Statistics(number, number, number), shapes)
    rows = [row.place for row in first_nonfinite._parameter_rows(config, found)]
    assert len(rows) == len(expected)
    assert set(rows) == expected


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_non_finite_weight_in_a_layer(diagnosed: Callable[..., Diagnosis]) -> None:
    def change(params: Any) -> None:
        params["layers"]["up"][1, 3, 4] = np.inf

    found = diagnosed(change)
    where, text = locate_first_nonfinite(found)
    assert where == "layer 1 MLP"
    assert text.startswith("The first non-finite activations are in layer 1 MLP: ")
    assert text.endswith(
        "Before this step, the weight layer 1 up already had 1 non-finite value. "
        "Such weights are on 1 of 4 devices: cpu:0 of process 0."
    ), text
    assert [row.nonfinite > 0 for row in found.activations] == [False] * 5 + [True] * 4


def test_an_embedding_row_that_few_sequences_use(
    diagnosed: Callable[..., Diagnosis], batch: dict[str, np.ndarray]
) -> None:
    token = int(batch["input_ids"][1, 2, 3])
    samples = [[f"sample {a}{b}" for b in range(B)] for a in range(A)]
    holders = [(a, b) for a in range(A) for b in range(B) if token in batch["input_ids"][a, b]]

    def change(params: Any) -> None:
        params["embedding"][token] = np.nan

    found = diagnosed(change)
    assert found.sequences == tuple(holders)
    where, text = locate_first_nonfinite(found, samples)
    assert where == "embedding"
    assert f"Affected sequences: {len(holders)} of 16 (" in text
    assert "sample 12" in text
    unread = sorted(set(range(200)) - set(batch["input_ids"].ravel().tolist()))[0]

    def change_unread(params: Any) -> None:
        params["embedding"][unread] = np.nan

    assert locate_first_nonfinite(diagnosed(change_unread))[1].startswith(
        "All activations and gradients are finite, but the weight embedding has 16 non-finite "
    )


def test_a_gradient_norm_beyond_float32_and_a_finite_step(
    diagnosed: Callable[..., Diagnosis],
) -> None:
    def change(params: Any) -> None:
        params["output"] *= 1e24  # large logits, and gradients whose squares overflow

    found = diagnosed(change)
    assert not any(row.nonfinite for row in found.activations + found.gradients)
    assert locate_first_nonfinite(found)[0] == "gradient norm"
    where, text = locate_first_nonfinite(diagnosed(lambda params: None))
    assert where is None
    assert "Suspect the device" in text


def test_the_backward_pass_is_traced_to_its_source() -> None:
    def rows(*bad: str) -> tuple[Row, ...]:
        return tuple(
            Row(place, 1.0, 2.0, int(place in bad))
            for place in ("embedding", "layer 0 q", "layer 0 up", "layer 1 q", "layer 1 up", "norm")
        )

    found = Diagnosis(
        1.0,
        math.nan,
        rows(),
        rows("embedding", "layer 0 q", "layer 0 up", "layer 1 q"),
        rows(),
        (),
        8,
        (),
        4,
    )
    assert locate_first_nonfinite(found) == (
        "layer 1 q",
        "The forward pass is finite. In the backward pass, the first non-finite gradients are "
        "those of layer 1 q: 1 non-finite value.",
    )
