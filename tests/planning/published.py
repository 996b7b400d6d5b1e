"""The roofline run backwards: what it gives for runs whose speed others have published.

`python tests/planning/published.py` prints the table that docs/planning.md has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from consyn_jax.config import ModelConfig
from consyn_jax.planning.roofline import Workload, estimate_step
from consyn_jax.planning.topology import GPUS, Gpu, Topology

A100_40GB = replace(GPUS["a100"], memory_bytes=42_298_834_944, memory_bandwidth=1.555e12)
H100_96GB = replace(GPUS["h100"], memory_bandwidth=2.4e12)  # HBM2e, and limited to 500 W, which is not modelled

H100_A3 = replace(GPUS["h100"], network_bandwidth=12.5e9)  # Google's A3: eight times 100 Gb/s a host


def gpt(layers: int, width: int, heads: int, context: int, vocabulary: int) -> ModelConfig:
    """GPT-2's architecture in our terms: a feed-forward layer of two matrices 4 x as wide has the work of three 8/3 x as wide."""
    return ModelConfig(vocabulary, width, layers, heads, heads, width // heads, round(8 / 3 * width), context, qk_norm=False)


LLAMA_2_7B = ModelConfig(32_000, 4096, 32, 32, 32, 128, 11_008, 4096, qk_norm=False, tie_embeddings=False)
LLAMA_3_8B = ModelConfig(128_256, 4096, 32, 32, 8, 128, 14_336, 8192, qk_norm=False, tie_embeddings=False)
MPT_125M, MPT_1B = gpt(12, 768, 12, 2048, 50_368), gpt(24, 2048, 16, 2048, 50_368)
MPT_3B, MPT_7B, MPT_13B = gpt(32, 2560, 20, 2048, 50_368), gpt(32, 4096, 32, 2048, 50_368), gpt(40, 5120, 40, 2048, 50_368)
FULL_ATTENTION = 12 * 32 * 4096 * 4096 + 6 * 6_607_077_376  # FLOPs that MaxText counted for a token of its 7B then, the whole square in them


@dataclass(frozen=True)
class Published:
    """A run of others.

    Attributes:
        tokens_per_s: of one GPU.
        fitted: `roofline.STRETCH` was chosen with it in view.
    """

    name: str
    source: str
    gpu: Gpu
    hosts: int
    model: ModelConfig
    mesh: tuple[int, int]  # data, fsdp
    batch_size: int  # of one GPU
    accumulation: int
    length: int
    tokens_per_s: float
    remat: str = "none"
    fitted: bool = False

    def estimate(self) -> float:
        """Tokens per second of one GPU, by the roofline."""
        data, fsdp = self.mesh
        devices = data * fsdp
        sizes = {"data": data, "fsdp": fsdp, "context": 1, "tensor": 1}
        work = Workload(self.model, sizes, self.batch_size * devices, self.accumulation, self.length, self.remat, own=False)
        return work.tokens / devices / estimate_step(work, Topology(self.gpu, self.hosts, devices // self.hosts)).total


LLM_C, FOUNDRY = "llm.c", "llm-foundry, scripts/train/benchmarking/README.md"
TITAN, MAXTEXT = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md", "MaxText, MaxText/configs/a3/llama_2_7b/README.md"
H100 = GPUS["h100"]
RECORD, DISCUSSION = f"{LLM_C}: modded-nanogpt's record 1, 10 B tokens in 45 min", f"{LLM_C}, discussion 677: 2,747 ms a step"
GPT_2, GPT_2_XL = gpt(12, 768, 12, 1024, 50_304), gpt(48, 1600, 25, 1024, 50_304)
RUNS = (
    Published("llm.c 124 M, 8 H100", RECORD, H100, 1, GPT_2, (8, 1), 64, 1, 1024, 10e9 / 2700 / 8, fitted=True),
    Published("llm.c 1.56 B, 8 H100", DISCUSSION, H100, 1, GPT_2_XL, (8, 1), 16, 8, 1024, 381_690 / 8, fitted=True),
    Published("MaxText 7 B, 8 H100", MAXTEXT, H100, 1, LLAMA_2_7B, (1, 8), 4, 1, 4096, 492e12 / FULL_ATTENTION, fitted=True),
    Published("torchtitan 8 B, 8 H100 (500 W)", TITAN, H100_96GB, 1, LLAMA_3_8B, (1, 8), 2, 1, 8192, 6667.0, "attention", fitted=True),
    Published("llm-foundry 1.3 B, 8 H100", FOUNDRY, H100, 1, MPT_1B, (1, 8), 14, 1, 2048, 45_455.0, fitted=True),
    Published("llm-foundry 13 B, 8 H100", FOUNDRY, H100, 1, MPT_13B, (1, 8), 2, 1, 2048, 4792.0, fitted=True),
    Published("MaxText 7 B, 128 H100", MAXTEXT, H100_A3, 16, LLAMA_2_7B, (16, 8), 4, 1, 4096, 375e12 / FULL_ATTENTION),
    Published("torchtitan 8 B, 128 H100 (500 W)", TITAN, H100_96GB, 16, LLAMA_3_8B, (1, 128), 2, 1, 8192, 6514.0, "attention"),
    Published("llm-foundry 3 B, 64 H100", FOUNDRY, H100, 8, MPT_3B, (1, 64), 6, 3, 2048, 22_525.0),
    Published("llm-foundry 7 B, 8 H100", FOUNDRY, H100, 1, MPT_7B, (1, 8), 6, 1, 2048, 10_643.0),
    Published("llm-foundry 13 B, 64 H100", FOUNDRY, H100, 8, MPT_13B, (1, 64), 2, 1, 2048, 4800.0),
    Published("llm-foundry 7 B at 8,192 tokens, 8 H100", FOUNDRY, H100, 1, MPT_7B, (1, 8), 8, 2, 8192, 6935.0, "full"),
    Published("llm-foundry 125 M, 8 A100", FOUNDRY, A100_40GB, 1, MPT_125M, (1, 8), 26, 3, 2048, 136_334.0),
    Published("llm-foundry 1.3 B, 8 A100", FOUNDRY, A100_40GB, 1, MPT_1B, (1, 8), 8, 8, 2048, 19_271.0),
    Published("llm-foundry 1.3 B, 128 A100", FOUNDRY, A100_40GB, 16, MPT_1B, (1, 128), 10, 1, 2048, 18_647.0),
    Published("llm-foundry 13 B, 128 A100", FOUNDRY, A100_40GB, 16, MPT_13B, (1, 128), 16, 1, 2048, 1972.0, "full"),
)


def table() -> str:
    """All runs in Markdown: what was published, what the roofline gives, and the ratio of the two step times."""
    lines = ["| run | source | published tokens/s/GPU | estimated | estimated / published time |", "|---|---|---|---|---|"]
    for run in RUNS:
        ratio, mark = run.tokens_per_s / run.estimate(), " *" if run.fitted else ""
        miss = "" if abs(ratio - 1) <= 0.25 else ", a miss"
        lines.append(f"| {run.name}{mark} | {run.source} | {run.tokens_per_s:,.0f} | {run.estimate():,.0f} | {ratio:.2f}{miss} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
