"""Runs that train an adapter: what is trained, saved, resumed and exported."""

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from consyn_jax.errors import UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.lora import merged
from consyn_jax.model.pretrained.peft_files import load_adapter
from consyn_jax.model_config import LoraOptions, ModelConfig
from consyn_jax.training import ConsynTrainer

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    mlp_dim=128,
    context=32,
    qk_norm=False,
    eos_token_id=2,
)
ROWS = [[i % 60 for i in range(n, n + 33)] for n in range(16)]
OPTIONS = LoraOptions(lora_rank=4, lora_alpha=12.0)


def base() -> ConsynLMHeadModel:
    return ConsynLMHeadModel.from_config(CONFIG, seed=3)


def trainer_of(
    path: Path, model: ConsynLMHeadModel | None = None, **settings: Any
) -> ConsynTrainer:
    settings = {
        "max_steps": 4,
        "save_steps": 2,
        "batch_size": 8,
        "lr": 1e-2,
        "lora_rank": 4,
        "lora_alpha": 12.0,
        "logging_backend": "none",
        "quiet": True,
        "logging_steps": 1,
        **settings,
    }
    return ConsynTrainer(model or base(), ROWS, output_dir=path, **settings)


def run(path: Path, model: ConsynLMHeadModel | None = None, **settings: Any) -> ConsynTrainer:
    trainer = trainer_of(path, model, **settings)
    trainer.train()
    return trainer


def adapter_in(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "adapter_model.safetensors")


def close(found: Any, wanted: Any) -> None:
    """But for the order in which devices add up."""
    jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, atol=1e-7), found, wanted)


def losses(path: Path) -> list[float]:
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "run"
    run(path, mesh="fsdp=8")
    return path


def test_a_rank_that_no_update_can_have_is_warned_of(tmp_path: Path) -> None:
    """The keys of one head are narrower than the model."""
    model = ConsynLMHeadModel.from_config(dataclasses.replace(CONFIG, num_kv_heads=1), seed=3)

    def warned(rank: int) -> list[str]:
        return trainer_of(tmp_path / str(rank), model, lora_rank=rank).run_inputs().warnings

    assert warned(32) == []
    assert warned(33) == [
        "--lora_rank 33 is above the full rank of k_proj, v_proj, whose shorter side is "
        "32. Lower --lora_rank; common ranks are 8 to 64."
    ]
    (all_matrices,) = warned(4096)
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in all_matrices


@pytest.mark.slow
def test_a_run_keeps_the_adapter_and_nothing_else(whole: Path) -> None:
    kept = "".join(file.read_text() for file in (whole / "checkpoints" / "4").rglob("_METADATA"))
    assert "'layers', 'q', 'a'" in kept
    assert "embedding" not in kept
    assert "norm" not in kept.replace("grad_norm", "")
    names = {file.name for file in (whole / "final").iterdir()}
    assert names == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "consyn_manifest.json"),
        "provenance.json",
    }


@pytest.mark.slow
def test_the_trained_model_is_the_base_and_the_adapter(tmp_path: Path) -> None:
    model = base()
    before = jax.tree.map(np.asarray, model.parameters)
    run(tmp_path / "run", model)
    adapter = load_adapter(tmp_path / "run" / "final", CONFIG, OPTIONS)
    assert all(np.asarray(own["b"]).any() for own in adapter["layers"].values())
    close(model.parameters, merged(before, adapter, OPTIONS))
    for name in ("embedding", "norm"):
        np.testing.assert_array_equal(model.parameters[name], before[name])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "nf4"])
