"""`consyn-train`: train a decoder language model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from consyn_jax.cli import arguments
from consyn_jax.cli.arguments import build_parser, read
from consyn_jax.cli.choices.backend_choice import check_backends
from consyn_jax.cli.choices.model_choice import check_start, choose_model
from consyn_jax.cli.choices.prepared_run import prepared_run
from consyn_jax.cli.exit_codes import exit_code
from consyn_jax.cli.proof.questions import asked
from consyn_jax.cli.text_encoding import start_in_utf8
from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError
from consyn_jax.resolve import resolve

if TYPE_CHECKING:
    from consyn_jax.training.trainer import ConsynTrainer

DESCRIPTION = """\
Train a decoder language model on text; transformers can load the result.
Without flags: the 124 M parameter model on text that comes with Python."""
USAGE = "[--config FILE] [--model NAME] [--data PATH] [FLAG ...]"
MODES = arguments.MODES | {
    "dry_run": "print the settings, memory and time of the run, plot the learning rate, and stop",
    "lr_find": "train for 200 steps at rising learning rates, suggest a learning rate, and stop",
}
COMMON = (  # the flags of a short --help
    "model",
    "checkpoint",
    "data",
    "validation",
    "tokenizer",
    "max_tokens",
    "epochs",
    "max_steps",
    "batch_size",
    "lr",
    "lora_rank",
    "eval_steps",
    "output",
    "config",
    "dry_run",
)
EPILOG = """\
examples:
  consyn-train --model haiku --tokenizer train:4096 --max_steps 300
  consyn-train --model verse --data corpus/ --batch_size 16 --output runs/verse
  consyn-train --config runs/verse/config.yaml --lr 3e-4 --output runs/other

Defaults are in brackets. If a flag is given twice, the last one counts. A flag
that takes several values gets all values that are given.
To continue a stopped run, run the same command again without --overwrite.
Exit codes: 0 done, 2 wrong input, 3 diverged, 4 differs from a run's record,
75 interrupted and saved, 76 another process died, hangs or did not start,
130 and 143 interrupted with nothing to save."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if argv is None:
        start_in_utf8()
    return exit_code("consyn-train", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> None:
    """Run the command line: train, or one of the other modes."""
    began = time.perf_counter()
    config, origins, mode = read_arguments(argv)
    if mode == "print_config":
        from consyn_jax.config_file import describe

        print(describe(config, origins), end="")
    elif config.saving.replay is not None:
        from consyn_jax.cli.proof.repeat_step import replay

        replay(config, origins)
    elif (question := asked(config, mode)) is not None:
        _answer(question, config, origins)
    elif config.hardware.topology is not None or config.hardware.fit is not None:
        _plan(config, origins, mode)
    else:
        from consyn_jax.distributed.allocators import set_allocators
        from consyn_jax.distributed.heartbeat import heartbeat

        set_allocators()
        check_backends(config, origins)
        with heartbeat(), _runtime(config, mode):
            train(config, origins, ACTIONS[mode], began=began)


def read_arguments(argv: Sequence[str]) -> tuple[RunConfig, dict[str, str], str]:
    """Parse a command line into the run, the origins of its values, and one of `MODES` or "".

    Raises:
        UserError: an unknown flag, an invalid value, or an unreadable `--config` file.
    """
    parser = build_parser("consyn-train", DESCRIPTION, USAGE, EPILOG, RunConfig, COMMON)
    return read(parser, argv, resolve, MODES)


def _answer(question: str, config: RunConfig, origins: dict[str, str]) -> None:
    """Run the inspection that the flag `question` names, without changing the run's directory."""
    if question == "verify":
        from consyn_jax.cli.proof.verify_record import verify

        verify(config)
    elif question == "documents_of":
        from consyn_jax.cli.proof.documents_page import list_documents

        list_documents(config)
    else:
        from consyn_jax.cli.proof.repeat_logged import replay, settings_of_run

        run, found, place = settings_of_run(config, origins)
        train(run, found, lambda trainer: replay(trainer, place), writes=False)


def _plan(config: RunConfig, origins: dict[str, str], mode: str) -> None:
    """Plan a run for the devices that `--topology` describes; none of them need be present."""
    if mode != "dry_run":
        flag = "--topology" if config.hardware.topology else "--fit"
        raise UserError(f"{flag} needs --dry_run. Add --dry_run, or leave {flag} out.")
    from consyn_jax.cli.dry_run import plan

    check_start(config, is_planned=True)
    plan(config, origins, choose_model(config.model))


def _runtime(config: RunConfig, mode: str) -> AbstractContextManager[Any]:
    """Connect all processes of a run with `--distributed` before slow work begins."""
    if not config.hardware.distributed or mode == "dry_run":
        return nullcontext()
    if mode:
        raise UserError(f"--{mode} runs in one process. Leave --distributed out.")
    from consyn_jax.distributed.launch import runtime

    return runtime(config)


def _dry_run(trainer: ConsynTrainer) -> None:
    from consyn_jax.cli.dry_run import describe

    describe(trainer)


ACTIONS: dict[str, Callable[[ConsynTrainer], object]] = {
    "": lambda trainer: trainer.train(),
    "dry_run": _dry_run,
    "lr_find": lambda trainer: trainer.find_rate(),
}


def train(
    config: RunConfig,
    origins: dict[str, str],
    action: Callable[[ConsynTrainer], object],
    *,
    writes: bool = True,
    began: float | None = None,
) -> None:
    """Check all input before slow work, prepare data and model, and run `action`.

    Args:
        action: called with the trainer; it trains, or does the work of one of `MODES`.
        writes: whether `action` writes to the run directory; no other process may then use the
            directory.
        began: `time.perf_counter()` at the beginning of the command.
    """
    check = _check_directory if writes else lambda _: None
    with prepared_run((config, origins), check) as prepared:
        from consyn_jax.training.trainer import ConsynTrainer

        trainer = ConsynTrainer(**prepared.trainer_inputs(prepared.settings))
        trainer.began = began
        action(trainer)


def _check_directory(config: RunConfig) -> None:
    """Check that the run may use its directory, and that no other process uses it."""
    from consyn_jax.distributed.process_group import is_first
    from consyn_jax.training.mirror.remote_run import check_remote
    from consyn_jax.training.run.directory import run_path
    from consyn_jax.training.run.lock import check_free
    from consyn_jax.training.run.opening import check_output

    if is_first():
        check_output(config)
        check_free(run_path(config))
        check_remote(config)


if __name__ == "__main__":
    sys.exit(main())
