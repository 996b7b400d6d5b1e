"""How quickly texts are generated, beside transformers with a static cache, in float32.

Prefill is the time to the first token of prompts of 128 tokens; decode is what each of 128 more
tokens adds. Both take turns in one process, with the same weights and greedy choice. The models are
stories260K, and a random llama of 40 million parameters.

    python benchmarks/generate.py --stories PATH/TO/stories260K/hf --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A library's threads that spin while they wait take the cores from the other's turn.
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import harness
import numpy as np
import torch
import transformers

from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.generation.draws import Sampling
from consyn_jax.model.generation.engine import Engine, Request
from consyn_jax.model.generation.runtime_weights import runtime_weights

PROMPT, NEW = 128, 128
LLAMA = {
    "vocab_size": 16_384,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def ours(directory: Path, prompts: np.ndarray) -> Callable[[int], list[list[int]]]:
    """Our engine; its programs are compiled by the first call."""
    model = ConsynLMHeadModel.from_pretrained(directory)
    weights = runtime_weights(model.config, model.parameters, "float32")
    engine = Engine(model.config, weights, len(prompts), Sampling(), ends=())
    engine.reserve(PROMPT + NEW + 1)

    def run(new: int) -> list[list[int]]:
        texts: list[list[int]] = [[] for _ in prompts]
        requests = [Request(ids, new, row) for row, ids in enumerate(prompts.tolist())]
        for piece in engine.run(requests):
            texts[piece.request] += piece.tokens
        return texts

    return run


def theirs(directory: Path, prompts: np.ndarray) -> Callable[[int], list[list[int]]]:
    """`generate` of transformers with a static cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor(prompts)

    def run(new: int) -> list[list[int]]:
        with torch.no_grad():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                cache_implementation="static",
            )
        return found[:, ids.shape[1] :].tolist()

    return run


def compare(name: str, directory: Path, batch: int, rounds: int, new: int) -> dict[str, Any]:
    """Times of one model and batch; the tokens of both must agree."""
    vocab = transformers.AutoConfig.from_pretrained(directory).vocab_size
    prompts = np.random.default_rng(0).integers(3, vocab, (batch, PROMPT))
    both = {"ours": ours(directory, prompts), "theirs": theirs(directory, prompts)}
    same = np.mean(np.array(both["ours"](new)) == np.array(both["theirs"](new)))
    calls = {
        f"{who} {tokens}": lambda run=run, tokens=tokens: run(tokens)
        for tokens in (1, new)
        for who, run in both.items()
    }
    seconds = harness.alternate(calls, rounds)
    found = {who: harness.spread(times)["median"] for who, times in seconds.items()}
    prefill = {who: found[f"{who} 1"] for who in both}
    decode = {who: (found[f"{who} {new}"] - prefill[who]) / (new - 1) for who in both}
    return {
        "model": name,
        "batch": batch,
        "prefill_ms": 1e3 * prefill["ours"],
        "their_prefill_ms": 1e3 * prefill["theirs"],
        "prefill_ratio": prefill["theirs"] / prefill["ours"],
        "decode_ms": 1e3 * decode["ours"],
        "their_decode_ms": 1e3 * decode["theirs"],
        "decode_ratio": decode["theirs"] / decode["ours"],
        "same_tokens": float(same),
    }


def measure(stories: Path | None, rounds: int, tiny: bool = False) -> dict[str, Any]:
    """One row a model and batch."""
    new = 8 if tiny else NEW
    sizes = LLAMA | ({"hidden_size": 64, "num_hidden_layers": 2} if tiny else {})
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**sizes)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        models = {"llama 40M": Path(folder)} | ({"stories260K": stories} if stories else {})
        rows = [
            compare(name, directory, batch, rounds, new)
            for name, directory in models.items()
            for batch in (1, 8)
        ]
    return {"prompt_tokens": PROMPT, "new_tokens": new, "rounds": rounds, "rows": rows}


def main() -> None:
    """Compare, and record."""
    parser = harness.parser(__doc__)
    parser.add_argument("--stories", type=Path, help="stories260K in the layout of transformers")
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    rounds = 1 if chosen.tiny else chosen.rounds
    harness.report(measure(chosen.stories, rounds, chosen.tiny), chosen.out)


if __name__ == "__main__":
    main()
