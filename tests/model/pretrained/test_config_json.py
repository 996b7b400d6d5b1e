import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from layouts import LAYOUTS

from consyn_jax.errors import UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.parameters import layout
from consyn_jax.model.pretrained.config_json import (
    FAMILIES,
    family_of,
    from_hf_config,
    read_config,
    to_hf_config,
    with_generation_config,
)
from consyn_jax.model.pretrained.families.llama import ARCHITECTURE, OUTSIDE_BLOCKS, TOKENS
from consyn_jax.model.pretrained.tensors import hf_tensors
from consyn_jax.model_config import FileFormat, ModelConfig

OURS_ONLY = {"files", "generation_config"}  # fields of `ModelConfig` that no config.json holds
SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_field_of_the_model_is_read_in_every_layout(name: str) -> None:
    more = FAMILIES[name].read_more(FAMILIES[name].complete(SIZES))
    mapped = {*ARCHITECTURE, *TOKENS, *more}
    assert mapped == {field.name for field in fields(ModelConfig)} - OURS_ONLY


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_parameter_has_a_tensor(name: str) -> None:
    config, architecture = LAYOUTS[name]
    shapes, family = layout(config).shapes, family_of(config)
    assert family.architecture == architecture
    assert {*shapes} - {"layers"} <= {*OUTSIDE_BLOCKS}
    assert {*shapes["layers"]} <= {*family.block}
    parts = [part.path for tensor in hf_tensors(config) for part in tensor.parts]
    assert set(parts) == {(k,) for k in shapes if k != "layers"} | {
        ("layers", key) for key in shapes["layers"]
    }
    assert len(parts) == len(shapes) - 1 + config.num_layers * len(shapes["layers"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_is_asked_for_is_used_and_no_wrong_one_is(name: str) -> None:
    config, _ = LAYOUTS[name]
    read = from_hf_config(to_hf_config(config), "config.json")
    assert replace(read, files=config.files) == config
    for other in FAMILIES:
        chosen = replace(config, files=FileFormat(model_type=other))
        hf = to_hf_config(chosen)
        own = FAMILIES[name.split()[0]].model_type
        assert hf["model_type"] == (other if FAMILIES[other].holds(config) else own)
        assert replace(from_hf_config(hf, "config.json"), files=config.files) == config


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_that_a_file_lacks_have_the_values_of_transformers(name: str) -> None:
    assert from_hf_config(SIZES | {"model_type": name}, "here").files.model_type == name


def test_a_new_file_has_the_keys_that_transformers_need() -> None:
    hf = to_hf_config(LAYOUTS["llama tied"][0])
    assert (hf["hidden_act"], hf["use_cache"], hf["torch_dtype"]) == ("silu", True, "float32")
    assert "dtype" not in hf


def test_a_model_that_no_layout_holds_is_refused_before_training() -> None:
    config = replace(LAYOUTS["qwen3"][0], rotary_layers=(True, False))
    with pytest.raises(UserError, match="No Hugging Face layout supports"):
        family_of(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model_type": "gpt2"},
            "model_type 'gpt2', which is not supported. Give a model of llama, mistral, qwen3, "
            "qwen2, ministral, smollm3, phi3.",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
            "needs a value for low_freq_factor",
        ),
        ({"rope_scaling": {"type": "linear"}}, "needs a value for factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor '2', which must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "must be a number above 0"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}},
            "needs a value for long_factor",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "short_factor": [1.0],
                    "long_factor": [1.0],
                }
            },
            "rotates 8 pairs",
        ),
        (
            {"rope_scaling": {"type": "proportional", "factor": 2.0}},
            "'proportional' is not supported",
        ),
        (
            {"rope_scaling": {"type": "default", "mrope_section": [1, 2]}},
            "a rotary embedding with mrope_section",
        ),
        ({"rope_parameters": {"full_attention": {}}}, "for each kind of layer"),
        ({"rope_scaling": "linear"}, "which is not an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5, which llama lacks"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "(bitsandbytes)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "the weights are quantised"),
        ({"compression_config": {}, "quantization_config": {"bits": 4}}, "(no method)"),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu'"),
        ({"model_type": "bert", "hidden_act": "gelu"}, "has model_type 'bert'"),
        (
            {"model_type": "qwen3", "layer_types": ["chunked_attention"] * 2},
            "layers of chunked_attention",
        ),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "has 1 layer_types, but"),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2},
            "but no sliding_window",
        ),
        (
            {"model_type": "mistral", "layer_types": ["sliding_attention", "full_attention"]},
            "transformers ignores for mistral",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "num_hidden_layers is 2. Correct one"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rotary scaling linear, which phi3 lacks",
        ),
        ({"hidden_size": "wide"}, "has a value of the wrong type"),
        ({"num_attention_heads": 0, "head_dim": None}, "has a value of the wrong type"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
        ),
        ({"intermediate_size": 64}, "has shape"),
        (
            {"vocab_size": 300},
            "model.embed_tokens.weight has shape (259, 32), and config.json asks for (300, 32)",
        ),
        ({"num_hidden_layers": 3}, "lacks 9 tensors: model.layers.2."),
    ],
)
def test_an_unsupported_configuration_is_refused(
    model: Path, change: dict[str, Any], words: str
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError) as caught:
        ConsynLMHeadModel.from_pretrained(model)
    assert words in str(caught.value)


