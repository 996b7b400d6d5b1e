"""`ConsynTrainer`: a model, data and settings as a run."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from consyn_jax.config import ModelConfig, RunConfig, UserError
from consyn_jax.data.loader import prefetch
from consyn_jax.distributed.host_memory import keep_freed_memory
from consyn_jax.distributed.mesh import local_rows, placer
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.parameters import Params, layout
from consyn_jax.resolve import resolve
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.console import Console
from consyn_jax.training.evaluation import evaluate
from consyn_jax.training.header import header, warnings
from consyn_jax.training.inputs import as_source
from consyn_jax.training.loop import Training
from consyn_jax.training.lr_find import Suggestion, draw_curve, range_test, rising_rates, rising_schedule, suggest, write_results
from consyn_jax.training.memory import explaining_exhaustion, fitting
from consyn_jax.training.program import EVAL_AXES, TRAIN_AXES, Built, Program, build_program
from consyn_jax.training.program_cache import keep_programs
from consyn_jax.training.run_directory import check_output, run_path
from consyn_jax.training.scheduler import configured_schedule, decay_end, draw_schedule, write_schedule_plot
from consyn_jax.validation import parse_profile_steps, what_needs_evaluations


@dataclass(frozen=True)
class ModelSource:
    """A model that does not exist yet: its architecture, and what makes its parameters on a mesh."""

    config: ModelConfig
    make: Callable[[Mesh], Params]


class ConsynTrainer:
    """Train a model. After `train()`, `model` is the trained model.

    Args:
        model: a `ConsynLMHeadModel`, or a `ModelSource`.
        train_dataloader: a dataset of `get_dataset`, a `MixedDataset` of them, a list of token lists, a dataset of items, or any iterable
            of batches.
        eval_dataloader: the same kinds; without it there is no evaluation.
        tokenizer: saved beside the model, and used for the sample; a dataset of `get_dataset` brings its own.
        run: a resolved run and its origins, as `consyn-train` makes it; the other settings are then not looked at.
        notes: (name, value) lines for the header that is printed at the start.
        settings: the flags of `consyn-train` by name.

    Raises:
        UserError: a setting or data that cannot be; `train` raises it for devices and directories.
    """

    def __init__(
        self,
        model: ConsynLMHeadModel | ModelSource,
        train_dataloader: Any,
        eval_dataloader: Any = None,
        output_dir: str | os.PathLike[str] = "./output",
        num_epochs: int | float | None = 3,
        max_steps: int | None = None,
        learning_rate: float = 5e-5,
        *,
        tokenizer: BPETokenizer | None = None,
        run: tuple[RunConfig, dict[str, str]] | None = None,
        notes: tuple[tuple[str, str], ...] = (),
        **settings: Any,
    ) -> None:
        self.model, self.notes = model, notes
        if run is None:
            given = {"output": os.fspath(output_dir), "epochs": num_epochs, "max_steps": max_steps, "lr": learning_rate}
            length = getattr(getattr(train_dataloader, "packed", train_dataloader), "block_size", model.config.context)
            run = resolve({"model": "haiku", "max_tokens": length, "context": model.config.context, **given, **settings}, given_as="keyword")
        self.run, self.origins = run
        self.tokenizer = tokenizer if tokenizer is not None else getattr(train_dataloader, "tokenizer", None)
        self._check_tokenizer()
        ids: Any = self.tokenizer if self.tokenizer is not None else model.config
        kinds = {
            "batch_size": self.run.budget.batch_size,
            "block_size": self.run.length,
            "seed": self.run.budget.seed,
            "bos_id": ids.bos_token_id,
            "eos_id": ids.eos_token_id,
            "pad_id": ids.pad_token_id,
        }
        self.train_source = as_source(train_dataloader, **kinds)
        self.eval_source = None if eval_dataloader is None else as_source(eval_dataloader, **kinds)
        self.total_steps = self._count_steps()
        self._check_profile()
        self.cache_refusal: str | None = None  # why compiled programs are not kept

    # ------------------------------------------------------------------------------------------------------------ what will run

    def _check_tokenizer(self) -> None:
        if self.tokenizer is not None and self.tokenizer.vocab_size > self.model.config.vocab_size:
            raise UserError(
                f"The tokenizer has {self.tokenizer.vocab_size} tokens and the model's vocabulary {self.model.config.vocab_size}, so they do not fit. "
                f"Use the tokenizer that the model was trained with."
            )

    def _check_profile(self) -> None:
        asked = parse_profile_steps(self.run.logging.profile_steps)
        if asked is not None and asked[0] > self.total_steps:
            raise UserError(f"--profile_steps {asked[0]}:{asked[1]} begins behind the end of the run, which has {self.total_steps:,} steps.")

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one optimizer step."""
        return self.run.budget.batch_size * self.run.budget.gradient_accumulation_steps

    def _count_steps(self) -> int:
        budget, length = self.run.budget, self.run.length
        if self.run.optimizer.decay_from is not None:
            return decay_end(self.run.optimizer.decay_from, self.run.optimizer.decay_ratio)
        limits = [] if budget.max_steps is None else [budget.max_steps]
        if budget.total_tokens is not None:
            limits.append(math.ceil(budget.total_tokens / (self.sequences_per_step * length)))
        if budget.epochs is not None and self.train_source.sequences is not None:
            limits.append(max(1, math.ceil(budget.epochs * self.train_source.sequences / self.sequences_per_step)))
        if not limits:
            raise UserError("Nobody knows how long an epoch of this iterable is: give max_steps or total_tokens.")
        return min(limits)

    def every(self, steps: int | None) -> int:
        """How many steps lie between two evaluations or saves for which `steps` was given; None: a tenth of the run."""
        return steps if steps is not None else max(1, self.total_steps // 10)

    def build(self, schedule: optax.Schedule | None = None) -> Built:
        """The programs of this run on the devices that are there, not compiled yet.

        Args:
            schedule: of the learning rate; None for the run's own.
        """
        if self.eval_source is None and (needs := what_needs_evaluations(self.run)):
            raise UserError(f"{needs} needs evaluations, and there is no evaluation data. Give some with --validation, or leave it out.")
        keep_freed_memory()
        self.cache_refusal = keep_programs()
        return build_program(self.model.config, self.run, schedule or self.schedule, jax.devices())

    def compile_train_step(self, run: RunConfig, schedule: optax.Schedule | None = None) -> jax.stages.Compiled:
        """The train step of `run`, which is this trainer's or differs from it in batch, memory or precision.

        Args:
            schedule: as for `build`.
        """
        program = build_program(self.model.config, run, schedule or self.schedule, jax.devices()).program
        return program.lower_train_step(run.budget.gradient_accumulation_steps, run.budget.batch_size, run.length).compile()

    @property
    def schedule(self) -> optax.Schedule:
        """The learning rate at each step of the run."""
        return configured_schedule(self.run.optimizer, self.total_steps)

    def derived(self) -> dict[str, Any]:
        """What the flags and the data come to, by the names of config.yaml."""
        return {
            "data": self.train_source.fingerprint,
            "validation": None if self.eval_source is None else self.eval_source.fingerprint,
            "tokenizer": None if self.tokenizer is None else self.tokenizer.sha256,
            "sequences_per_step": self.sequences_per_step,
            "total_steps": self.total_steps,
            "vocab_size": self.model.config.vocab_size,
        }

    def parameters(self, mesh: Mesh) -> Params:
        """The model's as they are now, on `mesh`, for the step to consume."""
        if isinstance(self.model, ModelSource):
            return self.model.make(mesh)
        # a copy: the caller's model must stay whole
        return jax.tree.map(lambda p, where: jax.device_put(jnp.copy(p), where), self.model.parameters, layout(self.model.config).shardings(mesh))

    # ------------------------------------------------------------------------------------------------------------------ running

    def train(self) -> dict[str, float]:
        """Run to the end of the budget, going on from the newest checkpoint of the run directory when there is one.

        Returns:
            The last training and evaluation metrics by their names in metrics.jsonl.

        Raises:
            UserError: devices or a directory that do not fit this run.
            Diverged: the loss is no longer finite.
            Interrupted: a signal came; the state is saved.
        """
        with explaining_exhaustion(), ExitStack() as stack:
            return Training(self, stack).run()

    def describe(self) -> None:
        """Say what `train` would do, and draw its learning rates: as text, and as schedule.png in the run directory.

        Raises:
            UserError: as `train`, before it begins.
        """
        built, path = self.build(), run_path(self.run)
        check_output(self.run, self.derived())
        with Console(quiet=False) as console:
            console.header(header(self, built))
            for sentence in warnings(self, built):
                console.warn(sentence)
        print(draw_schedule(self.schedule, self.total_steps))
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_schedule_plot(self.schedule, self.total_steps, path / "schedule.png")
        except OSError as error:
            raise UserError(f"{path / 'schedule.png'} cannot be written: {error.strerror}. Name another --output.") from error
        print(f"The learning rate by step; as a picture: {path / 'schedule.png'}.")

    def find_rate(self) -> Suggestion:
        """A range test of the learning rate from the beginning of this run: printed, and written as lr_find.json and lr_find.png into the
        run directory, which is not thereby a run.

        Raises:
            UserError: devices or a directory that do not fit, or a run that begins in the middle of another.
        """
        if self.run.optimizer.decay_from is not None:
            raise UserError("--lr_find begins where a run begins, and --decay_from in the middle of one. Leave one of them out.")
        rates, path, writes = rising_rates(self.run.optimizer.optimizer), run_path(self.run), jax.process_index() == 0
        schedule = rising_schedule(rates)
        built = self.build(schedule)
        mesh = built.program.mesh
        with explaining_exhaustion(), Console(quiet=self.run.logging.quiet or not writes, logging_steps=self.run.logging.logging_steps) as console:
            console.header(header(self, built))
            console.start(len(rates))
            run, step = fitting(self.run, partial(self.compile_train_step, schedule=schedule))
            state, budget = built.program.initial_state(self.parameters(mesh)), run.budget
            batches = self.train_source.training(0, budget.batch_size, budget.gradient_accumulation_steps, local_rows(mesh, budget.batch_size))
            tokens, began = self.sequences_per_step * run.length, time.perf_counter()
            with prefetch(batches, transform=placer(mesh, TRAIN_AXES)) as ready:
                try:
                    curve = range_test(
                        step, state, ready, rates, lambda done, loss: console.step(done, loss, done * tokens / (time.perf_counter() - began))
                    )
                finally:
                    self.train_source.close()
        suggestion = suggest(curve)
        if writes:
            try:
                write_results(path, curve, suggestion)
            except OSError as error:
                raise UserError(f"{path / 'lr_find.json'} cannot be written: {error.strerror}. Name another --output.") from error
            print(draw_curve(curve, suggestion))
            print(f"The curve is in {path}: lr_find.png, lr_find.json.")
        return suggestion

    def evaluate(self) -> dict[str, float]:
        """Metrics of the model as it is now over the evaluation data."""
        if self.eval_source is None:
            raise UserError("There is no evaluation data: pass eval_dataloader.")
        program = self.build().program
        return self.evaluation(program)(self.parameters(program.mesh))

    def evaluation(self, program: Program, tick: Callable[[], None] = lambda: None) -> Callable[[Params], dict[str, float]]:
        """Compiles `program` for evaluation: what gives the metrics of parameters over the evaluation data.

        Args:
            tick: called for every batch.
        """
        step = program.lower_eval_step(self.run.budget.batch_size, self.run.length).compile()
        return partial(self._evaluate, program, step, tick)

    def _evaluate(self, program: Program, step: Callable[..., Any], tick: Callable[[], None], params: Params) -> dict[str, float]:
        assert self.eval_source is not None

        def sums_of(batch: Any) -> Any:
            tick()
            return step(params, batch)

        rows = local_rows(program.mesh, self.run.budget.batch_size)
        batches = self.eval_source.evaluation(self.run.budget.batch_size, rows)
        with prefetch(batches, transform=placer(program.mesh, EVAL_AXES)) as ready:
            return evaluate(sums_of, ready, self.eval_source.num_bytes)
