"""Every row of docs/models.md through the command: trained, exported, and read by transformers."""

import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .conftest import Run

sys.path.append(str(Path(__file__).parents[1] / "model" / "pretrained"))
from models_page import CASES, Case, random_model

pytestmark = pytest.mark.slow
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLAGS: list[object] = ["--tokenizer", "bytes", "--max_tokens", "32", "--batch_size", "8"]
FLAGS += ["--max_steps", "2", "--warmup_steps", "0", "--quiet", "--logging_backend", "none"]
FLAGS += ["--save_steps", "100", "--logging_steps", "1", "--validation_fraction", "0"]
# So little that a float32 weight keeps its bits, and the program is that of any other rate.
STILL = "1e-30"
FIRST_OF_FAMILY = [next(c for c in CASES if c.family == f) for f in {c.family: 0 for c in CASES}]
# Type of the checkpoint, --save_dtype, and whether every family has it in CI.
WAYS = [("bfloat16", None, True), ("float32", "bfloat16", True)]
WAYS += [("float32", None, False), ("bfloat16", "float32", False)]


def checkpoint(case: Case, place: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    random_model(case).to(dtype).save_pretrained(place)
    return place


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def loads(directory: Path, dtype: torch.dtype) -> None:
    """In transformers, with every weight found, and with finite logits."""
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def marked(*values: Any, often: bool) -> Any:
    """A case that CI runs, or one that is left to an exhaustive run."""
    shown = "-".join(v.name if isinstance(v, Case) else str(v) for v in values)
    return pytest.param(*values, id=shown, marks=() if often else pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        marked(case, name, often=case in FIRST_OF_FAMILY)
        for case, name in zip(CASES, cycle(DTYPES), strict=False)
    ],
)
def test_each_row_trains_and_exports_by_the_command(
    case: Case, name: str, corpus: Path, here: Callable[..., Run], tmp_path: Path
) -> None:
    """In its own layout, in the type of `--save_dtype`."""
    before = checkpoint(case, tmp_path / "before")
    flags = [*FLAGS, "--checkpoint", before, "--data", corpus, "--lr", "1e-2", "--save_dtype", name]
    run = here(tmp_path / "run", *flags)
    assert run.code == 0, run.said
    old, new = tensors(before), tensors(run.path / "final")
    assert old.keys() == new.keys()
    for key, value in new.items():
        assert (value.dtype, value.shape) == (DTYPES[name], old[key].shape)
        assert not torch.equal(value.float(), old[key].float()), f"{key} was not trained"
    loads(run.path / "final", DTYPES[name])
    losses = [line["train/loss"] for line in run.numbers if "train/loss" in line]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


@pytest.mark.parametrize(
    ("case", "came", "saved"),
    [
        marked(case, came, saved, often=often or case.family in ("llama", "phi3"))
        for came, saved, often in WAYS
        for case in FIRST_OF_FAMILY
    ],
)
def test_weights_that_do_not_move_are_exported_byte_for_byte(
    case: Case, came: str, saved: str | None, corpus: Path, here: Callable[..., Run], tmp_path: Path
) -> None:
    """In the type of the checkpoint, or rounded to that of `--save_dtype` once."""
    before = checkpoint(case, tmp_path / "before", DTYPES[came])
    flags: list[Any] = [*FLAGS, "--checkpoint", before, "--data", corpus, "--lr", STILL]
    run = here(tmp_path / "run", *flags, *(["--save_dtype", saved] if saved else []))
    assert run.code == 0, run.said
    old, new = tensors(before), tensors(run.path / "final")
    wanted = DTYPES[saved or came]
    assert old.keys() == new.keys()
    for key, value in new.items():
        assert value.dtype == wanted
        assert torch.equal(value.view(torch.uint8), old[key].to(wanted).view(torch.uint8)), key
    loads(run.path / "final", wanted)
