import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from consyn_jax.config import ModelConfig, UserError
from consyn_jax.distributed.mesh import build_mesh
from consyn_jax.model import ConsynLMHeadModel, pretrained
from consyn_jax.model.parameters import Params, layout

BASE: dict[str, Any] = {
    "vocab_size": 259,  # padded to 384
    "hidden_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,  # heads x head_dim is not hidden_dim
    "mlp_dim": 48,
    "context": 64,
    "rope_theta": 5000.0,
    "norm_eps": 1e-6,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
LAYOUTS: dict[str, tuple[ModelConfig, str]] = {
    "llama": (ModelConfig(**BASE, qk_norm=False, tie_embeddings=False), "LlamaForCausalLM"),
    "llama tied": (ModelConfig(**BASE, qk_norm=False, tie_embeddings=True), "LlamaForCausalLM"),
    "qwen3": (ModelConfig(**BASE, qk_norm=True, tie_embeddings=False), "Qwen3ForCausalLM"),
    "qwen3 tied": (ModelConfig(**BASE, qk_norm=True, tie_embeddings=True), "Qwen3ForCausalLM"),
    "qwen3 window": (ModelConfig(**BASE, qk_norm=True, tie_embeddings=False, sliding_window=5), "Qwen3ForCausalLM"),
    "mistral": (ModelConfig(**BASE, qk_norm=False, tie_embeddings=False, sliding_window=5), "MistralForCausalLM"),
    "mistral tied": (ModelConfig(**BASE, qk_norm=False, tie_embeddings=True, sliding_window=5), "MistralForCausalLM"),
}
IDS = np.random.default_rng(1).integers(0, 259, (2, 24))  # longer than the window


def random_params(config: ModelConfig) -> Params:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), layout(config).shapes)


def our_logits(model: ConsynLMHeadModel) -> np.ndarray:
    return np.asarray(jax.jit(lambda p: ConsynLMHeadModel.from_parameters(model.config, p)(jnp.asarray(IDS)))(model.parameters))


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


