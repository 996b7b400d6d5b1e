import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from layouts import LAYOUTS, random_params
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from consyn_jax.distributed.mesh import build_mesh
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.pretrained import safetensors_files
from consyn_jax.model.pretrained.tensors import Part
from consyn_jax.model.pretrained.weights import save_parameters
from consyn_jax.training.run.model_files import WholeModel

IDS = np.random.default_rng(1).integers(0, 259, (2, 24))  # longer than the window


def our_logits(model: ConsynLMHeadModel) -> np.ndarray:
    return np.asarray(
        jax.jit(lambda p: ConsynLMHeadModel.from_parameters(model.config, p)(jnp.asarray(IDS)))(
            model.parameters
        )
    )


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


@pytest.mark.slow
@pytest.mark.users_compiler
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_saved_model_gives_the_same_in_transformers(name: str, tmp_path: Path) -> None:
    config, architecture = LAYOUTS[name]
    model = ConsynLMHeadModel.from_parameters(config, random_params(config))
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs).__name__ == architecture
    assert theirs.get_input_embeddings().weight.shape == (259, 32)
    np.testing.assert_allclose(our_logits(model), their_logits(theirs), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_saving_and_loading_changes_nothing(name: str, tmp_path: Path) -> None:
    config, _ = LAYOUTS[name]
    params = random_params(config)
    ConsynLMHeadModel.from_parameters(config, params).save_pretrained(tmp_path)
    again = ConsynLMHeadModel.from_pretrained(tmp_path)
    assert replace(again.config, files=config.files) == config
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    for key in ("embedding", "output"):
        if key in params:
            np.testing.assert_array_equal(again.parameters[key][:259], params[key][:259])
            assert not again.parameters[key][259:].any(), "rows that pad the vocabulary are zero"
    jax.tree.map(np.testing.assert_array_equal, again.parameters["layers"], params["layers"])
    np.testing.assert_array_equal(again.parameters["norm"], params["norm"])


@pytest.mark.slow
@pytest.mark.users_compiler
@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mistral"])
def test_a_model_of_transformers_gives_the_same_here(kind: str, tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    window = {"sliding_window": 5} if kind == "Mistral" else {}
    hf_config = getattr(transformers, f"{kind}Config")(
        **sizes, head_dim=16, max_position_embeddings=64, initializer_range=0.3, **window
    )
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(hf_config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    np.testing.assert_allclose(
        our_logits(ConsynLMHeadModel.from_pretrained(tmp_path)), their_logits(theirs), atol=1e-4
    )


def test_shards_are_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = LAYOUTS["llama"]
    model = ConsynLMHeadModel.from_parameters(config, random_params(config))
    monkeypatch.setattr(safetensors_files, "MAX_SHARD_BYTES", 40_000)
    model.save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(
        v.nbytes for file in files for v in load_file(file).values()
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        ConsynLMHeadModel.from_pretrained(tmp_path).parameters["layers"],
        model.parameters["layers"],
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    np.testing.assert_allclose(our_logits(model), their_logits(theirs), atol=1e-4)


def test_a_smaller_model_leaves_no_shards_of_a_larger_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = LAYOUTS["llama"]
    model = ConsynLMHeadModel.from_parameters(config, random_params(config))
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_files, "MAX_SHARD_BYTES", 40_000)
        ConsynLMHeadModel.from_parameters(
            config, jax.tree.map(jnp.zeros_like, model.parameters)
        ).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    np.testing.assert_array_equal(
        ConsynLMHeadModel.from_pretrained(tmp_path).parameters["norm"], model.parameters["norm"]
    )


def test_bfloat16_is_read_as_float32(tmp_path: Path) -> None:
    config, _ = LAYOUTS["qwen3"]
    ConsynLMHeadModel.from_parameters(config, random_params(config)).save_pretrained(tmp_path)
    exact = load_file(tmp_path / "model.safetensors")
    halves = {name: torch.tensor(value).to(torch.bfloat16) for name, value in exact.items()}
    save_file(halves, tmp_path / "model.safetensors")
    params = ConsynLMHeadModel.from_pretrained(tmp_path).parameters
    assert params["layers"]["gate"].dtype == jnp.float32
    expected = halves["model.layers.1.mlp.gate_proj.weight"].float().numpy().T
    np.testing.assert_array_equal(params["layers"]["gate"][1], expected)


def test_each_device_reads_only_its_part(tmp_path: Path) -> None:
    config, _ = LAYOUTS["llama"]
    params = random_params(config)
    save_parameters(tmp_path, config, params)
    mesh = build_mesh({"data": 1, "fsdp": 2, "context": 2, "tensor": 2})
    loaded = WholeModel().load(tmp_path, config, mesh)
    assert loaded["layers"]["gate"].addressable_shards[0].data.shape == (2, 16, 24)
    jax.tree.map(np.testing.assert_array_equal, loaded["layers"], params["layers"])
    np.testing.assert_array_equal(loaded["output"][:259], params["output"][:259])
    WholeModel().save(tmp_path / "once" / "again", config, loaded)
    again = tmp_path / "once" / "again" / "model.safetensors"
    assert again.read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    with safe_open(again, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_rows_that_pad_the_vocabulary_are_not_read() -> None:
    """A device may have only such rows."""
    data = np.arange(5.0 * 3).reshape(5, 3)
    part = Part(("embedding",), None, (5, 3), (12, 3))

    def read(rows: slice, columns: slice | None) -> np.ndarray:
        assert 0 <= rows.start <= rows.stop <= 5
        assert columns is not None
        return data[rows, columns]

    padded = np.pad(data, [(0, 7), (0, 0)])
    for start in range(0, 12, 4):
        for columns in (slice(0, 3), slice(1, 2)):
            found = part.read(read, (slice(start, start + 4), columns))
            np.testing.assert_array_equal(found, padded[start : start + 4, columns])
