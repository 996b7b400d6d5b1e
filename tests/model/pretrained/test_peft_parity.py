"""Adapters compared with PEFT: the same steps, and the same logits from the same files."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from layouts import LAYOUTS, random_params
from peft import PeftModel, get_peft_model_state_dict
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.lora import adapter_layout, initial_adapter
from consyn_jax.model.pretrained.peft_files import Base, save_adapter
from consyn_jax.model.pretrained.weights import save_parameters
from consyn_jax.model_config import LoraOptions
from consyn_jax.training import ConsynTrainer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def peft_model(base: Path, adapter: Path, **how: Any) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter, **how)


def test_ten_steps_are_those_of_peft(shared_data: Path, tmp_path: Path) -> None:
    base, B, T, steps = shared_data / "parity" / "stories260K" / "hf", 4, 32, 10
    random = np.random.default_rng(0)
    rows = [
        {name: random.integers(3, 500, (B, T)) for name in ("input_ids", "labels")}
        for _ in range(steps)
    ]
    model = ConsynLMHeadModel.from_pretrained(base)
    trainer = ConsynTrainer(
        model, rows, output_dir=tmp_path / "run", max_steps=steps, batch_size=B, max_tokens=T,
        lora_rank=8, lora_alpha=16, lr=1e-3, scheduler="constant", warmup_steps=0,
        weight_decay=0.01, logging_backend="none", quiet=True, logging_steps=1,
        save_steps=steps, mesh="data=4,tensor=2",
    )  # fmt: skip
    options, mesh = trainer.run.lora, trainer.build().program.mesh
    first = initial_adapter(model.config, options, trainer.run.budget.seed, mesh)
    save_adapter(tmp_path / "first", model.config, first, options, Base(str(base)))
    trainer.train()
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    ours = [line["train/loss"] for line in lines if "train/loss" in line]

    other, theirs = peft_model(base, tmp_path / "first", is_trainable=True), []
    beta2: Any = trainer.run.optimizer.beta2
    trained = [p for p in other.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, beta2), weight_decay=0.01)
    for row in rows:
        logits = other(torch.tensor(row["input_ids"])).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"]).flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        theirs.append(loss.item())
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    mine = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    wanted = {k: v.detach().numpy() for k, v in get_peft_model_state_dict(other).items()}
    assert mine.keys() == wanted.keys()
    for name, values in mine.items():
        np.testing.assert_allclose(values, wanted[name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("kind", ["phi3", "qwen2", "llama biases"])
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj")])
def test_peft_gives_the_logits_of_an_adapter(
    kind: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    config, random = LAYOUTS[kind][0], np.random.default_rng(1)
    options = LoraOptions(lora_rank=3, lora_alpha=5.0, lora_targets=targets)
    save_parameters(tmp_path / "base", config, random_params(config))
    adapter = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * random.normal(size=leaf.shape), jnp.float32),
        adapter_layout(config, options).shapes,
    )
    save_adapter(tmp_path / "adapter", config, adapter, options, Base(str(tmp_path / "base")))
    ids = random.integers(0, 250, (2, 20))
    with torch.no_grad():
        theirs = peft_model(tmp_path / "base", tmp_path / "adapter")(torch.tensor(ids)).logits
    ours = ConsynLMHeadModel.from_pretrained(tmp_path / "adapter")(jnp.int32(ids))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-4)
