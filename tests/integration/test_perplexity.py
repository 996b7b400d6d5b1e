"""The perplexity of a real checkpoint on real text is transformers', through the tokenizer, the
packing and the evaluation of a run."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from stories_model import stories_tokenizer
from transformers import LlamaForCausalLM

from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training import ConsynTrainer
from consyn_jax.training.dataset import get_dataset

WINDOW, CHARACTERS = (
    512,
    30_000,
)  # the checkpoint's context; a part of the text, so that it takes seconds


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    return shared_data / "parity" / "stories260K"


@pytest.fixture(scope="module")
def tokenizer(stories: Path) -> BPETokenizer:
    return stories_tokenizer(stories / "tok512.bin")


def test_the_tokenizer_is_the_checkpoints(
    stories: Path, tokenizer: BPETokenizer, shared_data: Path
) -> None:
    text = (shared_data / "tinystories" / "tiny_stories.txt").read_text()
    expected = np.load(stories / "golden.npz")["input_ids"][0]
    assert tokenizer.encode(text[:1000], add_bos=True)[: len(expected)] == expected.tolist()


@pytest.mark.users_compiler
@pytest.mark.slow
def test_perplexity_is_transformers(
    stories: Path, tokenizer: BPETokenizer, shared_data: Path, tmp_path: Path
) -> None:
    text = (shared_data / "tinystories" / "tiny_stories.txt").read_text()[:CHARACTERS]
    (tmp_path / "text.txt").write_text(text)
    dataset = get_dataset(tmp_path / "text.txt", tokenizer, WINDOW, validation_fraction=0.0)
    model = ConsynLMHeadModel.from_pretrained(stories / "hf")
    found = ConsynTrainer(model, dataset, dataset, output_dir=tmp_path / "run").evaluate()

    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    nll, theirs = 0.0, LlamaForCausalLM.from_pretrained(stories / "hf").eval()
    for first in range(0, len(ids), WINDOW):
        labels = torch.tensor(ids[first : first + WINDOW])
        inputs = torch.tensor([ids[first - 1] if first else tokenizer.bos_token_id, *labels[:-1]])
        with torch.no_grad():
            logits = theirs(inputs[None]).logits[0]
        nll += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    assert found["eval/tokens"] == len(ids)
    assert found["eval/perplexity"] == pytest.approx(math.exp(nll / len(ids)), rel=1e-5)
    assert found["eval/bits_per_byte"] == pytest.approx(
        nll / math.log(2) / len(text.encode()), rel=1e-5
    )
