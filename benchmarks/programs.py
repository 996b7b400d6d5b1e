"""The models that benchmarks train, and their real train step: the trainer's own, of a resolved run, on batches made up here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from consyn_jax.config import ModelConfig, architecture
from consyn_jax.distributed.host_memory import keep_freed_memory
from consyn_jax.model.parameters import initial_parameters
from consyn_jax.resolve import resolve
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.dataset import get_dataset
from consyn_jax.training.trainer import ConsynTrainer, ModelSource

Batch = dict[str, np.ndarray]  # input_ids, labels, segment_ids, loss_mask, each [A, B, T]
TOTAL_STEPS = 1000  # of the schedule


@dataclass(frozen=True)
class Case:
    """A model and its batch.

    Attributes:
        flags: of `consyn-train`, what is not the preset's.
        note: what of the model is not what its name says.
    """

    flags: dict[str, Any]
    vocab_size: int = 49_152
    note: str = ""


CPU, GPU = {"mixed_precision": "no"}, {"mixed_precision": "bf16"}
CASES = {
    "tiny": Case({"model": "haiku", "num_layers": 2, "hidden_dim": 32, "num_heads": 2, "mlp_dim": 64, "batch_size": 2, "max_tokens": 32, **CPU}, 512),
    "haiku": Case({"model": "haiku", "batch_size": 8, **CPU}),
    "27m": Case(
        {"model": "verse", "num_layers": 6, "hidden_dim": 384, "num_heads": 6, "mlp_dim": 1536, "batch_size": 8, "max_tokens": 256, **CPU}, 32_768
    ),
    "verse": Case({"model": "verse", "batch_size": 32, **GPU}),
    "stanza": Case({"model": "stanza", "batch_size": 4, **GPU}),
    "stanza, fp8": Case({"model": "stanza", "batch_size": 4, "mixed_precision": "fp8"}),
    "epic": Case({"model": "epic", "num_layers": 4, "batch_size": 4, **GPU}, note="full width, 4 of 40 layers"),
}


def trainer(flags: dict[str, Any], vocab_size: int) -> ConsynTrainer:
    """What `consyn-train` would make of these flags, with a model that is not drawn yet."""
    run = resolve({"max_steps": TOTAL_STEPS, "logging_backend": "none", **flags})
    config = architecture(run[0].model, vocab_size=vocab_size, bos_token_id=0, eos_token_id=0)
    source = ModelSource(config, partial(initial_parameters, config, run[0].budget.seed))
    return ConsynTrainer(source, [[1, 2, 3]], run=run)


class TrainStep:
    """What `consyn-train` runs for these flags, compiled, and its state.

    Args:
        flags: of `consyn-train`.
        look: is shown the initial parameters, before the first step consumes them.
    """

    def __init__(self, flags: dict[str, Any], vocab_size: int, look: Callable[[ModelConfig, Any], None] = lambda config, params: None) -> None:
        keep_freed_memory()  # as `consyn-train` does
        made = trainer(flags, vocab_size)
        source = made.model
        assert isinstance(source, ModelSource)
        self.run, self.vocab_size, self.config = made.run, vocab_size, source.config
        self.schedule, self.built = made.schedule, made.build()
        self.program = self.built.program
        self.compiled = made.compile_train_step(self.run)
        parameters = source.make(self.program.mesh)
        look(self.config, parameters)
        self.state = self.program.initial_state(parameters)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.run.budget.batch_size * self.run.budget.gradient_accumulation_steps * self.length

    @property
    def length(self) -> int:
        """Of a sequence."""
        return self.run.length

    def batch(self, seed: int, documents: int = 1) -> dict[str, jax.Array]:
        """A batch of `make_batch` on the device."""
        budget = self.run.budget
        host = make_batch((budget.gradient_accumulation_steps, budget.batch_size, self.length), self.vocab_size, seed, documents)
        return jax.tree.map(jax.device_put, host)

    def __call__(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Take a step; its metrics, which are not waited for."""
        self.state, metrics = self.compiled(self.state, batch)
        return metrics


class RecipeRun:
    """A recipe for bytes on one device, ready to take its steps, for benchmarks that take them one by one.

    Args:
        data: a text.
        recipe: what `read_config_file` gives.
        given: flags that override it.
    """

    def __init__(self, data: Path, recipe: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> None:
        run = resolve({"data": [str(data)], **(given or {})}, recipe)
        config, tokenizer = run[0], BPETokenizer.bytes()
        shape, seed = architecture(config.model, vocab_size=tokenizer.vocab_size), config.budget.seed
        source = ModelSource(shape, lambda mesh: initial_parameters(shape, seed, mesh))
        fraction = config.data.validation_fraction
        splits = [get_dataset(data, tokenizer, config.length, split=name, validation_fraction=fraction, seed=seed) for name in ("train", "validation")]
        self.trainer, self.rows = ConsynTrainer(source, *splits, run=run), np.arange(config.budget.batch_size)
        self.program = self.trainer.build().program
        self.state: Any = self.program.initial_state(source.make(self.program.mesh))
        self.step = self.program.lower_train_step(1, self.rows.size, config.length).compile()
        self.evaluation = self.trainer.evaluation(self.program)

    def batches(self) -> Iterable[dict[str, np.ndarray]]:
        """Of the training data, without end, on the host."""
        return self.trainer.train_source.training(0, self.rows.size, 1, self.rows)


def compile_ahead(models: Iterable[str], tiny: bool = False) -> dict[str, Any]:
    """Compile the train steps of several models beside each other, for JAX's cache to have them when they are timed."""

    def seconds(name: str) -> dict[str, Any]:
        began, made = time.perf_counter(), trainer(CASES[name].flags, CASES[name].vocab_size)
        made.compile_train_step(made.run)
        return {"model": name, "seconds": time.perf_counter() - began}

    with ThreadPoolExecutor() as pool:
        return {"rows": list(pool.map(seconds, ("tiny",) if tiny else models))}


def make_batch(shape: tuple[int, int, int], vocab_size: int, seed: int, documents: int = 1) -> Batch:
    """Tokens as frequent as words are (Zipf's law), each row of [A, B, T] cut into `documents` of random lengths."""
    draw = np.random.default_rng(seed)
    weights = 1 / np.arange(1, vocab_size + 1)
    ids = draw.choice(vocab_size, size=(*shape[:2], shape[2] + 1), p=weights / weights.sum()).astype(np.int32)
    begins = np.zeros(shape, bool)
    for row in np.ndindex(shape[:2]):
        begins[row][draw.choice(np.arange(1, shape[2]), documents - 1, replace=False)] = True
    segments = 1 + np.cumsum(begins, axis=-1, dtype=np.int32)
    return {"input_ids": ids[..., :-1], "labels": ids[..., 1:], "segment_ids": segments, "loss_mask": np.ones(shape, bool)}
