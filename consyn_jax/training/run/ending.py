"""The end of a run: sample, report and closing lines, or the signal that interrupts it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from consyn_jax.config import DataOptions, EvaluationOptions, RunConfig
from consyn_jax.data.store.manifest import is_store
from consyn_jax.errors import Interrupted, UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.parameters import Params
from consyn_jax.model_config import ModelConfig
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.logging.formats import typed
from consyn_jax.training.logging.loss_plot import write_loss_plot
from consyn_jax.training.logging.metrics import read_metrics
from consyn_jax.training.run.beginning import from_first
from consyn_jax.training.run.directory import CONFIG, run_path, same_command
from consyn_jax.training.run.live_report import LiveReport
from consyn_jax.training.run.model_files import holds_model
from consyn_jax.training.run.model_manifest import disagreement, has_manifest
from consyn_jax.training.run.recording import Recorder

SAMPLE_TOKENS = 200
MOST_TEXTS = 4  # named in a command
TEXTS = "--data TEXT_FILE"
# Data flags that consyn-evaluate lacks, except the flags for splitting and cleaning.
NOT_OF_EVALUATE = ("prompt_key", "completion_key", "messages_key", "chat_template", "dataset_type")


def sample(config: ModelConfig, params: Params, tokenizer: BPETokenizer, seed: int) -> str:
    """Sample a document from a model.

    The first token is BOS; if documents have no BOS, it is the end-of-text token.
    """
    model = ConsynLMHeadModel.from_parameters(config, params)
    begins = (tokenizer.first_id, model.config.bos_token_id, tokenizer.eos_token_id)
    prompt = jnp.array([[next(i for i in begins if i is not None)]], jnp.int32)
    num_tokens = min(SAMPLE_TOKENS, model.config.context - 1)
    ids = model.generate(prompt, num_tokens, temperature=0.8, top_k=50, seed=seed)
    return tokenizer.decode([int(i) for i in np.asarray(ids)[0]])


def record_end(
    directory: Path, report: LiveReport, recorder: Recorder, *, draws: bool = True
) -> None:
    """Write the report and the picture, then the event `finish`, which marks the run as complete.

    Args:
        draws: Whether to write loss.png.

    Raises:
        UserError: The event cannot be written. The next start repeats this work.
    """
    best_step = recorder.progress.selection.best_step
    if recorder.log is not None and draws:
        draw_losses(directory, recorder)
    report.finish()
    recorder.event(
        "finish", ({"best_step": best_step} if best_step else {}) | recorder.sources_taken()
    )
    try:
        recorder.flush()
    except OSError as error:
        raise UserError(
            f"{directory / 'metrics.jsonl'} cannot be written: {error.strerror}. Once that is "
            "fixed, the same command continues after the last step."
        ) from error


def draw_losses(directory: Path, recorder: Recorder) -> None:
    """Write loss.png; if this fails, only warn."""
    try:
        write_loss_plot(read_metrics(directory / "metrics.jsonl"), directory / "loss.png")
    # The model and the log are complete, so a missing picture is not a failure of the run.
    except Exception as error:  # noqa: BLE001
        refused = isinstance(error, OSError) and error.strerror
        recorder.console.warn(
            f"loss.png could not be written ({refused or f'{type(error).__name__}: {error}'}); "
            "the model and metrics.jsonl are complete."
        )


def best_model(directory: Path, options: EvaluationOptions, recorder: Recorder) -> Path | None:
    """Choose the directory of the best model for final/; None to export the last model.

    If the best model was deleted, warn. All processes of a run must call this function; process 0
    reads the files.

    Raises:
        UserError: The files of the best model have changed since it was exported.
    """
    if not options.load_best_model_at_end:
        return None
    best = directory / "best"
    match from_first(lambda: _fault(best)):
        case "":
            return best
        case "missing":
            if recorder.progress.selection.best_step is not None:
                recorder.console.warn(
                    f"{best} was deleted, so final/ has the last model and not the best one."
                )
            return None
        case "unknown":
            recorder.console.warn(
                f"{best} was exported by an older version, without a manifest, so later changes "
                "to its files cannot be detected."
            )
            return best
        case reason:
            raise UserError(
                f"{best / reason}, so this model is not exported as the best one. Restore {best} "
                f"from a copy and run the same command again, or delete {best} to export the last "
                "model as final/."
            )


def _fault(best: Path) -> str:
    if has_manifest(best):
        return disagreement(best) or ""
    return "unknown" if holds_model(best) else "missing"


def closing_lines(
    directory: Path,
    run: RunConfig,
    origins: Mapping[str, str],
    recorder: Recorder,
    tokenizer: BPETokenizer | None,
) -> list[str]:
    """Sentences about the result: steps and loss, what to type next, and paths of the files.

    Args:
        run: Configuration of the run, as given by the user.
        origins: Origin of each value of `run`.
        tokenizer: Tokenizer of the exported model.
    """
    progress, selection = recorder.progress, recorder.progress.selection
    loss = recorder.last.get("train/loss", math.nan)
    lines = [
        f"{progress.step:,} steps, {progress.tokens:,} target tokens",
        f"train loss {loss:.4f} in step {progress.step:,} "
        "(the lines above show means of about 20 steps)",
    ]
    if selection.best_value is not None:
        metric = run.evaluation.metric_for_best_model.replace("/", " ")
        lines.append(
            f"best {metric} {selection.best_value:.4f} at step "
            f"{selection.best_step:,}: {directory / 'best'}"
        )
    is_chat = tokenizer is not None and tokenizer.chat_template is not None
    commands = next_commands(directory, run, origins, is_chat=is_chat)
    lines += ["Next:", *map(typed, commands)]
    if TEXTS not in commands[1] and not _held_out(run.data):
        lines.append("(Texts that were not trained on give a better evaluation.)")
    lines.append(
        f"Everything is in {directory}: final/ (the model), report.html, loss.png, metrics.jsonl."
    )
    return lines


def next_commands(
    directory: Path, run: RunConfig, origins: Mapping[str, str], *, is_chat: bool = False
) -> list[str]:
    """Commands that use the model, that evaluate it, and that train it twice as long.

    The last command is left out for runs started from Python, and for runs with --decay_from.

    Args:
        is_chat: Whether the model has a chat template, so that conversations suit it.
    """
    final = shlex.quote(str(directory / "final"))
    use = "--interactive" if is_chat else "--prompt 'Once upon a time'"
    commands = [
        f"consyn-generate {final} {use}",
        f"consyn-evaluate {final} {_texts(run.data, origins)}",
    ]
    budget = run.budget
    limits = {
        "epochs": budget.epochs,
        "max_steps": budget.max_steps,
        "total_tokens": budget.total_tokens,
    }
    longer = [f"--{name} {_number(2 * n)}" for name, n in limits.items() if n is not None]
    if "keyword" not in origins.values() and run.optimizer.decay_from is None and longer:
        recipe = shlex.quote(str(directory / CONFIG))
        # Classes named only in a file are not imported, so the flag must be typed again.
        if any(":" in name for name in run.logging.logging_backend):
            longer.append(f"--logging_backend {' '.join(run.logging.logging_backend)}")
        flags = " ".join(longer)
        commands.append(f"consyn-train --config {recipe} {flags} --overwrite_schedule")
    return commands


def _held_out(data: DataOptions) -> tuple[str, ...]:
    """Data with held-out documents: the files of `--validation`.

    Without that flag, these are the token stores in `--data`, because consyn-evaluate reads only
    the validation split of a store.
    """
    return data.validation or tuple(path for path in data.data if is_store(Path(path)))


def _texts(data: DataOptions, origins: Mapping[str, str]) -> str:
    """Flags with which consyn-evaluate reads the run's data, preferably held-out data.

    The result is a placeholder if the run was started from Python, if its data has too many files,
    or if consyn-evaluate cannot read the data.
    """
    texts, defaults = _held_out(data) or data.data, DataOptions()
    changed = [f.name for f in fields(data) if getattr(data, f.name) != getattr(defaults, f.name)]
    is_readable = not {*changed} & {*NOT_OF_EVALUATE} and data.row_format != "preference"
    if "keyword" in origins.values() or len(texts) > MOST_TEXTS or not is_readable:
        return TEXTS
    read_as = [
        f"--{name} {shlex.quote(str(getattr(data, name)))}"
        for name in ("row_format", "text_key", "document_separator")
        if name in changed
    ]
    return " ".join(["--data", *map(shlex.quote, texts), *read_as])


def _number(value: float | int) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


def interruption(
    signal: str, checkpoints: Checkpoints, recorder: Recorder, run: RunConfig
) -> Interrupted:
    """Wait until the last checkpoint is written, then record the signal that ends the run.

    Returns:
        The error to raise.
    """
    checkpoints.wait()
    recorder.event("signal", {"signal": signal, **recorder.sources_taken()})
    step, steps = recorder.progress.step, checkpoints.steps()
    directory, again = run_path(run), same_command(run.saving)
    if step in steps:
        return Interrupted(
            f"{signal} at step {step}: the state is saved in {directory}. Run {again} again to "
            "continue."
        )
    if step == 0:
        return Interrupted(
            f"{signal} before step 1: there is nothing to save yet. The same command starts anew."
        )
    newest = f"step {steps[-1]}" if steps else "the beginning"
    return Interrupted(
        f"{signal} at step {step}: the state could not be saved. {again.capitalize()} continues "
        f"from {newest}."
    )
