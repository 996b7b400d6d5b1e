"""The models that benchmarks train, with the trainer's own train step, on made-up batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from consyn_jax.config import RunConfig, architecture
from consyn_jax.config_file import read_config_file
from consyn_jax.distributed.allocators import keep_freed_memory
from consyn_jax.distributed.auto_mesh import Machine
from consyn_jax.distributed.hardware import described_gpu
from consyn_jax.model.parameters import initial_parameters, unchanged
from consyn_jax.model_config import ModelConfig
from consyn_jax.planning.roofline import estimate_step
from consyn_jax.planning.topology import GpuTopology
from consyn_jax.planning.workload import workload
from consyn_jax.resolve import resolve
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.dataset import get_dataset
from consyn_jax.training.evaluation import compile_evaluation
from consyn_jax.training.inputs.initial_model import DeferredModel
from consyn_jax.training.optim.schedules import build_schedule
from consyn_jax.training.program import Program, build_program
from consyn_jax.training.trainer import ConsynTrainer
from consyn_jax.tuning.shared_programs import SharedPrograms

Batch = dict[str, np.ndarray]  # input_ids, labels, segment_ids, loss_mask, each [A, B, T]
TOTAL_STEPS = 1000  # of the schedule
CLEANING = ("normalize", "control_characters", "invalid_utf8")


@dataclass(frozen=True)
class Case:
    """A model and its batch.

    Attributes:
        flags: of `consyn-train`, where they differ from the preset.
        note: where the model differs from its name.
    """

    flags: dict[str, Any]
    vocab_size: int = 49_152
    note: str = ""


CONFIGS = Path(__file__).parents[1] / "configs"
OF_DATA = ("tokenizer", *CLEANING)
CPU, GPU = {"mixed_precision": "no"}, {"mixed_precision": "bf16"}
TINY = {
    "model": "haiku",
    "num_layers": 2,
    "hidden_dim": 32,
    "num_heads": 2,
    "mlp_dim": 64,
    "batch_size": 2,
    "max_tokens": 32,
    **CPU,
}


def recipe(name: str) -> dict[str, Any]:
    """The flags of a recipe in `configs`, without those of its data."""
    read = read_config_file(CONFIGS / f"{name}.yaml")
    return {flag: value for flag, value in read.items() if flag not in OF_DATA}


CASES = {
    "tiny": Case(TINY, 512),
    "tiny, muon": Case(TINY | {"optimizer": "muon"}, 512),
    "tiny, fp8": Case(TINY | {"mixed_precision": "fp8"}, 512),
    "haiku": Case({"model": "haiku", "batch_size": 8, **CPU}),
    "27m": Case(
        {
            "model": "verse",
            "num_layers": 6,
            "hidden_dim": 384,
            "num_heads": 6,
            "mlp_dim": 1536,
            "batch_size": 8,
            "max_tokens": 256,
            **CPU,
        },
        32_768,
    ),
    "verse": Case({"model": "verse", "batch_size": 32, **GPU}),
    "verse, bf16 logits": Case(
        {"model": "verse", "batch_size": 32, **GPU, "logits_dtype": "bfloat16"}
    ),
    "stanza": Case({"model": "stanza", "batch_size": 4, **GPU}),
    "stanza, fp8": Case({"model": "stanza", "batch_size": 4, "mixed_precision": "fp8"}),
    "enwik8": Case(recipe("enwik8") | GPU, BPETokenizer.bytes().vocab_size),
    "epic": Case(
        {"model": "epic", "num_layers": 4, "batch_size": 4, **GPU},
        note="full width, 4 of 40 layers",
    ),
}


def trainer(flags: dict[str, Any], vocab_size: int) -> ConsynTrainer:
    """The trainer of `consyn-train` with these flags; the model is not initialised yet."""
    run = resolve({"max_steps": TOTAL_STEPS, "logging_backend": "none", **flags})
    config = architecture(run[0].model, vocab_size=vocab_size, bos_token_id=0, eos_token_id=0)
    seed = run[0].budget.seed
    source = DeferredModel(config, lambda mesh, _: initial_parameters(config, seed, mesh))
    return ConsynTrainer(source, [[1, 2, 3]], run=run)


def program_of(
    model: ModelConfig, run: RunConfig, devices: Sequence[Any], machine: Machine | None = None
) -> Program:
    """The program of a run on some devices of this or of a described machine."""
    built = build_program(
        model,
        run.budget,
        run.hardware,
        run.optimizer,
        run.regularisation,
        length=run.length,
        schedule=build_schedule(run.optimizer, TOTAL_STEPS),
        devices=devices,
        machine=machine,
    )
    return built.program


class TrainStep:
    """The compiled train step of `consyn-train` with these flags, and its state.

    Args:
        flags: of `consyn-train`.
        look: called with the initial parameters, before the first step consumes them.
    """

    def __init__(
        self,
        flags: dict[str, Any],
        vocab_size: int,
        look: Callable[[ModelConfig, Any], None] = lambda config, params: None,
    ) -> None:
        keep_freed_memory()  # as `consyn-train` does
        made = trainer(flags, vocab_size)
        source = made.model
        assert isinstance(source, DeferredModel)
        self.run, self.vocab_size, self.config = made.run, vocab_size, source.config
        self.schedule, self.built = made.schedule, made.build()
        self.program = self.built.program
        self.compiled = made.compile_train_step(self.run)
        parameters = source.make(self.program.mesh, unchanged)
        look(self.config, parameters)
        self.state = self.program.initial_state(parameters)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return (
            self.run.budget.batch_size * self.run.budget.gradient_accumulation_steps * self.length
        )

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.run.length

    @cached_property
    def planned_s(self) -> float | None:
        """Seconds of a step by the plan; None on devices that plans do not know."""
        gpu = described_gpu(jax.devices()[0].device_kind)
        if gpu is None:
            return None
        mesh = self.program.mesh
        work = workload(self.config, self.run, mesh.shape, gpu.memory_bytes)
        return estimate_step(work, GpuTopology(gpu, 1, mesh.size)).total

    def batch(self, seed: int, documents: int = 1) -> dict[str, jax.Array]:
        """A batch from `make_batch`, on the device."""
        budget = self.run.budget
        host = make_batch(
            (budget.gradient_accumulation_steps, budget.batch_size, self.length),
            self.vocab_size,
            seed,
            documents,
        )
        return jax.tree.map(jax.device_put, host)

    def __call__(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Take a step and return its metrics without waiting for them."""
        self.state, metrics = self.compiled(self.state, batch)
        return metrics


