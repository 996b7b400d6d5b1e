"""Conversations packed into sequences lose what each loses alone in transformers: five templates."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from chat_families import FAMILIES, TOOLS, conversations
from hypothesis import HealthCheck, given, settings
from test_against_trl import OWN, templates
from transformers import LlamaConfig, LlamaForCausalLM

from consyn_jax.data.packing import WholeDocuments
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.tokenization.chat.chat_encoder import ChatEncoder
from consyn_jax.tokenization.chat.turns import Chat
from consyn_jax.training.dataset import get_dataset

pytestmark = pytest.mark.slow
CONVERSATIONS = 200
LENGTH, AT_ONCE = 1024, 2  # tokens of a sequence, and sequences of the one compiled shape
MODEL = LlamaConfig(
    vocab_size=320,  # more than any of the tokenizers has: one program for all of them
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=LENGTH,
    tie_word_embeddings=False,
    initializer_range=0.3,
    attn_implementation="eager",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A random model of transformers, and ours with its weights as one compiled program."""
    place = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(MODEL).eval()
    theirs.save_pretrained(place)
    return theirs, jax.jit(
        partial(ConsynLMHeadModel.__call__, ConsynLMHeadModel.from_pretrained(place))
    )


def drawn(name: str) -> list[tuple[list[dict], Any]]:
    """The conversations that hypothesis draws for a template, without a second reading of any."""
    found: list[tuple[list[dict], Any]] = []

    @settings(
        max_examples=CONVERSATIONS,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(conversations(calls=name not in OWN), TOOLS)
    def collect(messages: list[dict], tools: Any) -> None:
        found.append((messages, tools))

    collect()
    return found


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross-entropy of each label, in float64."""
    logits = logits.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    normaliser = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    return normaliser - np.take_along_axis(logits, labels[..., None], -1)[..., 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_conversations_lose_what_each_loses_alone(
    name: str, models: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path / "cache"))
    theirs, ours = models
    tokenizer, (source, _) = FAMILIES[name].ours, templates(name)
    chats = drawn(name)
    assert len(chats) >= CONVERSATIONS
    encoder, alone = ChatEncoder(tokenizer, source), dict[tuple[int, ...], tuple[float, int]]()
    expected_loss, expected_targets = 0.0, 0
    for messages, tools in chats:
        plain = [{key: v for key, v in message.items() if v is not None} for message in messages]
        made = encoder.encode(Chat(plain, [m["role"] == "assistant" for m in plain], tools))
        ids, learned = np.array(made.ids), made.targets[1:] == 1
        with torch.no_grad():
            logits = theirs(torch.tensor(ids[None])).logits[0].numpy()
        loss = float(losses(logits[:-1], ids[1:])[learned].sum())
        alone[tuple(made.ids)] = loss, int(learned.sum())
        expected_loss, expected_targets = expected_loss + loss, expected_targets + learned.sum()
    rows = [{"messages": m, **({"tools": t} if t else {})} for m, t in chats]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "template.jinja").write_text(source, encoding="utf-8")
    data = get_dataset(
        tmp_path / "chats.jsonl",
        tokenizer,
        block_size=LENGTH,
        packing="whole",
        validation_fraction=0.0,
        chat_template=str(tmp_path / "template.jinja"),
    )
    assert isinstance(data.packed, WholeDocuments)
    assert (data.num_documents, data.packed.num_long) == (len(chats), 0)
    assert len(data) < len(chats) / 2, "several conversations share a sequence"
    total, found = 0.0, 0
    for start in range(0, len(data), AT_ONCE):
        numbers = np.minimum(np.arange(start, start + AT_ONCE), len(data) - 1)
        items = data.rows(numbers)
        logits = ours(jnp.asarray(items["input_ids"]), jnp.asarray(items["segment_ids"]))
        packed = losses(np.asarray(logits), items["labels"])
        for row in range(min(AT_ONCE, len(data) - start)):
            segments, mask = items["segment_ids"][row], items["loss_mask"][row]
            for segment in np.unique(segments[mask]):
                place = segments == segment
                ids = (*items["input_ids"][row, place], items["labels"][row, place][-1])
                loss, targets = alone[tuple(map(int, ids))]
                counted = packed[row][place & mask]
                assert len(counted) == targets
                assert counted.sum() == pytest.approx(loss, rel=1e-5)
                total, found = total + counted.sum(), found + 1
    assert found == len(chats)
    assert total == pytest.approx(expected_loss, rel=1e-6)
    assert data.num_targets == expected_targets
