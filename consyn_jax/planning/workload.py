"""The work of one train step, and how it is split over a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from consyn_jax.config import RunConfig
from consyn_jax.model.arithmetic import MemoryEstimate, estimate_memory, train_flops_per_token
from consyn_jax.model_config import NO_LORA, LoraOptions, ModelConfig


@dataclass(frozen=True)
class Workload:
    """The work of one step, and how it is split.

    Attributes:
        sizes: sizes of the mesh's axes.
        batch_size: sequences of one micro-batch over all GPUs; a pair has two.
        accumulation: micro-batches in a step.
        length: tokens of a sequence.
        remat: the recomputation policy, a value of `--gradient_checkpointing`.
        moment_bytes: bytes of all moments of a parameter together.
        host_moments: the moments are in host memory, and travel to the GPU and back in each step.
        fp8: the blocks' matmuls are of 8-bit numbers.
        this_package: the step is this package's program, whose attention kernel works inside
            documents; a document is taken to be as long as the sequence.
        gpu_bytes: memory of a GPU of the table, or 0.
    """

    model: ModelConfig
    sizes: Mapping[str, int]
    batch_size: int
    accumulation: int
    length: int
    remat: str = "none"
    moment_bytes: int = 8
    host_moments: bool = False
    fp8: bool = False
    this_package: bool = True
    lora: LoraOptions = NO_LORA
    gpu_bytes: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all GPUs."""
        return self.batch_size * self.accumulation * self.length

    @property
    def local_tokens(self) -> float:
        """Tokens of a micro-batch on one GPU."""
        devices = self.sizes["data"] * self.sizes["fsdp"] * self.sizes["context"]
        return self.batch_size * self.length / devices

    @property
    def flops(self) -> float:
        """FLOPs of a step over all GPUs, as model FLOP utilisation counts them.

        Attention is causal, and nothing is recomputed.
        """
        return self.tokens * train_flops_per_token(self.model, self.length, self.lora)

    @property
    def memory(self) -> MemoryEstimate:
        """The memory of one GPU, by arithmetic."""
        return estimate_memory(
            self.model,
            self.sizes,
            self.batch_size,
            self.accumulation,
            self.length,
            self.remat,
            0 if self.host_moments else self.moment_bytes,
            self.lora,
            self.gpu_bytes,
        )


def workload(
    model: ModelConfig, run: RunConfig, sizes: Mapping[str, int], gpu_bytes: int = 0
) -> Workload:
    """The workload of a resolved run on a mesh with these axis sizes."""
    return Workload(
        model,
        sizes,
        run.budget.batch_size * (run.row_length // run.length),
        run.budget.gradient_accumulation_steps,
        run.length,
        run.hardware.gradient_checkpointing,
        run.optimizer.moment_bytes,
        run.hardware.optimizer_memory == "host",
        run.hardware.mixed_precision == "fp8",
        lora=run.lora,
        gpu_bytes=gpu_bytes,
    )
