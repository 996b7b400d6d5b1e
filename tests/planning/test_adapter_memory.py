"""A step over a base in 4 bits fits small cards, as compiled and by arithmetic."""

from typing import Any

import pytest

from consyn_jax.config import architecture
from consyn_jax.model_config import ModelConfig
from consyn_jax.planning.aot import compile_train_step
from consyn_jax.planning.plan import estimate
from consyn_jax.planning.plan_page import page
from consyn_jax.planning.topology import parse_topology
from consyn_jax.resolve import resolve

SHAPE: dict[str, Any] = {
    **{"model": "stanza", "max_tokens": 2048, "batch_size": 1, "gradient_accumulation_steps": 8},
    **{"gradient_checkpointing": "full", "mixed_precision": "bf16"},
    **{"lora_rank": 16, "lora_base_dtype": "nf4"},
}
RUN = resolve(SHAPE)[0]
LLAMA_8B = ModelConfig(
    vocab_size=128_256,
    hidden_dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14_336,
    context=8192,
    rope_theta=5e5,
    qk_norm=False,
    tie_embeddings=False,
)
MODELS = {"stanza": architecture(RUN.model, None, vocab_size=49_152), "8 B": LLAMA_8B}
CARDS = {"stanza": 16e9, "8 B": 24e9}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_fits_by_arithmetic(name: str) -> None:
    plan = estimate(MODELS[name], RUN, parse_topology("rtx4090:1x1"))
    assert plan.total_bytes < CARDS[name] / 2
    assert plan.fits
    assert "LoRA of rank 16" in page(plan)


@pytest.mark.slow
@pytest.mark.usefixtures("cuda_packages")
@pytest.mark.parametrize("name", MODELS)
def test_arithmetic_is_what_the_compiler_says(name: str) -> None:
    program = compile_train_step(MODELS[name], RUN, "rtx4090:1x1")
    assert program.total_bytes < CARDS[name] / 2
    planned = estimate(MODELS[name], RUN, parse_topology("rtx4090:1x1")).total_bytes
    assert planned == pytest.approx(program.total_bytes, rel=0.1)
