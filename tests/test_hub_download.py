"""Hub ids for models and tokenizers, with a hub that is a directory, and without a network."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.numpy import save_file

from consyn_jax.cli.choices.model_choice import choose_model, deferred_model
from consyn_jax.errors import UserError
from consyn_jax.hub_download import download, is_hub_id
from consyn_jax.resolve import resolve
from consyn_jax.tokenization import BPETokenizer, load_tokenizer

SIZES = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}

LAYER = "model.layers.0"
SHAPES = {
    "model.embed_tokens.weight": (300, 32),
    "model.norm.weight": (32,),
    "lm_head.weight": (300, 32),
    f"{LAYER}.input_layernorm.weight": (32,),
    f"{LAYER}.post_attention_layernorm.weight": (32,),
    **{f"{LAYER}.self_attn.{name}_proj.weight": (32, 32) for name in "qkvo"},
    f"{LAYER}.mlp.gate_proj.weight": (64, 32),
    f"{LAYER}.mlp.up_proj.weight": (64, 32),
    f"{LAYER}.mlp.down_proj.weight": (32, 64),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub with the model Some/Model-1, and an empty working directory."""
    model = tmp_path / "hub" / "Some" / "Model-1"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(SIZES))
    tensors = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    save_file(tensors, model / "model.safetensors")
    BPETokenizer.bytes().save(model)
    (model / "modeling.py").write_text("raise SystemExit")

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert revision in (None, "v1")
        copy = tmp_path / "cache" / f"{name.replace('/', '--')}-{len(allow_patterns)}"
        copy.mkdir(parents=True, exist_ok=True)
        for pattern in allow_patterns:
            for file in (tmp_path / "hub" / name).glob(pattern):
                shutil.copy(file, copy)
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.parametrize("flag", ["model", "checkpoint"])
def test_a_hub_id_is_a_model_to_start_from(flag: str, hub: Path) -> None:
    config, origins = resolve({flag: "Some/Model-1"})
    assert config.model.checkpoint == config.model.model == "Some/Model-1"
    assert origins["checkpoint" if flag == "model" else "model"] == (
        "model" if flag == "model" else "checkpoint"
    )
    choice = choose_model(config.model)
    assert choice.weights is not None
    assert choice.base == choice.stored
    model = deferred_model(config, choice, 300, lambda shape: shape)
    assert model.name == "Some/Model-1", "and no path in a cache"
    assert (choice.weights / "tokenizer_config.json").is_file()
    assert not (choice.weights / "modeling.py").exists(), "programs are not even downloaded"


def test_a_directory_with_weights_is_the_same(hub: Path) -> None:
    directory = str(hub / "hub" / "Some" / "Model-1")
    assert resolve({"model": directory})[0].model.checkpoint == directory
    file = f"{directory}/config.json"
    assert resolve({"model": file})[0].model.checkpoint is None, "an architecture alone"
    (hub / "hub" / "Some" / "Model-1" / "model.safetensors").unlink()
    assert resolve({"model": directory})[0].model.checkpoint is None
    (hub / "hub" / "Some" / "Model-1" / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"only pytorch_model\.bin, a pickle"):
        choose_model(resolve({"model": directory})[0].model)


def test_the_place_of_local_weights_is_recorded_whole(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hub / "hub")
    config, _ = resolve({"checkpoint": "Some/../Some/Model-1"})
    model = deferred_model(config, choose_model(config.model), 300, lambda shape: shape)
    assert model.name == str(hub / "hub" / "Some" / "Model-1")


def test_a_hub_id_is_an_architecture_beside_a_checkpoint(hub: Path) -> None:
    directory = str(hub / "hub" / "Some" / "Model-1")
    config, _ = resolve({"model": "Some/Model-1", "checkpoint": directory})
    choice = choose_model(config.model)
    assert choice.base == choice.stored
    assert choice.weights == Path(directory)


@pytest.mark.parametrize("name", ["Some/Model-1", "Some/Model-1@v1"])
def test_a_hub_id_is_a_tokenizer(name: str, hub: Path) -> None:
    assert load_tokenizer(name).sha256 == BPETokenizer.bytes().sha256
    assert not list((hub / "cache").rglob("*.safetensors")), "only its tokenizer"


def test_a_path_of_that_form_wins(hub: Path) -> None:
    BPETokenizer.train_from_iterator(["local"], 260).save("Some/Model-1")
    assert not is_hub_id("Some/Model-1")
    assert load_tokenizer("Some/Model-1").vocab_size == 260


@pytest.mark.parametrize(
    "name", ["haiku", "gpt2", "./a/b", "../a", "/a/b", "a/b/c", "a/b.json/", "~/a", "a b/c", "é/a"]
)
def test_other_names_are_no_hub_ids(name: str) -> None:
    assert not is_hub_id(name)


def test_without_a_network_the_way_out_is_named(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        cause = OSError("[Errno -2] Name or service not known")
        raise LocalEntryNotFoundError("Please check your internet connection.") from cause

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for attempt in (
        lambda: load_tokenizer("Some/Model-1"),
        lambda: choose_model(resolve({"model": "Some/Model-1"})[0].model),
        lambda: choose_model(resolve({"checkpoint": "Some/Model-1"})[0].model),
    ):
        with pytest.raises(UserError) as refused:
            attempt()
        assert str(refused.value) == (
            "Some/Model-1 is not a directory, and the Hugging Face Hub cannot be reached "
            "([Errno -2] Name or service not known). On a machine with a network, run `hf download "
            "Some/Model-1 --local-dir DIR`, copy DIR here, and give its path."
        )


def test_a_model_that_the_hub_does_not_have(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> str:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(UserError, match="the Hugging Face Hub has no public model"):
        download("Some/Other", ["*"])


def test_a_mistyped_path_is_answered_with_what_is_there(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=OSError("offline")))
    (Path("models") / "qwen3").mkdir(parents=True)
    with pytest.raises(UserError) as refused:
        choose_model(resolve({"checkpoint": "models/qwen"})[0].model)
    assert str(refused.value) == (
        "models/qwen is not a local path, and the Hugging Face Hub model of that name cannot be "
        "reached (offline). Correct the path or the name; the directory models contains qwen3."
    )
