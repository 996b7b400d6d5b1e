"""GGUF files by what the gguf package and, where it is installed, llama.cpp itself read in them."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "model" / "pretrained"))
from layouts import BASE, LAYOUTS, random_params

from consyn_jax.errors import UserError
from consyn_jax.inference.conversion.gguf_architecture import architecture_of
from consyn_jax.inference.conversion.gguf_file import read_back, write_gguf
from consyn_jax.inference.conversion.gguf_tokenizer import vocabulary
from consyn_jax.inference.model_source import ModelSource
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model_config import FileFormat, ModelConfig, RopeScaling
from consyn_jax.tokenization import GPT2_PATTERN, BPETokenizer

gguf = pytest.importorskip("gguf")

SQUARE = {**BASE, "hidden_dim": 64}  # heads as wide as the model
PLAIN: dict[str, Any] = {**BASE, "qk_norm": False}
EIGHT, SIX = tuple(1 + i / 8 for i in range(8)), tuple(1 + i / 8 for i in range(6))
WRITTEN = {
    "llama": LAYOUTS["llama"][0],
    "llama tied": LAYOUTS["llama tied"][0],
    "llama biases, llama3": LAYOUTS["llama biases"][0],
    "llama linear": ModelConfig(**PLAIN, rope_scaling=RopeScaling("linear", 4.0)),
    "llama dynamic": ModelConfig(**PLAIN, rope_scaling=RopeScaling("dynamic", 4.0)),
    "llama longrope": ModelConfig(
        **PLAIN,
        rope_scaling=RopeScaling("longrope", None, 16, short_factor=EIGHT, long_factor=EIGHT),
    ),
    "qwen2 yarn": ModelConfig(
        **{**SQUARE, "qk_norm": False}, qkv_bias=True, rope_scaling=RopeScaling("yarn", 4.0, 16)
    ),
    "qwen3": LAYOUTS["qwen3"][0],
    "qwen3 yarn": ModelConfig(
        **BASE, rope_scaling=RopeScaling("yarn", 4.0, 16, attention_factor=1.3, beta_fast=20.0)
    ),
    "smollm3": ModelConfig(
        **{**PLAIN, "num_layers": 4},
        rotary_layers=(True, True, True, False),
        files=FileFormat(model_type="smollm3"),
    ),
    "phi3 longrope": ModelConfig(
        **{**SQUARE, "qk_norm": False},
        rotary_fraction=0.75,
        files=FileFormat(model_type="phi3"),
        rope_scaling=RopeScaling("longrope", None, 16, short_factor=SIX, long_factor=SIX),
    ),
}
REFUSED = {
    "qwen3 window": "no sliding window for this layout, but the model's window is 5 tokens. Give --",
    "mistral": "no sliding window for this layout",
    "ministral": "no sliding window for this layout",
    "smollm3": "no sliding window for this layout",
    "qwen2": "heads must together be as wide as the model, but 4 heads x 16 is not 32",
    "phi3": "heads must together be as wide as the model",
}


def source_of(config: ModelConfig, tokenizer: BPETokenizer | None = None) -> ModelSource:
    params = random_params(config)
    return ModelSource("x", "x", Path("x"), config, tokenizer, lambda mesh, dtype: params)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_the_weights_come_back(name: str, tmp_path: Path) -> None:
    config, file = WRITTEN[name], tmp_path / "x.gguf"
    source = source_of(config, BPETokenizer.bytes())
    params = source.parameters()
    write_gguf(file, source, params, "float32")
    back = read_back(file, config)
    jax.tree.map(np.testing.assert_array_equal, back["layers"], params["layers"])
    np.testing.assert_array_equal(back["embedding"][:259], params["embedding"][:259])


@pytest.mark.parametrize("name", WRITTEN)
def test_llama_cpp_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    if os.environ.get("CONSYN_TEST_LLAMA_CPP") == "required":
        import llama_cpp
    else:
        llama_cpp = pytest.importorskip("llama_cpp")
    config, file = WRITTEN[name], tmp_path / "x.gguf"
    source = source_of(config, BPETokenizer.bytes())
    write_gguf(file, source, source.parameters(), "float32")
    ids = np.random.default_rng(1).integers(0, 256, 40)
    ours = ConsynLMHeadModel.from_parameters(config, source.parameters())(jnp.asarray(ids[None]))
    llama = llama_cpp.Llama(
        str(file), n_ctx=64, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0
    )
    llama.eval(ids.tolist())
    np.testing.assert_allclose(np.array(llama.scores[:40]), ours[0], atol=2e-3)
    llama.close()


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_lacks_is_refused_by_name(name: str) -> None:
    config = LAYOUTS[name][0]
    with pytest.raises(UserError, match=REFUSED[name]):
        architecture_of(config, config.context)
    if config.sliding_window is not None and name != "smollm3":
        architecture_of(config, 5)  # up to the window, both are the same


def test_the_keys(tmp_path: Path) -> None:
    tokenizer = BPETokenizer.bytes().with_chat_template("{{ messages }}")
    config = replace(WRITTEN["qwen3 yarn"], eos_token_id=(258, 10, 11))
    write_gguf(tmp_path / "x.gguf", source_of(config, tokenizer), random_params(config), "q8_0")
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    found = {name: field.contents() for name, field in fields.items()}
    expected = {
        "general.architecture": "qwen3",
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 16,
        "qwen3.rope.scaling.yarn_beta_fast": 20.0,
        "qwen3.attention.key_length": 16,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.ggml.eot_token_id": 10,
        "tokenizer.ggml.eom_token_id": 11,
        "tokenizer.ggml.padding_token_id": 256,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert {name: found.get(name) for name in expected} == expected
    assert len(found["tokenizer.ggml.tokens"]) == config.vocab_size
    assert found["qwen3.rope.scaling.attn_factor"] == pytest.approx(1.3 / (0.1 * np.log(4) + 1))


def test_vocabularies(shared_data: Path) -> None:
    gpt2 = BPETokenizer.from_file(shared_data / "tokenizers" / "gpt2")
    found = vocabulary(gpt2, gpt2.vocab_size + 3)
    assert (found.model, found.pre) == ("gpt2", "gpt-2")
    assert found.tokens[-3:] == ["[PAD50257]", "[PAD50258]", "[PAD50259]"]
    content = json.loads(gpt2.to_json())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    with pytest.raises(UserError, match="has no rule that splits text by 'Whitespace'"):
        vocabulary(BPETokenizer(json.dumps(content)), gpt2.vocab_size)
    own = BPETokenizer.train_from_iterator(["some words some"], 262, GPT2_PATTERN)
    content = json.loads(own.to_json())
    content["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(UserError, match="changes text before"):
        vocabulary(BPETokenizer(json.dumps(content)), 262)