@pytest.mark.users_compiler
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_saved_model_is_the_same_in_transformers(name: str, tmp_path: Path) -> None:
    config, architecture = LAYOUTS[name]
    model = ConsynLMHeadModel.from_parameters(config, random_params(config))
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs).__name__ == architecture
    assert theirs.get_input_embeddings().weight.shape == (259, 32)
    np.testing.assert_allclose(our_logits(model), their_logits(theirs), atol=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_saving_and_loading_changes_nothing(name: str, tmp_path: Path) -> None:
    config, _ = LAYOUTS[name]
    params = random_params(config)
    ConsynLMHeadModel.from_parameters(config, params).save_pretrained(tmp_path)
    again = ConsynLMHeadModel.from_pretrained(tmp_path)
    assert again.config == config
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    for key in ("embedding", "output"):
        if key in params:
            np.testing.assert_array_equal(again.parameters[key][:259], params[key][:259])
            assert not again.parameters[key][259:].any(), "rows that pad the vocabulary"
    jax.tree.map(np.testing.assert_array_equal, again.parameters["layers"], params["layers"])
    np.testing.assert_array_equal(again.parameters["norm"], params["norm"])


@pytest.mark.users_compiler
@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mistral"])
def test_a_model_of_transformers_is_the_same_here(kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    window = {"sliding_window": 5} if kind == "Mistral" else {}
    hf_config = getattr(transformers, f"{kind}Config")(**sizes, head_dim=16, max_position_embeddings=64, initializer_range=0.3, **window)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(hf_config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    np.testing.assert_allclose(our_logits(ConsynLMHeadModel.from_pretrained(tmp_path)), their_logits(theirs), atol=1e-4)


def test_shards_are_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = LAYOUTS["llama"]
    model = ConsynLMHeadModel.from_parameters(config, random_params(config))
    monkeypatch.setattr(pretrained, "MAX_SHARD_BYTES", 40_000)
    model.save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(v.nbytes for file in files for v in load_file(file).values())
    jax.tree.map(np.testing.assert_array_equal, ConsynLMHeadModel.from_pretrained(tmp_path).parameters["layers"], model.parameters["layers"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    np.testing.assert_allclose(our_logits(model), their_logits(theirs), atol=1e-4)


def test_a_smaller_model_leaves_no_shards_of_a_larger_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = LAYOUTS["llama"]
    model = ConsynLMHeadModel.from_parameters(config, random_params(config))
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "MAX_SHARD_BYTES", 40_000)
        ConsynLMHeadModel.from_parameters(config, jax.tree.map(jnp.zeros_like, model.parameters)).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    np.testing.assert_array_equal(ConsynLMHeadModel.from_pretrained(tmp_path).parameters["norm"], model.parameters["norm"])


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


def test_each_device_reads_its_part(tmp_path: Path) -> None:
    config, _ = LAYOUTS["llama"]
    params = random_params(config)
    pretrained.save_parameters(tmp_path, config, params)
    mesh = build_mesh({"data": 1, "fsdp": 2, "context": 2, "tensor": 2})
    loaded = pretrained.load_parameters(tmp_path, config, mesh)
    assert loaded["layers"]["gate"].addressable_shards[0].data.shape == (2, 16, 24)
    jax.tree.map(np.testing.assert_array_equal, loaded["layers"], params["layers"])
    np.testing.assert_array_equal(loaded["output"][:259], params["output"][:259])
    pretrained.save_parameters(tmp_path / "again", config, loaded)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, _ = LAYOUTS["llama"]
    directory = tmp_path_factory.mktemp("saved")
    pretrained.save_parameters(directory, config, random_params(config))
    return directory


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Iterator[Path]:
    """A model's directory to spoil."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2', which is not supported. Supported: llama, mistral, qwen3."),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "scales its rotary embedding"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "scales its rotary embedding"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scales its rotary embedding"),
        ({"attention_bias": True}, "has attention_bias True"),
        ({"mlp_bias": True}, "has mlp_bias True"),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu'"),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, "on some layers only"),
        ({"hidden_size": "wide"}, "a value that cannot be"),
        ({"num_attention_heads": 0, "head_dim": None}, "a value that cannot be"),
        ({"num_key_value_heads": 3}, "--num_heads 4 is not a multiple of --num_kv_heads 3"),
        ({"intermediate_size": 64}, "has shape"),
        ({"vocab_size": 300}, "model.embed_tokens.weight has shape (259, 32), and config.json asks for (300, 32)"),
        ({"num_hidden_layers": 3}, "does not give model.layers.2."),
    ],
)
def test_a_configuration_that_is_not_covered_is_refused(model: Path, change: dict[str, Any], words: str) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError) as caught:
        ConsynLMHeadModel.from_pretrained(model)
    assert words in str(caught.value)


@pytest.mark.parametrize("missing", ["vocab_size", "hidden_size", "num_attention_heads"])
def test_a_configuration_without_a_size_names_it(model: Path, missing: str) -> None:
    config = json.loads((model / "config.json").read_text())
    del config[missing]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"config.json has no '{missing}'"):
        ConsynLMHeadModel.from_pretrained(model)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_configuration_that_is_no_json_object_is_refused(model: Path, content: bytes) -> None:
    (model / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config.json (is not JSON|holds no JSON object)"):
        ConsynLMHeadModel.from_pretrained(model)


def test_pickles_are_never_opened(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors\.$"):
        ConsynLMHeadModel.from_pretrained(model)
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(UserError, match=r"only pytorch_model\.bin, a pickle, which is never opened"):
        ConsynLMHeadModel.from_pretrained(model)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_damaged_weights_are_refused(model: Path, keep: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged"):
        ConsynLMHeadModel.from_pretrained(model)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {"norm": "../elsewhere.safetensors"}}, {"weight_map": {"norm": 3}}, {"weight_map": {"model.norm.weight": "gone.safetensors"}}]
)
def test_an_index_leads_nowhere_else(model: Path, index: dict[str, Any]) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError):
        ConsynLMHeadModel.from_pretrained(model)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a model: it has no config\.json"):
        ConsynLMHeadModel.from_pretrained(tmp_path)
