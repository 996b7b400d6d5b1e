import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import LAYOUTS, random_params
from safetensors import safe_open
from safetensors.numpy import save_file

from consyn_jax.distributed.mesh import build_mesh
from consyn_jax.errors import UserError
from consyn_jax.model.lora import adapter_layout, merged
from consyn_jax.model.parameters import Params
from consyn_jax.model.pretrained.inspection import read_checkpoint
from consyn_jax.model.pretrained.peft_files import (
    Base,
    load_adapter,
    read_adapter,
    save_adapter,
)
from consyn_jax.model.pretrained.safetensors_files import weights_hash
from consyn_jax.model.pretrained.weights import load_parameters, save_parameters
from consyn_jax.model_config import LoraOptions, ModelConfig
from consyn_jax.training.run.model_files import AdapterOnly

OPTIONS = LoraOptions(lora_rank=3, lora_alpha=5.0)


def random_adapter(config: ModelConfig, options: LoraOptions = OPTIONS) -> Params:
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32),
        adapter_layout(config, options).shapes,
    )


def written(place: Path, kind: str, options: LoraOptions = OPTIONS) -> tuple[Any, ...]:
    """A base and an adapter over it in files; the configuration and parameters of both."""
    config = LAYOUTS[kind][0]
    base, adapter = random_params(config), random_adapter(config, options)
    save_parameters(place / "base", config, base)
    known = Base(str(place / "base"), weights_hash(place / "base"))
    save_adapter(place / "adapter", config, adapter, options, known)
    return config, base, adapter


def close(found: Params, wanted: Params) -> None:
    jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, atol=1e-6), found, wanted)


@pytest.mark.parametrize("kind", ["llama tied", "phi3", "qwen3"])
def test_an_adapter_is_read_as_it_was_written(kind: str, tmp_path: Path) -> None:
    config, _, adapter = written(tmp_path, kind)
    found = load_adapter(tmp_path / "adapter", config, OPTIONS)
    jax.tree.map(np.testing.assert_array_equal, found, adapter)


def test_an_adapter_is_read_onto_the_devices_that_train_it(tmp_path: Path) -> None:
    """As a run with --load_best_model_at_end reads its best/."""
    config, _, adapter = written(tmp_path, "llama tied")
    mesh = build_mesh({"data": 1, "fsdp": 4, "context": 1, "tensor": 2})
    files = AdapterOnly(OPTIONS, Base(str(tmp_path / "base")))
    found = files.load(tmp_path / "adapter", config, mesh)
    jax.tree.map(np.testing.assert_array_equal, found, adapter)
    for leaf, place in zip(
        jax.tree.leaves(found),
        jax.tree.leaves(adapter_layout(config, OPTIONS).shardings(mesh)),
        strict=True,
    ):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_writes_its_adapter_in_a_type_of_its_own(dtype: str, tmp_path: Path) -> None:
    """Whatever the type of the base is."""
    config = LAYOUTS["llama tied"][0].saved_as("float16")
    files = AdapterOnly(OPTIONS, Base("owner/name@abc", "a hash"), dtype)
    place = tmp_path / "new" / "best"
    for _ in range(2):
        files.save(place, config, random_adapter(config))
    with safe_open(place / "adapter_model.safetensors", framework="numpy") as file:
        types = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert types == {{"float32": "F32", "bfloat16": "BF16"}[dtype]}
    read = read_adapter(place)
    assert read.base == Base("owner/name@abc", "a hash")
    written = json.loads((place / "adapter_config.json").read_text())
    expected = {
        "base_model_name_or_path": "owner/name",
        "revision": "abc",
        "r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.0,
        "rank_pattern": {},
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }
    assert written | expected == written
    assert "owner/name" in (place / "README.md").read_text().splitlines()[1]


@pytest.mark.parametrize(("base", "revision"), [("/a/model@home", None), (None, None)])
def test_a_directory_has_no_revision(
    base: str | None, revision: str | None, tmp_path: Path
) -> None:
    config = LAYOUTS["llama tied"][0]
    save_adapter(tmp_path, config, random_adapter(config), OPTIONS, Base(base))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == (base, revision)
    assert read_adapter(tmp_path).base == Base(base)


def test_an_adapter_may_have_rank_1_or_any_alpha(tmp_path: Path) -> None:
    options = LoraOptions(lora_rank=1, lora_alpha=0.5)
    written(tmp_path, "llama tied", options)
    found = read_adapter(tmp_path / "adapter")
    assert {change.scale for change in found.changes.values()} == {0.5}


def test_the_rank_of_rslora_counts_by_its_root(tmp_path: Path) -> None:
    written(tmp_path, "llama tied")
    changed(tmp_path, use_rslora=True, alpha_pattern={"q_proj": 7.0, "x*a*b*": 1.0})
    scales = {n: c.scale for n, c in read_adapter(tmp_path / "adapter").changes.items()}
    for name, scale in scales.items():
        alpha = 7.0 if name.endswith("q_proj.weight") else 5.0
        assert scale == pytest.approx(alpha / 3**0.5)
    changed(tmp_path, alpha_pattern={"x*a*b*c*": 1.0})
    with pytest.raises(UserError, match="repeats too much"):
        read_adapter(tmp_path / "adapter")


