"""The work of one train step: the quantities that determine its memory and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from consyn_jax.config import RunConfig
from consyn_jax.model.arithmetic import (
    BYTES_OF_LOGIT,
    FLOAT32,
    train_flops_per_token,
)
from consyn_jax.model_config import NO_LORA, LoraOptions, ModelConfig
from consyn_jax.training.runtime.step_memory import MemoryEstimate, estimate_memory


@dataclass(frozen=True)
class Workload:
    """The quantities that determine the memory and time of one train step.

    Attributes:
        sizes: size of each mesh axis.
        batch_size: number of sequences in a micro-batch over all GPUs, two per preference pair.
        accumulation: number of micro-batches in a step.
        length: number of tokens in a sequence.
        remat: the recomputation policy, a value of `--gradient_checkpointing`.
        moment_bytes: bytes of optimizer moments per parameter.
        host_moments: whether moments are in host memory and copied to the GPU and back each step.
        fp8: whether the matmuls of the blocks are in 8 bits.
        this_package: whether this package runs the step; False for another training program. The
            attention kernel of this package is slower, because it masks attention between
            documents. Documents are assumed to be as long as a sequence.
        gpu_bytes: memory of the GPU if it is in the hardware table, otherwise 0.
        logit_bytes: bytes of a logit in memory, between its matmul and the softmax.
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
    logit_bytes: int = FLOAT32

    @property
    def tokens(self) -> int:
        """Number of tokens in a step, over all GPUs."""
        return self.batch_size * self.accumulation * self.length

    @property
    def local_tokens(self) -> float:
        """Number of tokens of a micro-batch on one GPU."""
        devices = self.sizes["data"] * self.sizes["fsdp"] * self.sizes["context"]
        return self.batch_size * self.length / devices

    @property
    def flops(self) -> float:
        """FLOPs of a step over all GPUs, as counted for model FLOP utilisation.

        Masked scores of causal attention and recomputation are not counted.
        """
        return self.tokens * train_flops_per_token(self.model, self.length, self.lora)

    @property
    def memory(self) -> MemoryEstimate:
        """Memory that the step needs on one GPU, estimated by arithmetic."""
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
            self.logit_bytes,
        )


def workload(
    model: ModelConfig, run: RunConfig, sizes: Mapping[str, int], gpu_bytes: int = 0
) -> Workload:
    """Return the workload of a resolved run on a mesh with the axis sizes `sizes`."""
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
        logit_bytes=BYTES_OF_LOGIT[run.hardware.logits_dtype],
    )
