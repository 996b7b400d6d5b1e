"""How quickly texts are generated, beside transformers with a static cache.

Prefill is the time to the first token of prompts of 128 tokens; decode is what each of 128 more
tokens adds. Both take turns in one process, with the same weights and greedy choice. On a CPU the
models are stories260K and a random llama of 40 million parameters, in float32. On a GPU it is
verse with random weights, in bfloat16; transformers compiles its decode step with `torch.compile`
there. "of the bandwidth" is the share of the specified memory bandwidth that a decode step reaches
by reading each weight, and the filled part of the cache, once.

    python benchmarks/generate.py --stories PATH/TO/stories260K/hf --out benchmarks/results/NAME.json
    # one GPU
    python benchmarks/generate.py --out benchmarks/results/NAME.json
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
import jax
import numpy as np
import torch
import transformers

from consyn_jax.config import architecture
from consyn_jax.distributed.hardware import described_gpu
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.attention import choose_attention
from consyn_jax.model.generation.draws import Sampling
from consyn_jax.model.generation.engine import Engine, Request
from consyn_jax.model.generation.runtime_weights import runtime_weights
from consyn_jax.model.parameters import layout
from consyn_jax.model.pretrained.inspection import read_checkpoint
from consyn_jax.model_config import ModelConfig
from consyn_jax.resolve import resolve

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


def ours(directory: Path, prompts: np.ndarray, dtype: str) -> Callable[[int], list[list[int]]]:
    """Our engine as `consyn-generate` has it; its programs are compiled by the first call."""
    model, device = ConsynLMHeadModel.from_pretrained(directory), jax.devices()[0]
    weights = runtime_weights(model.config, model.parameters, dtype)
    backend = choose_attention(
        *(device.platform, jax.numpy.dtype(dtype), model.config.head_dim),
        getattr(device, "compute_capability", ""),
    ).backend
    engine = Engine(model.config, weights, len(prompts), Sampling(), attention=backend, ends=())
    engine.reserve(PROMPT + NEW + 1)

    def run(new: int) -> list[list[int]]:
        texts: list[list[int]] = [[] for _ in prompts]
        requests = [Request(ids, new, row) for row, ids in enumerate(prompts.tolist())]
        for piece in engine.run(requests):
            texts[piece.request] += piece.tokens
        return texts

    return run


def theirs(directory: Path, prompts: np.ndarray, dtype: str) -> Callable[[int], list[list[int]]]:
    """`generate` of transformers with a static cache; it compiles its decode step on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=kind).to(device)
    ids = torch.tensor(prompts, device=device)

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


def bytes_read(config: ModelConfig, batch: int, new: int, size: int) -> int:
    """Bytes that a decode step has to read: the weights, and the cache as it is in the middle.

    Args:
        new: tokens that are decoded.
        size: bytes of a number.
    """
    rows = 0 if config.tie_embeddings else config.padded_vocab_size  # which are only looked up
    weights = layout(config).num_parameters - rows * config.hidden_dim
    cached = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return size * (weights + batch * (PROMPT + new // 2) * cached)


def compare(
    name: str, directory: Path, batch: int, rounds: int, new: int, dtype: str = "float32"
) -> dict[str, Any]:
    """Times of one model and batch; in float32 the tokens of both must agree."""
    config = read_checkpoint(directory)
    prompts = np.random.default_rng(0).integers(3, config.vocab_size, (batch, PROMPT))
    both = {"ours": ours(directory, prompts, dtype), "theirs": theirs(directory, prompts, dtype)}
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
    gpu, size = described_gpu(jax.devices()[0].device_kind), jax.numpy.dtype(dtype).itemsize
    rate = bytes_read(config, batch, new, size) / decode["ours"]
    share = {"of the bandwidth": rate / gpu.memory_bandwidth} if gpu else {}
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
        **share,
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


def on_gpu(rounds: int = 3, tiny: bool = False) -> dict[str, Any]:
    """One row a batch of verse, in bfloat16."""
    new, batches = (8, (1, 2)) if tiny else (NEW, (1, 64))
    flags = {"model": "verse", **({"num_layers": 2, "hidden_dim": 96} if tiny else {})}
    config = architecture(resolve(flags)[0].model, None, vocab_size=49_152)
    with tempfile.TemporaryDirectory() as folder:
        ConsynLMHeadModel.from_config(config).save_pretrained(folder, dtype="bfloat16")
        rows = [compare("verse", Path(folder), batch, rounds, new, "bfloat16") for batch in batches]
    return {"prompt_tokens": PROMPT, "new_tokens": new, "rounds": rounds, "rows": rows}


def main() -> None:
    """Compare, and record."""
    parser = harness.parser(__doc__)
    parser.add_argument("--stories", type=Path, help="stories260K in the layout of transformers")
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    rounds = 1 if chosen.tiny else chosen.rounds
    on_cpu = jax.devices()[0].platform == "cpu"
    result = measure(chosen.stories, rounds, chosen.tiny) if on_cpu else on_gpu(rounds, chosen.tiny)
    harness.report(result, chosen.out)


if __name__ == "__main__":
    main()