def test_settings_that_change_the_computation_are_supported_in_their_plain_form(
    tmp_path: Path,
) -> None:
    written(tmp_path, "llama tied")
    original = (tmp_path / "adapter" / "adapter_config.json").read_text()
    switches = ("use_dora", "use_qalora", "fan_in_fan_out", "lora_bias", "use_bdlora")
    plain = dict.fromkeys(switches, (False, None)) | {"init_lora_weights": (True, False, None)}
    for key, allowed in plain.items():
        for value in allowed:
            changed(tmp_path, **{key: value})
            assert read_adapter(tmp_path / "adapter").changes
        changed(tmp_path, **{key: "loftq" if key == "init_lora_weights" else True})
        with pytest.raises(UserError, match=f"is an adapter with {key} "):
            read_adapter(tmp_path / "adapter")
        (tmp_path / "adapter" / "adapter_config.json").write_text(original)


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    config = LAYOUTS["llama tied"][0]
    config = replace(config, files=replace(config.files, dtype="float16"))
    adapter = jax.tree.map(lambda leaf: 1e5 * leaf, random_adapter(config))
    with pytest.raises(UserError, match=r"lora_[AB]\.weight has values that float16 cannot"):
        save_adapter(tmp_path, config, adapter, OPTIONS, Base("base", None))


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "up_proj")])
def test_a_directory_of_an_adapter_is_the_sum(targets: tuple[str, ...], tmp_path: Path) -> None:
    """Also where a layout fuses matrices, of which only some have an adapter, and moves heads."""
    options = replace(OPTIONS, lora_targets=targets)
    config, base, adapter = written(tmp_path, "phi3", options)
    read = read_checkpoint(tmp_path / "adapter")
    assert read.files.model_type == "phi3"
    found = load_parameters(tmp_path / "adapter", read)
    wanted = merged(base, adapter, options)
    rows = config.vocab_size
    for tree in (found, wanted):
        for name in ("embedding", "output"):
            if name in tree:
                tree[name] = tree[name][:rows]
    close(found, wanted)


def changed(place: Path, **values: Any) -> None:
    file = place / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True}, "use_dora True, which is not supported"),
        ({"bias": "all"}, "bias 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"base_model_name_or_path": None}, "its base model has no name"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "/nowhere/at/all does not exist"),
        ({"lora_alpha": "much"}, "gives no lora_alpha"),
        ({"alpha_pattern": {"(": 1}}, "gives no lora_alpha"),
        ({"alpha_pattern": {"(.*)*x": 1}}, "repeats too much"),
        ({"lora_alpha": float("inf")}, "gives no lora_alpha"),
        ({"base_model_name_or_path": True}, "that is not text"),
        ({"revision": ["main"]}, "that is not text"),
    ],
)
def test_what_is_no_plain_lora_is_refused(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    written(tmp_path, "llama tied")
    changed(tmp_path, **values)
    with pytest.raises(UserError, match=message.replace("(", "\\(")):
        read_checkpoint(tmp_path / "adapter")


def test_another_base_is_refused(tmp_path: Path) -> None:
    config, base, _ = written(tmp_path, "llama tied")
    save_parameters(tmp_path / "base", config, {**base, "norm": base["norm"] + 1})
    with pytest.raises(UserError, match="an adapter that was trained on other weights"):
        read_checkpoint(tmp_path / "adapter")
    changed(tmp_path, base_model_name_or_path=str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="is an adapter, too"):
        read_checkpoint(tmp_path / "adapter")


def test_a_model_of_other_sizes_is_refused(tmp_path: Path) -> None:
    config, *_ = written(tmp_path, "llama tied")
    wider = replace(config, mlp_dim=64)
    save_parameters(tmp_path / "wider", wider, random_params(wider))
    save_adapter(
        tmp_path / "adapter", config, random_adapter(config), OPTIONS, Base(str(tmp_path / "wider"))
    )
    with pytest.raises(UserError, match=r"in the base model .* this tensor has shape"):
        read_checkpoint(tmp_path / "adapter")


@pytest.mark.parametrize("shape", [(), (0, 32), (32,)])
def test_an_adapter_without_a_rank_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    written(tmp_path, "llama tied")
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    ends = (("lora_A", shape), ("lora_B", shape[::-1]))
    save_file(
        {f"{module}.{end}.weight": np.ones(size, np.float32) for end, size in ends},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    with pytest.raises(UserError, match="lacks lora_A or lora_B of"):
        read_checkpoint(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_out_of_an_adapter_are_not_followed(name: str, tmp_path: Path) -> None:
    """Found by the search for trees of strangers."""
    written(tmp_path, "qwen3")
    (tmp_path / "adapter" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "adapter" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name} is a link to .*elsewhere, outside its direc"):
        read_checkpoint(tmp_path / "adapter")


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    written(tmp_path, "llama tied")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path / "adapter")
