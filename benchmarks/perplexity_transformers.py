"""Perplexity of a model on whole texts, here and in transformers, in the same windows.

The windows are those of transformers' guide "Perplexity of fixed-length models": they begin every
STRIDE tokens, and score what no earlier one has. Both sides are float32 on the CPU.

    python benchmarks/perplexity_transformers.py runs/haiku ../shared/data/wikitext-2/test.txt
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from harness import facts, write
from transformers import AutoModelForCausalLM

from consyn_jax.inference.model_source import ModelSource, find_source
from consyn_jax.inference.scoring.documents import find_documents
from consyn_jax.inference.scoring.evaluation_options import EvaluateTextOptions
from consyn_jax.inference.scoring.ready_scorer import load_scorer
from consyn_jax.inference.scoring.text_scores import score_texts
from consyn_jax.tokenization import BPETokenizer


def theirs(model: Any, ids: list[int], size: int, stride: int) -> tuple[float, int]:
    """Nats and tokens of a model of transformers."""
    nats, tokens, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + size, len(ids))
        window = torch.tensor([ids[begin:end]])
        labels = window.clone()
        labels[:, : -(end - previous)] = -100
        number = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            nats += float(model(window, labels=labels).loss) * number
        tokens, previous = tokens + number, end
        if end == len(ids):
            break
    return nats, tokens


def compare(
    source: ModelSource, tokenizer: BPETokenizer, text: Path, stride: int
) -> dict[str, Any]:
    """Both perplexities of a text."""
    size = source.config.context
    documents = find_documents(EvaluateTextOptions(data=(str(text),)), tokenizer)
    ours = score_texts(load_scorer(source, "float32", "auto", 16), documents, size, stride)
    (document,) = documents
    model = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32).eval()
    nats, tokens = theirs(model, document.ids.tolist(), size, stride)
    assert tokens == int(ours.tokens.sum())
    there = math.exp(nats / tokens)
    return {
        "tokens": tokens,
        "window": size,
        "stride": stride,
        "perplexity": ours.metrics["perplexity"],
        "perplexity_of_transformers": there,
        "relative_difference": abs(ours.metrics["perplexity"] / there - 1),
    }


def main() -> None:
    """Compare, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--stride", type=int, help="half the model's context by default")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    source = find_source(options.model)
    assert source.tokenizer is not None
    stride = options.stride or source.config.context // 2
    found = {}
    for text in options.texts:
        found[text.name] = compare(source, source.tokenizer, text, stride)
        print(text.name, found[text.name], flush=True)
    if options.output is not None:
        write(options.output, {**facts(), "model": source.taken, "results": found})


if __name__ == "__main__":
    main()