def test_the_weights_under_the_adapter_keep_every_bit(dtype: str, tmp_path: Path) -> None:
    trainer, made = trainer_of(tmp_path / "run", lora_base_dtype=dtype, mesh="fsdp=8"), []
    inputs = trainer.run_inputs()
    before = jax.tree.map(np.asarray, inputs.make_base())

    def make_base() -> dict[str, Any]:
        made.append(inputs.make_base())
        return made[-1]

    trainer.run_inputs = lambda: replace(inputs, make_base=make_base)
    trainer.train()
    (after,) = made
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.slow
def test_a_resumed_run_is_the_same_to_the_last_bit(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for part in ("final", "checkpoints/4"):
        shutil.rmtree(tmp_path / "run" / part)
    run(tmp_path / "run", mesh="fsdp=8")
    for name, values in adapter_in(whole / "final").items():
        np.testing.assert_array_equal(adapter_in(tmp_path / "run" / "final")[name], values)


def test_a_resumed_run_needs_the_same_base(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    other = ConsynLMHeadModel.from_config(CONFIG, seed=4)
    with pytest.raises(UserError, match="the initial weights changed"):
        run(tmp_path / "run", other)
    with pytest.raises(UserError, match=r"--lora_alpha was 12.0 and is 3.0"):
        run(tmp_path / "run", lora_alpha=3.0)


@pytest.mark.slow
def test_a_trainer_goes_on_from_the_base_and_not_from_what_it_trained(
    whole: Path, tmp_path: Path
) -> None:
    """Its second half is trained twice, the second time after its model became the trained one."""
    path, before = tmp_path / "run", jax.tree.map(np.asarray, base().parameters)
    trainer = run(path, mesh="fsdp=8")
    for part in ("final", "checkpoints/4"):
        shutil.rmtree(path / part)
    trainer.train()
    for name, values in adapter_in(whole / "final").items():
        np.testing.assert_array_equal(adapter_in(path / "final")[name], values)
    adapter = load_adapter(path / "final", CONFIG, OPTIONS)
    close(trainer.model.parameters, merged(before, adapter, OPTIONS))


@pytest.mark.slow
def test_a_run_that_was_exported_goes_on_like_one_run(tmp_path: Path) -> None:
    """Two steps and an export, then two more over a base loaded anew."""
    still = {"mesh": "fsdp=8", "scheduler": "constant"}
    run(tmp_path / "one", **still)
    run(tmp_path / "two", max_steps=2, **still)
    first = adapter_in(tmp_path / "two" / "final")
    run(tmp_path / "two", overwrite_schedule=True, **still)
    found, wanted = (adapter_in(tmp_path / name / "final") for name in ("two", "one"))
    assert found.keys() == wanted.keys() == first.keys()
    for name, values in wanted.items():
        assert not np.array_equal(first[name], values)
        np.testing.assert_array_equal(found[name], values)
    assert losses(tmp_path / "two") == losses(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=2,tensor=2", "fsdp=2,tensor=4"])
@pytest.mark.parametrize("dtype", ["float32", "nf4"])
def test_every_mesh_trains_the_same_adapter(
    mesh: str, dtype: str, whole: Path, tmp_path: Path
) -> None:
    if dtype == "nf4":
        run(tmp_path / "one", lora_base_dtype=dtype, mesh="fsdp=8")
    wanted = tmp_path / "one" if dtype == "nf4" else whole
    run(tmp_path / "run", mesh=mesh, lora_base_dtype=dtype)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(wanted), rtol=1e-5)
    for name, values in adapter_in(wanted / "final").items():
        # AdamW takes a gradient of almost nothing for a large one, so single elements may differ.
        apart = np.linalg.norm(adapter_in(tmp_path / "run" / "final")[name] - values)
        assert apart < 2e-3 * np.linalg.norm(values)


@pytest.mark.slow
def test_micro_batches_add_up(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, batch_size=4, gradient_accumulation_steps=2, mesh="data=4,tensor=2")
    np.testing.assert_allclose(losses(tmp_path), losses(whole), rtol=1e-5)


@pytest.mark.slow
def test_flags_reach_the_adapter(whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "few", lora_rank=2, lora_targets=("q_proj", "up_proj"), lora_alpha=None)
    made = adapter_in(tmp_path / "few" / "final")
    assert {name.split(".")[-3] for name in made} == {"q_proj", "up_proj"}
    assert {min(values.shape) for values in made.values()} == {2}
    config = json.loads((tmp_path / "few" / "final" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    run(tmp_path / "drop", lora_dropout=0.5, mesh="fsdp=8")
    assert losses(tmp_path / "drop")[0] == losses(whole)[0]  # the adapter is zero yet
    assert not np.allclose(losses(tmp_path / "drop")[1:], losses(whole)[1:], rtol=1e-6)
    run(tmp_path / "int8", lora_base_dtype="int8", mesh="fsdp=8")
    assert losses(tmp_path / "int8")[0] != losses(whole)[0]
    np.testing.assert_allclose(losses(tmp_path / "int8"), losses(whole), rtol=1e-3)
