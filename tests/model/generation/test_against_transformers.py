"""Greedy text of 100 tokens against transformers: three families of random models, and a real one."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from consyn_jax.model import ConsynLMHeadModel

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 24}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen3": transformers.Qwen3Config(
        **SIZES, head_dim=8, use_sliding_window=True, max_window_layers=1, **WINDOW
    ),
    "phi3": transformers.Phi3Config(**SIZES, **WINDOW),
}
NEW, LENGTHS = 100, (3, 17, 40, 90)  # five prompts of each length


def compared(directory: Path, vocab_size: int) -> None:
    """Twenty prompts, with four slots on our side."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, vocab_size, length).tolist() for length in LENGTHS * 5]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected: dict[int, list[list[int]]] = {}
    for length in LENGTHS:
        ids = torch.tensor([prompt for prompt in prompts if len(prompt) == length])
        with torch.no_grad():
            found = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
            )
        expected[length] = found.tolist()
    model = ConsynLMHeadModel.from_pretrained(directory)
    ours = model.generate(prompts, NEW, stop_at_eos=False)
    for prompt, text in zip(prompts, ours, strict=True):
        assert text == expected[len(prompt)].pop(0)


@pytest.mark.slow
@pytest.mark.users_compiler
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_of_a_family(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    compared(tmp_path, SIZES["vocab_size"])


@pytest.mark.slow
@pytest.mark.users_compiler
def test_greedy_text_of_a_real_model(shared_data: Path) -> None:
    compared(shared_data / "parity/stories260K/hf", 512)
