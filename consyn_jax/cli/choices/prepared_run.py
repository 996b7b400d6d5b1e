"""Check all input of a run before slow work, then prepare its data and model for the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from consyn_jax.cli.choices.fine_tuning import Settings, shortest
from consyn_jax.cli.choices.machine_fit import check_machine
from consyn_jax.cli.choices.model_choice import (
    ModelChoice,
    check_start,
    choose_model,
    context_of,
    deferred_model,
    file_notes,
    weights_note,
    with_sequence_length,
)
from consyn_jax.cli.choices.tokenizer_choice import (
    check_own_tokenizer,
    check_store,
    choose_tokenizer,
    own_tokenizer,
    tokenizer_notes,
    with_tokens,
)
from consyn_jax.cli.choices.training_data import TrainingData, check_data, training_data
from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError, brief

if TYPE_CHECKING:
    from consyn_jax.tokenization import BPETokenizer


@dataclass(frozen=True)
class PreparedRun:
    """Data, tokenizer and architecture of a run.

    Attributes:
        choice: architectures and weights of the run.
        data: datasets, and lines about them for the header that the run prints.
        exported: tokenizer to write into the directory of each exported model.
    """

    choice: ModelChoice
    data: TrainingData
    exported: BPETokenizer

    @property
    def settings(self) -> Settings:
        """The configuration, with values chosen from the data, and the origin of each value."""
        return self.data.settings

    def trainer_inputs(self, settings: Settings) -> dict[str, Any]:
        """Keyword arguments for `ConsynTrainer`.

        Args:
            settings: the settings of this run, or of another run with the same data.
        """
        config, origins = settings
        choice, made_by, training = self.choice, self.data.tokenizer, self.data.training
        if (seed := config.budget.seed) != self.settings[0].budget.seed:
            training = training.with_seed(seed)
        return {
            "model": deferred_model(
                config, choice, made_by.vocab_size, lambda c: with_tokens(c, choice, made_by)
            ),
            "train_dataloader": training,
            "eval_dataloader": self.data.validation,
            "tokenizer": self.exported,
            "run": settings,
            "notes": (
                weights_note(config.model, origins["checkpoint"], config.budget.seed),
                *file_notes(config, origins),
                *self.data.notes,
                *tokenizer_notes(choice, made_by),
            ),
        }


@contextmanager
def prepared_run(
    settings: Settings, check_directory: Callable[[RunConfig], None], *, is_study: bool = False
) -> Iterator[PreparedRun]:
    """Check all input, then prepare the data for use in a `with` block.

    If the data is streamed, streaming stops at the end of the block.

    Args:
        check_directory: function that checks `--output`; called after the checks of the flags and
            before the checks of the data.
        is_study: whether the run is the first trial of a study. Its mesh and batch are then not
            checked, because other trials may fit the devices.
    """
    config, origins = settings
    choice = choose_model(config.model)
    check_start(config)
    check_own_tokenizer(config, choice)
    config = with_sequence_length(config, choice.base, from_rows=True)
    check_directory(config)
    is_store = check_data(config.data)
    tokenizer = choose_tokenizer(config, choice, is_store)
    context = context_of(config, choice.base)
    check_machine(*shortest((config, origins), context), choice, tokenizer)
    if not is_study:
        _check_devices(config)
    with training_data((config, origins), tokenizer, context) as data:
        made_by = data.tokenizer
        check_store(made_by, choice, config)
        own = own_tokenizer(choice)
        if own is not None and made_by.chat_template is not None:
            own = own.with_chat_template(made_by.chat_template)
        check_machine(*data.settings, choice, made_by)
        # Export the checkpoint's own files unchanged, with the chat template.
        exported = own if own is not None and own.sha256 == made_by.sha256 else made_by
        yield PreparedRun(choice, data, exported)


def _check_devices(config: RunConfig) -> None:
    """Check that the mesh fits the devices and divides the batch.

    `choose_run_mesh` checks the split of a sequence over devices later, when the model is known.
    """
    import jax

    from consyn_jax.distributed.mesh import check_batch, parse_mesh

    try:
        num_devices = jax.device_count()
    except RuntimeError as error:
        raise UserError(
            f"JAX finds no device to train on ({brief(error)}). Check JAX_PLATFORMS and the driver."
        ) from error
    mesh, batch_size = config.hardware.mesh, config.budget.batch_size
    if mesh == "auto":
        if batch_size < num_devices and not config.hardware.auto_batch:
            return
        mesh = f"fsdp={num_devices}"
    # A length that is chosen from the rows is a multiple of 128, or the model's context.
    length = config.data.max_tokens or 128
    check_batch(parse_mesh(mesh, num_devices), batch_size, length)
