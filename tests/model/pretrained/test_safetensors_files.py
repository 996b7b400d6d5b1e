import json
import resource
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.errors import UserError
from consyn_jax.model import ConsynLMHeadModel


def test_pickles_are_never_opened(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"has no model\.safetensors\. Download or copy the model again\.$"
    ):
        ConsynLMHeadModel.from_pretrained(model)
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(
        UserError, match=r"only pytorch_model\.bin, a pickle, which is never opened"
    ):
        ConsynLMHeadModel.from_pretrained(model)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_damaged_weights_are_refused(model: Path, keep: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged"):
        ConsynLMHeadModel.from_pretrained(model)


def test_a_file_that_may_not_be_mapped_is_refused_with_the_remedy(model: Path) -> None:
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(1 << 40)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 36, before[1]))
    try:
        with pytest.raises(
            UserError, match=r"of 1,099,511,627,776 bytes cannot be mapped .*ulimit"
        ):
            ConsynLMHeadModel.from_pretrained(model)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": {"norm": "../elsewhere.safetensors"}},
        {"weight_map": {"norm": 3}},
        {"weight_map": {"model.norm.weight": "gone.safetensors"}},
    ],
)
def test_an_index_with_other_files_is_refused(model: Path, index: dict[str, Any]) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError):
        ConsynLMHeadModel.from_pretrained(model)
