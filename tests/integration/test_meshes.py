"""One command on one device and on eight: the same losses."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from .conftest import MODEL, Run

FLAGS = [
    *MODEL,
    "--max_steps",
    "4",
    "--max_tokens",
    "32",
    "--batch_size",
    "8",
    "--logging_steps",
    "1",
    "--logging_backend",
    "none",
]
FLAGS += ["--eval_steps", "4", "--save_steps", "4", "--validation_fraction", "0.2", "--quiet"]


@pytest.fixture(scope="module")
def alone(
    process: Callable[..., Run], corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    run = process(
        tmp_path_factory.mktemp("alone") / "run", *FLAGS, "--data", corpus, JAX_NUM_CPU_DEVICES="1"
    )
    assert run.code == 0, run.said
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        *(
            pytest.param(mesh, marks=pytest.mark.exhaustive)
            for mesh in ("fsdp=8", "data=4,tensor=2")
        ),
        "data=2,fsdp=2,context=2",
    ],
)
def test_the_same_losses_as_on_one_device(
    mesh: str, alone: Run, here: Callable[..., Run], corpus: Path, tmp_path: Path
) -> None:
    run = here(tmp_path / "run", *FLAGS, "--data", corpus, "--mesh", mesh)
    assert run.code == 0, run.said
    for name in ("train/loss", "eval/loss"):
        here_, there = ([line[name] for line in r.numbers if name in line] for r in (run, alone))
        assert len(here_) >= 1
        np.testing.assert_allclose(here_, there, rtol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(
    alone: Run, here: Callable[..., Run], process: Callable[..., Run], corpus: Path, tmp_path: Path
) -> None:
    flags = [*FLAGS, "--data", corpus, "--save_steps", "2"]
    first = here(tmp_path / "run", *flags)
    resumed = process(first.path, *flags, "--resume", "2", JAX_NUM_CPU_DEVICES="1")
    assert resumed.code == 0, resumed.said
    losses = [
        [line["train/loss"] for line in run.numbers if "train/loss" in line]
        for run in (resumed, alone)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_fewer_sequences_than_devices_are_shared(
    here: Callable[..., Run], corpus: Path, tmp_path: Path
) -> None:
    run = here(
        tmp_path / "run",
        *MODEL,
        "--max_tokens",
        "32",
        "--batch_size",
        "4",
        "--data",
        corpus,
        "--dry_run",
    )
    assert run.code == 0, run.said
    assert (
        "fsdp=4, context=2: weights split over 4 devices, each sequence over 2 (context)"
        in run.said
    )