@pytest.mark.parametrize("missing", ["vocab_size", "hidden_size", "num_attention_heads"])
def test_a_missing_size_is_named(model: Path, missing: str) -> None:
    config = json.loads((model / "config.json").read_text())
    del config[missing]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"config.json has no '{missing}'"):
        ConsynLMHeadModel.from_pretrained(model)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"9" * 5000])
def test_a_file_that_is_not_a_json_object_is_refused(model: Path, content: bytes) -> None:
    (model / "config.json").write_bytes(content)
    faults = "is not JSON|is not a JSON object|is not UTF-8 text|is nested too deeply|has a number"
    with pytest.raises(UserError, match=rf"config.json ({faults})"):
        ConsynLMHeadModel.from_pretrained(model)


def test_a_directory_without_config_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a model: it has no config\.json"):
        ConsynLMHeadModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        None,
        7,
        "[1]",
        "{",
        '{"eos_token_id": [2, "</s>"]}',
        '{"temperature": "warm"}',
        '{"max_new_tokens": [1]}',
        '{"max_new_tokens": -5}',
        '{"max_new_tokens": 1e999}',
        '{"top_k": 1.5}',
        '{"top_p": true}',
        '{"max_new_tokens": 2147483648}',
        '{"eos_token_id": 2147483648}',
        '{"temperature": 2147483648}',
        '{"top_k": -2147483649}',
    ],
)
def test_a_generation_config_of_a_stranger_is_refused(text: Any) -> None:
    config = LAYOUTS["llama tied"][0]
    with pytest.raises(
        UserError,
        match=r"^here (has|is not) .*(Put a .*number.* there|Replace it with a good copy)\.$",
    ):
        with_generation_config(config, text, "here")


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"eos_token_id": [2, 3], "max_new_tokens": 0, "top_k": null, "other": "text"}',
        '{"eos_token_id": 2147483647, "max_new_tokens": 2147483647}',
        '{"top_k": -2147483648, "temperature": -2147483648.0, "top_p": 0.5, "min_p": 1}',
    ],
)
def test_a_generation_config_in_bounds_is_kept(text: str) -> None:
    config = LAYOUTS["llama tied"][0]
    assert with_generation_config(config, text, "here").generation_config == text


def test_a_generation_config_is_read_from_a_directory_only(model: Path) -> None:
    text = '{"top_k": 7, "eos_token_id": [2, 3]}'
    (model / "generation_config.json").write_text(text)
    assert read_config(model).generation_config == text
    alone = read_config(model / "config.json")
    assert (alone.generation_config, alone.num_layers) == (None, 2)
    (model / "generation_config.json").unlink()
    assert read_config(model) == alone
