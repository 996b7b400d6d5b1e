"""Checkpoints that do not fit their config.json are refused by their headers alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from layouts import LAYOUTS, random_params
from safetensors.numpy import load_file, save_file

from consyn_jax.errors import UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.pretrained import inspection
from consyn_jax.model.pretrained.inspection import read_checkpoint
from consyn_jax.model.pretrained.safetensors_files import Header
from consyn_jax.model.pretrained.weights import find_model, load_parameters, save_parameters

Tensors = dict[str, np.ndarray]
Q, EMBEDDING, HEAD = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
)


def damage(model: Path, change: Callable[[Tensors], Any], **config: Any) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    hf = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(hf | config))


def layer_two(tensors: Tensors) -> None:
    tensors |= {
        name.replace("layers.1.", "layers.2."): value
        for name, value in tensors.items()
        if "layers.1." in name
    }


def bias(tensors: Tensors) -> None:
    tensors[Q.replace("weight", "bias")] = np.zeros(64, np.float32)


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (lambda t: t.pop(Q), {}, f"lacks 1 tensor: {Q}."),
        (
            lambda t: [t.pop(name) for name in list(t) if "layers.1." in name],
            {},
            "lacks 9 tensors: ",
        ),
        (lambda t: t.pop(HEAD), {}, "Set tie_word_embeddings to true in config.json"),
        (lambda t: t.update({Q: t[Q][:-1]}), {}, "has shape (63, 32), and config.json asks for"),
        (layer_two, {}, "which has 2 layers and no biases"),
        (bias, {}, f"has 1 tensor that its config.json does not describe: {Q[:-6]}bias."),
        (lambda t: None, {"tie_word_embeddings": True}, "that differs from the input embedding"),
        (
            lambda t: t.update({HEAD: t[HEAD][:-1]}),
            {"tie_word_embeddings": True},
            "that differs from the input embedding",
        ),
        (
            lambda t: t.update({Q: t[Q].astype(np.int8)}),
            {},
            f"has 1 tensor of a type that cannot be trained, such as {Q} of I8.",
        ),
        (
            lambda t: t.update({Q: t[Q].astype(ml_dtypes.float8_e4m3fn)}),
            {},
            f"{Q} of F8_E4M3. Use a model in float32, bfloat16 or float16.",
        ),
        (lambda t: t.update({Q: t[Q].astype(np.float64)}), {}, f"{Q} of F64."),
        (lambda t: t.clear(), {}, "lacks 21 tensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_unread(
    model: Path,
    change: Callable[[Tensors], Any],
    config: dict[str, Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damage(model, change, **config)
    if "differs from the input" not in words:  # the values decide that, if shape and type agree
        monkeypatch.setattr(inspection, "open_weights", None)
    with pytest.raises(UserError) as caught:
        read_checkpoint(model)
    assert words in str(caught.value)
    assert str(caught.value).count(". ") <= 2


def test_a_pointer_of_git_lfs_is_named(model: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n"
    (model / "model.safetensors").write_text(pointer)
    with pytest.raises(UserError, match=r"model\.safetensors is a Git LFS pointer.* git lfs pull"):
        read_checkpoint(model)


def test_shards_that_are_not_there_are_named(model: Path) -> None:
    shards = {Q: "model-2.safetensors", HEAD: "model-1.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UserError, match=r"lacks model-1\.safetensors, model-2\.safetensors, which"):
        read_checkpoint(model)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("modle", r"no such directory; did you mean .*model\? Give a directory"),
        ("model/model.safetensors", r"is a file, .* Give .*model\.$"),
        ("model.gguf", "is a GGUF file, but only safetensors can be read"),
    ],
)
def test_what_is_no_directory_is_said(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for file in ("model/model.safetensors", "model.gguf"):
        (tmp_path / file).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=words):
        find_model(str(tmp_path / name))


def test_a_copy_of_a_tied_embedding_is_accepted_and_written_again(model: Path) -> None:
    damage(model, lambda t: t.update({HEAD: t[EMBEDDING].copy()}), tie_word_embeddings=True)
    ConsynLMHeadModel.from_pretrained(model).save_pretrained(model / "again")
    assert_same_tensors(model, model / "again")


def test_tables_that_can_be_computed_are_left_out(model: Path) -> None:
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    damage(model, lambda t: t.update({table: np.ones(8, np.float32)}))
    assert read_checkpoint(model).num_layers == 2


def assert_same_tensors(one: Path, other: Path) -> None:
    before, after = (load_file(place / "model.safetensors") for place in (one, other))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert (value.dtype, value.shape) == (after[name].dtype, after[name].shape)
        assert value.tobytes() == after[name].tobytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["llama biases", "phi3", "qwen3 tied"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed"])
def test_a_round_trip_keeps_every_byte(layout: str, dtype: str, tmp_path: Path) -> None:
    config, _ = LAYOUTS[layout]
    config = config.saved_as("bfloat16" if dtype == "mixed" else dtype)
    if dtype == "mixed":
        other = ("model.norm.weight=float32", "model.embed_tokens.weight=float16")
        config = replace(config, files=replace(config.files, other_dtypes=other))
    save_parameters(tmp_path / "one", config, random_params(config))
    read = read_checkpoint(tmp_path / "one")
    assert set(read.files.other_dtypes) == set(config.files.other_dtypes)
    save_parameters(tmp_path / "two", read, load_parameters(tmp_path / "one", read))
    assert_same_tensors(tmp_path / "one", tmp_path / "two")
    one, two = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("one", "two"))
    assert one == two
    assert one["torch_dtype"] == config.files.dtype


def test_another_type_can_be_asked_for(model: Path) -> None:
    ConsynLMHeadModel.from_pretrained(model).save_pretrained(model / "half", dtype="bfloat16")
    again = read_checkpoint(model / "half")
    assert again.files.dtype == "bfloat16"
    exact, half = (load_file(place / "model.safetensors") for place in (model, model / "half"))
    np.testing.assert_array_equal(half[Q], exact[Q].astype(ml_dtypes.bfloat16))
    with pytest.raises(UserError, match="'int8' is not a number type for weights"):
        ConsynLMHeadModel.from_pretrained(model).save_pretrained(model / "no", dtype="int8")


def test_values_beyond_float16_are_refused(model: Path) -> None:
    damage(model, lambda t: t.update({Q: t[Q] * 1e6}))
    with pytest.raises(UserError, match="that float16 cannot hold"):
        ConsynLMHeadModel.from_pretrained(model).save_pretrained(model / "half", dtype="float16")


def test_config_json_stays_as_it_came_but_for_what_changes(model: Path) -> None:
    hf = json.loads((model / "config.json").read_text())
    del hf["rope_theta"], hf["rope_scaling"], hf["torch_dtype"]
    hf |= {
        "initializer_range": 0.01,
        "attention_dropout": 0.0,
        "eos_token_id": [257, 258],
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        "dtype": "float32",
    }
    (model / "config.json").write_text(json.dumps(hf | {"auto_map": {"AutoConfig": "code.Config"}}))
    trained = ConsynLMHeadModel.from_pretrained(model)
    trained.save_pretrained(model / "again")
    assert json.loads((model / "again/config.json").read_text()) == hf
    changed = replace(trained.config, context=128, pad_token_id=5)
    save_parameters(model / "changed", changed, trained.parameters)
    found = json.loads((model / "changed/config.json").read_text())
    assert (found["max_position_embeddings"], found["pad_token_id"]) == (128, 5)
    assert (found["initializer_range"], found["eos_token_id"]) == (0.01, [257, 258])
    assert read_checkpoint(model / "changed").rope_scaling == trained.config.rope_scaling


def test_the_type_of_most_elements_is_the_type_of_a_model() -> None:
    """And not that of most tensors."""
    found = {
        "a": Header("BF16", (4, 4)),
        "b": Header("F32", (3,)),
        "c": Header("BF16", (2, 2)),
        "d": Header("F32", (16,)),
        "e": Header("F32", (2,)),
        "f": Header("F16", ()),
    }
    assert inspection._dtypes(found) == (
        "float32",
        ("a=bfloat16", "c=bfloat16", "f=float16"),
    )


def test_tensors_of_another_type_are_listed(model: Path) -> None:
    damage(model, lambda t: t.update({Q: t[Q].astype(ml_dtypes.bfloat16)}))
    files = read_checkpoint(model).files
    assert (files.dtype, files.other_dtypes) == ("float32", (f"{Q}=bfloat16",))