class RecipeRun:
    """A recipe on a text, for benchmarks that take its steps one by one on one device.

    Args:
        data: a text file.
        recipe: from `read_config_file`.
        given: flags that override the recipe.
        shared: compiled train steps, for runs that differ only in numbers such as the rate.
        tokenizer: by default (None), tokens are bytes.
        validation: a text to evaluate on; by default (None), the recipe's share of `data`.
    """

    def __init__(
        self,
        data: Path,
        recipe: Mapping[str, Any],
        given: Mapping[str, Any] | None = None,
        shared: SharedPrograms | None = None,
        tokenizer: BPETokenizer | None = None,
        validation: Path | None = None,
    ) -> None:
        run = resolve({"data": [str(data)], **(given or {})}, recipe)
        config, tokenizer = run[0], tokenizer or BPETokenizer.bytes()
        shape = architecture(config.model, vocab_size=tokenizer.vocab_size)
        seed, base = config.budget.seed, config.optimizer.base
        source = DeferredModel(shape, lambda mesh, _: initial_parameters(shape, seed, mesh, base))
        held_out: dict[str, Any] = {"validation_fraction": config.data.validation_fraction}
        if validation is not None:
            held_out = {"validation": [str(validation)]}
        cleaning = {name: getattr(config.data, name) for name in CLEANING}
        splits = [
            get_dataset(
                data, tokenizer, config.length, split=name, seed=seed, **held_out, **cleaning
            )
            for name in ("train", "validation")
        ]
        self.trainer = ConsynTrainer(source, *splits, run=run)
        self.rows = np.arange(config.budget.batch_size)
        self.program = self.trainer.build().program
        self.state: Any = self.program.initial_state(source.make(self.program.mesh, unchanged))
        self.length, self.step = config.length, self._train_step(config, shared)

    def _train_step(self, config: RunConfig, shared: SharedPrograms | None) -> Any:
        if shared is None:
            return self.program.lower_train_step(1, self.rows.size, config.length).compile()
        assert config.budget.max_steps is not None
        return shared.bound_step(self.program, config, config.budget.max_steps)

    @cached_property
    def evaluation(self) -> Callable[[Any], dict[str, float]]:
        """The compiled evaluation on the whole validation part."""
        return compile_evaluation(
            self.program, self.trainer.eval_source, self.rows.size, self.length
        )

    def batches(self) -> Iterable[dict[str, np.ndarray]]:
        """Endless batches of the training data, on the host."""
        return self.trainer.train_source.training(0, self.rows.size, 1, self.rows)


def make_batch(
    shape: tuple[int, int, int], vocab_size: int, seed: int, documents: int = 1
) -> Batch:
    """Random tokens with Zipf frequencies, each row of [A, B, T] cut into random documents."""
    draw = np.random.default_rng(seed)
    weights = 1 / np.arange(1, vocab_size + 1)
    ids = draw.choice(
        vocab_size, size=(*shape[:2], shape[2] + 1), p=weights / weights.sum()
    ).astype(np.int32)
    begins = np.zeros(shape, bool)
    for row in np.ndindex(shape[:2]):
        begins[row][draw.choice(np.arange(1, shape[2]), documents - 1, replace=False)] = True
    segments = 1 + np.cumsum(begins, axis=-1, dtype=np.int32)
    return {
        "input_ids": ids[..., :-1],
        "labels": ids[..., 1:],
        "segment_ids": segments,
        "loss_mask": np.ones(shape, bool),
    }
