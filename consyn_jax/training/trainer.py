"""`ConsynTrainer`: train a model on data with given settings."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from consyn_jax.config import RunConfig
from consyn_jax.distributed.allocators import set_allocators
from consyn_jax.distributed.compiler import traced_options
from consyn_jax.errors import Diverged, Interrupted, UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.given_values import check_tokenizer
from consyn_jax.model.lora import initial_adapter
from consyn_jax.model.parameters import Params
from consyn_jax.model.pretrained.config_json import to_hf_config
from consyn_jax.model_config import NO_LORA
from consyn_jax.prepare_config import HOLD_OUT
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.accepted_data import as_source, check_held_out, check_pairs
from consyn_jax.training.diagnostics.lr_find import (
    Suggestion,
    check_beginning,
    draw_curve,
    measure_curve,
    rising_rates,
    rising_schedule,
    suggest,
    write_results,
)
from consyn_jax.training.diagnostics.profile import check_profile
from consyn_jax.training.evaluation import compile_evaluation
from consyn_jax.training.header import header, show_rates, unused_evaluations, warnings
from consyn_jax.training.inputs.batch_source import described
from consyn_jax.training.inputs.given import recognise
from consyn_jax.training.inputs.initial_model import (
    DeferredModel,
    base_of_adapter,
    base_on,
    checked,
    give_parameters,
    parameters_on,
    weights_of,
)
from consyn_jax.training.inputs.request_evaluation import read_eval_requests, requests_identity
from consyn_jax.training.logging.console import Console, show
from consyn_jax.training.logging.metrics import metrics_of
from consyn_jax.training.logging.tracking.backends import user_makers
from consyn_jax.training.logging.tracking.callbacks import checked_callbacks
from consyn_jax.training.loop import Training
from consyn_jax.training.model_tokens import document_ids, model_tokenizer
from consyn_jax.training.open_run import RunInputs, run_resources
from consyn_jax.training.optim.schedules import build_schedule, count_steps
from consyn_jax.training.preference.reference import make_ready, ready_to_evaluate
from consyn_jax.training.program import Built, Program, build_program
from consyn_jax.training.run.directory import run_path
from consyn_jax.training.run.identity import ARCHITECTURE, GENERATION
from consyn_jax.training.run.keywords import given_once, refuse_settings, resolve_keywords
from consyn_jax.training.run.model_files import AdapterOnly, ModelFiles, WholeModel
from consyn_jax.training.run.opening import check_output
from consyn_jax.training.run.recording import Lengths
from consyn_jax.training.runtime.compilation_cache import prepare_caches
from consyn_jax.training.runtime.memory import compile_to_fit, explain_out_of_memory
from consyn_jax.validation import what_needs_evaluations


class ConsynTrainer:
    """Train a model; after `train()`, the model that was passed has the trained parameters.

    Args:
        model: A `ConsynLMHeadModel`, or a `DeferredModel`.
        train_dataloader: A dataset of `get_dataset`; a `MixedDataset`; documents, each a list or
            array of token ids; rows or columns with input_ids; or an iterable of batches.
        eval_dataloader: Evaluation data of the same kinds; None for no evaluation.
        num_epochs, max_steps: Limits; the first one reached ends training. By default, 3 epochs.
        learning_rate: Peak learning rate; by default 5e-5 for adamw.
        tokenizer: Tokenizer for samples, saved with the model; optional for data of `get_dataset`.
        run: A resolved configuration and the origins of its values, as `consyn-train` makes them.
            If it is given, all arguments that are settings are ignored.
        notes: Rows of name and value for the header, which is printed at the start.
        callbacks: Objects with any of the methods of `Callback`.
        settings: Flags of `consyn-train`, by name.

    Raises:
        UserError: A setting or the data is wrong; `train` checks devices and directories.
    """

    began: float | None = None  # `time.perf_counter()` at the start; None for the time of `train`

    def __init__(
        self,
        model: ConsynLMHeadModel | DeferredModel,
        train_dataloader: Any = None,
        eval_dataloader: Any = None,
        output_dir: str | os.PathLike[str] = "./output",
        num_epochs: int | float | None = None,
        max_steps: int | None = None,
        learning_rate: float | None = None,
        *,
        tokenizer: BPETokenizer | None = None,
        run: tuple[RunConfig, dict[str, str]] | None = None,
        notes: tuple[tuple[str, str], ...] = (),
        callbacks: Sequence[Any] = (),
        **settings: Any,
    ) -> None:
        self.model, self.notes = checked(model, tokenizer), notes
        self._callbacks = checked_callbacks(callbacks)
        train_dataloader = recognise(train_dataloader, "train_dataloader")
        eval_dataloader = recognise(eval_dataloader, "eval_dataloader")
        if run is None:
            check_held_out(train_dataloader, eval_dataloader)
            own = {"epochs": num_epochs, "max_steps": max_steps, "lr": learning_rate}
            given = given_once({"output": output_dir, **own}, settings)
            run = resolve_keywords(model.config, (train_dataloader, eval_dataloader), given)
        (self.run, self.origins), made_by = run, getattr(train_dataloader, "tokenizer", None)
        self.tokenizer = tokenizer or model_tokenizer(model, made_by)
        check_tokenizer(self.tokenizer, model.config.vocab_size)
        bos_id, eos_id, pad_id = document_ids(self.tokenizer, model.config)
        check_pairs((train_dataloader, eval_dataloader), self.run.trains_on_pairs)
        source = partial(
            as_source,
            batch_size=self.run.budget.batch_size,
            block_size=self.run.length,
            seed=self.run.budget.seed,
            bos_id=bos_id,
            eos_id=eos_id,
            pad_id=pad_id,
            vocab_size=model.config.vocab_size,
        )
        self.train_source = source(train_dataloader)
        self.eval_source = None
        if eval_dataloader is not None:
            self.eval_source = source(eval_dataloader, name="eval_dataloader")
            requests = read_eval_requests(self.run.evaluation, self.tokenizer, model.config)
            self.eval_source.requests = requests
        lengths = self.run.row_length, self.train_source.sequences
        self.total_steps = count_steps(self.run.budget, self.run.optimizer, *lengths)
        check_profile(self.run.logging.profile_steps, self.total_steps)
        self._cache_rows: list[tuple[str, str]] = []  # header rows about compiled programs

    @property
    def sequences_per_step(self) -> int:
        """Number of sequences per optimizer step."""
        return self.run.budget.batch_size * self.run.budget.gradient_accumulation_steps

    @property
    def lengths(self) -> Lengths:
        """Lengths of the run, in steps and sequences."""
        return Lengths(
            self.total_steps,
            self.run.logging.logging_steps,
            self.sequences_per_step,
            self.train_source.sequences,
            self.train_source.order,
        )

    @property
    def schedule(self) -> optax.Schedule:
        """The learning-rate schedule of the run."""
        return build_schedule(self.run.optimizer, self.total_steps)

    def build(self, schedule: optax.Schedule | None = None) -> Built:
        """Build the programs of this run on the local devices, without compiling them.

        Args:
            schedule: Learning-rate schedule; by default, the schedule of the run.
        """
        if self.eval_source is None and (needs := what_needs_evaluations(self.run)):
            remedy = "Give eval_dataloader." if "keyword" in self.origins.values() else HOLD_OUT
            raise UserError(f"{needs} needs evaluations, and there is no evaluation data. {remedy}")
        set_allocators()
        self._cache_rows = prepare_caches(run_path(self.run), not self.run.saving.overwrite)
        return self._build(self.run, schedule)

    def compile_train_step(
        self, run: RunConfig, schedule: optax.Schedule | None = None
    ) -> jax.stages.Compiled:
        """Compile the train step of `run`.

        Args:
            run: This trainer's configuration, possibly with another batch, memory or precision.
            schedule: Learning-rate schedule; by default, the schedule of the run.
        """
        program = self._build(run, schedule).program
        is_traced = run.logging.profile_steps is not None
        return program.lower_train_step(
            run.budget.gradient_accumulation_steps, run.budget.batch_size, run.row_length
        ).compile(traced_options(jax.local_devices()) if is_traced else None)

    def _build(self, run: RunConfig, schedule: optax.Schedule | None) -> Built:
        return build_program(
            self.model.config,
            run.budget,
            run.hardware,
            run.optimizer,
            run.regularisation,
            lora=run.lora,
            length=run.row_length,
            schedule=schedule or self.schedule,
            devices=jax.devices(),
        )

    def derived(self) -> dict[str, Any]:
        """Values that follow from flags and data, by their names in config.yaml."""
        from_checkpoint = self.run.optimizer.decay_from is not None
        begins_here = not from_checkpoint or self.run.lora.is_used
        return ({"weights": self._weights} if begins_here else {}) | {
            "data": self.train_source.fingerprint,
            "validation": None if self.eval_source is None else self.eval_source.fingerprint,
            "requests": requests_identity(self.run.evaluation, self.eval_source),
            "tokenizer": None if self.tokenizer is None else self.tokenizer.sha256,
            "sequences_per_step": self.sequences_per_step,
            "total_steps": self.total_steps,
            "vocab_size": self.model.config.vocab_size,
            "packing": self.train_source.packing,
            ARCHITECTURE: to_hf_config(self.model.config),
            GENERATION: self.model.config.generation_config,
        }

    @cached_property
    def _weights(self) -> str | None:
        """Fingerprint of the original weights; cached, because `train` changes the weights."""
        return weights_of(self.model)

    def parameters(self, mesh: Mesh) -> Params:
        """Make the parameters to train on `mesh`: the model's parameters, or a new adapter's."""
        lora = self.run.lora
        if lora.is_used:
            return initial_adapter(self.model.config, lora, self.run.budget.seed, mesh)
        return parameters_on(self.model, mesh)

    @cached_property
    def _untrained(self) -> Params | None:
        """Base weights of an adapter run whose model is in memory; None for all other runs."""
        if not self.run.lora.is_used or isinstance(self.model, DeferredModel):
            return None
        return self.model.parameters

    def _base(self, program: Program) -> dict[str, Any]:
        return base_on(self.model, self._untrained, program.base_types, program.mesh)

    @property
    def _files(self) -> ModelFiles:
        if not self.run.lora.is_used:
            return WholeModel()
        dtype = self.run.saving.save_dtype or "float32"
        return AdapterOnly(self.run.lora, base_of_adapter(self.model), dtype)

    def _header(self, built: Built) -> list[tuple[str, str]]:
        notes = (*self.notes, *described(data=self.train_source, evaluation=self.eval_source))
        return header(self.run, built, self.lengths, notes, self._cache_rows)

    def run_inputs(self) -> RunInputs:
        """All inputs of the run."""
        began = time.perf_counter() if self.began is None else self.began
        built, lengths = self.build(), self.lengths
        asked = self.run, self.origins, self._callbacks
        unused = unused_evaluations(self.eval_source is not None, *asked)
        return RunInputs(
            run=self.run,
            origins=self.origins,
            derived=self.derived(),
            lengths=lengths,
            program=built.program,
            tokenizer=self.tokenizer,
            train_source=self.train_source,
            eval_source=self.eval_source,
            header=self._header(built),
            warnings=[*warnings(self.run, built, lengths), *unused],
            make_parameters=self.parameters,
            make_base=partial(self._base, built.program),
            files=self._files,
            compile_train_step=self.compile_train_step,
            began=began,
        )

    # -------------------------------------------------------------------------------------- running

    def train(self, **unknown: Any) -> dict[str, float | int]:
        """Train to the end of the budget, from the newest checkpoint if there is one.

        Afterwards, even if the run diverged or was stopped, the model has the newest parameters, in
        its previous dtype and on its previous devices. The checkpoints have them in float32.

        Args:
            unknown: Not allowed; settings are keywords of `ConsynTrainer`.

        Returns:
            The last training and evaluation metrics, under their names in metrics.jsonl.

        Raises:
            UserError: The devices or the directory do not fit this run.
            Diverged: Loss or gradients were non-finite in too many steps.
            Interrupted: A signal ended the run; the state is saved.
        """
        refuse_settings(unknown)
        makers = user_makers(self.run.logging, self.origins, self._callbacks)
        training: Training | None = None
        try:
            with explain_out_of_memory(), run_resources(self.run) as stack:
                training = Training(replace(self.run_inputs(), callbacks=makers), stack)
                outcome = training.run()
        except (Diverged, Interrupted, UserError, KeyboardInterrupt):
            if training is not None and isinstance(self.model, ConsynLMHeadModel):
                self._take_over(training.newest_params())
            raise
        self.run, params = outcome.run, outcome.params
        if params is None and isinstance(self.model, ConsynLMHeadModel):  # already complete
            params = self._files.load(run_path(self.run) / "final", self.model.config, None)
        self._take_over(params)
        return outcome.metrics

    def _take_over(self, params: Params | None) -> None:
        """Give the model the trained parameters."""
        if params is not None:
            self.model = give_parameters(self.model, params, self.run.lora, self._untrained)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of the run's `metrics.jsonl` so far, including those of earlier starts.

        Events have a key "event". The list is empty on hosts that do not write the log.

        Raises:
            UserError: The file is damaged.
        """
        return metrics_of(run_path(self.run))

    def describe(self) -> None:
        """Print what `train` would do, and draw the learning rates.

        The learning rates are drawn as text, and as schedule.png in the run directory.

        Raises:
            UserError: As for `train`.
        """
        built, path = self.build(), run_path(self.run)
        check_output(self.run, self.derived())
        with Console(quiet=False) as console:
            console.header(self._header(built))
            for sentence in warnings(self.run, built, self.lengths):
                console.warn(sentence)
        show_rates(self.schedule, self.total_steps, path)

    def find_rate(self) -> Suggestion:
        """Run a learning-rate range test from this run's initial state, and suggest a rate.

        The result is printed, and written to lr_find.json and lr_find.png in the run directory. The
        directory can still be used for a new run.

        Raises:
            UserError: The devices or the directory do not fit this run, or --decay_from is given.
        """
        check_beginning(self.run.optimizer)
        rates, path = rising_rates(self.run.optimizer.optimizer), run_path(self.run)
        writes, options = jax.process_index() == 0, self.run.logging
        built = self.build(schedule := rising_schedule(rates))
        quiet = options.quiet or not writes
        with (
            explain_out_of_memory(),
            Console(quiet=quiet, logging_steps=options.logging_steps) as console,
        ):
            console.header(self._header(built))
            console.start(len(rates))
            compile_step = partial(self.compile_train_step, schedule=schedule)
            run, train_step = compile_to_fit(self.run, compile_step)
            mesh, budget = built.program.mesh, run.budget
            state = built.program.initial_state(self.parameters(mesh))
            shape = (budget.gradient_accumulation_steps, budget.batch_size, run.row_length)
            base = self._base(built.program)
            make_ready(self.run_inputs(), run, path, state.params, base, splits=["train"])
            curve = measure_curve(
                lambda state, batch: train_step(state, batch | base),
                *(state, self.train_source, shape, mesh, rates, console.step),
            )
        suggestion = suggest(curve)
        if writes:
            write_results(path, curve, suggestion)
            text = draw_curve(curve, suggestion)
            show(f"{text}\nThe curve is in {path}: lr_find.png, lr_find.json.")
        return suggestion

    def evaluate(self) -> dict[str, float]:
        """Compute the metrics of the model, as it is now, over the evaluation data."""
        if self.eval_source is None:
            raise UserError("There is no evaluation data: pass eval_dataloader.")
        ready_to_evaluate(self.run_inputs(), run_path(self.run))
        program = self._build(replace(self.run, lora=NO_LORA), None).program
        batch_size, length = self.run.budget.batch_size, self.run.row_length
        evaluation = compile_evaluation(program, self.eval_source, batch_size, length)
        return evaluation(parameters_on(self.model, program.mesh))
