"""The loss of packed conversations is the sum of their losses alone, with transformers as judge."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.tokenization.chat.chat_encoder import ChatEncoder
from consyn_jax.tokenization.chat.turns import Chat
from consyn_jax.training.dataset import get_dataset

TOKENIZER = BPETokenizer.bytes()


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross-entropy of each label."""
    top = logits.max(-1, keepdims=True)
    return (
        np.log(np.exp(logits - top).sum(-1))
        + top[..., 0]
        - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    )


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("packing", ["whole", "cut"])
def test_packed_conversations_lose_what_each_loses_alone(
    tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path / "cache"))
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": "one " * (i % 5 + 1)},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "yes", "weight": i % 2},
            ]
        }
        for i in range(20)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    template = tmp_path / "marked.jinja"  # writes no BOS, though the tokenizer has one
    template.write_text(
        "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}",
        encoding="utf-8",
    )
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TOKENIZER.vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            initializer_range=0.3,
        )
    ).eval()
    theirs.save_pretrained(tmp_path / "model")
    ours = ConsynLMHeadModel.from_pretrained(tmp_path / "model")
    encoder, alone = ChatEncoder(TOKENIZER, template.read_text()), 0.0
    for row in rows:
        learned = [bool(m.get("weight", 1)) and m["role"] == "assistant" for m in row["messages"]]
        made = encoder.encode(Chat(row["messages"], learned))
        ids = np.array(made.ids)
        with torch.no_grad():
            logits = theirs(torch.tensor(ids[None])).logits[0].numpy()
        alone += float(losses(logits[:-1], ids[1:])[made.targets[1:] == 1].sum())
    data = get_dataset(
        tmp_path / "chats.jsonl",
        TOKENIZER,
        block_size=160 if packing == "whole" else 4096,  # cut: one sequence has all
        packing=packing,
        validation_fraction=0.0,
        chat_template=str(template),
    )
    items = data.rows(np.arange(len(data)))
    logits = np.asarray(ours(jnp.asarray(items["input_ids"]), jnp.asarray(items["segment_ids"])))
    packed = losses(logits, items["labels"])
    assert float(packed[items["loss_mask"]].sum()) == pytest.approx(alone, rel=1e-5)
    assert int(items["loss_mask"].sum()) == data.num_targets
