"""The roofline applied to runs whose speed others have published.

`python tests/planning/published.py` prints the table in docs/planning.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from consyn_jax.distributed.hardware import DESCRIBED, DescribedGpu
from consyn_jax.model_config import ModelConfig
from consyn_jax.planning.roofline import estimate_step
from consyn_jax.planning.topology import GpuTopology
from consyn_jax.planning.workload import Workload

PER_HOST = 8
H100 = DESCRIBED["h100"]
H100_96GB = replace(H100, memory_bandwidth=2.4e12)  # HBM2e; its limit of 500 W is not modelled
H100_A3 = replace(H100, network_bandwidth=12.5e9)  # Google's A3: 8 x 100 Gb/s per host
A100_40GB = replace(DESCRIBED["a100"], memory_bytes=42_298_834_944, memory_bandwidth=1.555e12)


def gpt(layers: int, width: int, heads: int, context: int, vocabulary: int) -> ModelConfig:
    """GPT-2's architecture in our terms.

    A feed-forward layer of two matrices 4 x as wide does the work of three 8/3 x as wide.
    """
    mlp = round(8 / 3 * width)
    sizes = (vocabulary, width, layers, heads, heads, width // heads, mlp, context)
    return ModelConfig(*sizes, qk_norm=False)


def llama(*sizes: int) -> ModelConfig:
    return ModelConfig(*sizes, qk_norm=False, tie_embeddings=False)


GPT_2, GPT_2_XL = gpt(12, 768, 12, 1024, 50_304), gpt(48, 1600, 25, 1024, 50_304)
LLAMA_2_7B = llama(32_000, 4096, 32, 32, 32, 128, 11_008, 4096)
LLAMA_3_8B = llama(128_256, 4096, 32, 32, 8, 128, 14_336, 8192)
MPT_125M, MPT_1B = gpt(12, 768, 12, 2048, 50_368), gpt(24, 2048, 16, 2048, 50_368)
MPT_3B, MPT_7B = gpt(32, 2560, 20, 2048, 50_368), gpt(32, 4096, 32, 2048, 50_368)
MPT_13B = gpt(40, 5120, 40, 2048, 50_368)


@dataclass(frozen=True)
class Published:
    """A run of others.

    Attributes:
        mesh: data, fsdp.
        batch_size: of one GPU.
        tokens_per_s: of one GPU.
        fitted: `roofline.STRETCH` was chosen with this run in view.
    """

    name: str
    source: str
    gpu: DescribedGpu
    model: ModelConfig
    mesh: tuple[int, int]
    batch_size: int
    accumulation: int
    length: int
    tokens_per_s: float
    remat: str = "none"
    fitted: bool = False

    def estimate(self) -> float:
        """Tokens per second of one GPU, by the roofline."""
        data, fsdp = self.mesh
        devices = data * fsdp
        work = Workload(
            self.model,
            {"data": data, "fsdp": fsdp, "context": 1, "tensor": 1},
            self.batch_size * devices,
            self.accumulation,
            self.length,
            self.remat,
            this_package=False,
        )
        topology = GpuTopology(self.gpu, devices // PER_HOST, PER_HOST)
        return work.tokens / devices / estimate_step(work, topology).total


def foundry(
    name: str,
    gpu: DescribedGpu,
    model: ModelConfig,
    mesh: tuple[int, int],
    batch_size: int,
    accumulation: int,
    tokens_per_s: float,
    length: int = 2048,
    remat: str = "none",
    fitted: bool = False,
) -> Published:
    source = "llm-foundry, scripts/train/benchmarking/README.md"
    run = (gpu, model, mesh, batch_size, accumulation, length, tokens_per_s, remat, fitted)
    return Published(f"llm-foundry {name}", source, *run)


def maxtext(
    name: str, gpu: DescribedGpu, mesh: tuple[int, int], flops: float, fitted: bool = False
) -> Published:
    """A run of their 7B, by the FLOP/s of a GPU that they report."""
    # FLOPs per token as MaxText counted them then, with the whole square of attention.
    rate = flops / (12 * 32 * 4096 * 4096 + 6 * 6_607_077_376)
    source = "MaxText, MaxText/configs/a3/llama_2_7b/README.md"
    run = (gpu, LLAMA_2_7B, mesh, 4, 1, 4096, rate)
    return Published(f"MaxText 7 B, {name}", source, *run, fitted=fitted)


def titan(name: str, mesh: tuple[int, int], tokens_per_s: float, fitted: bool = False) -> Published:
    source = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"
    run = (H100_96GB, LLAMA_3_8B, mesh, 2, 1, 8192, tokens_per_s, "attention", fitted)
    return Published(f"torchtitan 8 B, {name}", source, *run)


RECORD = "llm.c: modded-nanogpt's record 1, 10 B tokens in 45 min"
DISCUSSION = "llm.c, discussion 677: 2,747 ms a step"

RUNS = (
    Published(
        "llm.c 124 M, 8 H100",
        RECORD,
        H100,
        GPT_2,
        (8, 1),
        64,
        1,
        1024,
        10e9 / 2700 / 8,
        fitted=True,
    ),
    Published(
        "llm.c 1.56 B, 8 H100",
        DISCUSSION,
        H100,
        GPT_2_XL,
        (8, 1),
        16,
        8,
        1024,
        381_690 / 8,
        fitted=True,
    ),
    maxtext("8 H100", H100, (1, 8), 492e12, fitted=True),
    titan("8 H100 (500 W)", (1, 8), 6667.0, fitted=True),
    foundry("1.3 B, 8 H100", H100, MPT_1B, (1, 8), 14, 1, 45_455.0, fitted=True),
    foundry("13 B, 8 H100", H100, MPT_13B, (1, 8), 2, 1, 4792.0, fitted=True),
    maxtext("128 H100", H100_A3, (16, 8), 375e12),
    titan("128 H100 (500 W)", (1, 128), 6514.0),
    foundry("3 B, 64 H100", H100, MPT_3B, (1, 64), 6, 3, 22_525.0),
    foundry("7 B, 8 H100", H100, MPT_7B, (1, 8), 6, 1, 10_643.0),
    foundry("13 B, 64 H100", H100, MPT_13B, (1, 64), 2, 1, 4800.0),
    foundry("7 B at 8,192 tokens, 8 H100", H100, MPT_7B, (1, 8), 8, 2, 6935.0, 8192, "full"),
    foundry("125 M, 8 A100", A100_40GB, MPT_125M, (1, 8), 26, 3, 136_334.0),
    foundry("1.3 B, 8 A100", A100_40GB, MPT_1B, (1, 8), 8, 8, 19_271.0),
    foundry("1.3 B, 128 A100", A100_40GB, MPT_1B, (1, 128), 10, 1, 18_647.0),
    foundry("13 B, 128 A100", A100_40GB, MPT_13B, (1, 128), 16, 1, 1972.0, remat="full"),
)


def table() -> str:
    """All runs in Markdown: published speed, the roofline's, and the ratio of the step times."""
    lines = [
        "| run | source | published tokens/s/GPU | estimated | estimated / published time |",
        "|---|---|---|---|---|",
    ]
    for run in RUNS:
        ratio, mark = run.tokens_per_s / run.estimate(), " *" if run.fitted else ""
        miss = "" if abs(ratio - 1) <= 0.25 else ", a miss"
        lines.append(
            f"| {run.name}{mark} | {run.source} | {run.tokens_per_s:,.0f} | "
            f"{run.estimate():,.0f} | {ratio:.2f}{miss} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
