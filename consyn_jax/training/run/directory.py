"""The run directory: names of files, owner, config.yaml, and deletion."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from consyn_jax.config import RunConfig, SavingOptions
from consyn_jax.config_file import DERIVED, describe
from consyn_jax.errors import CONTINUES, UserError, remedy
from consyn_jax.files import irregular, remove, write_whole
from consyn_jax.flags import flags, with_flags
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.tokenization.tokenizer_files import holds_tokenizer
from consyn_jax.training.checkpointing.checkpoint_files import PROVENANCE
from consyn_jax.training.checkpointing.ownership import RUN_JSON, RunRecord, short
from consyn_jax.training.run.lock import LOCK, RunLock

CHECK_S = 1.0
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
STUDY_RECORD = "study/study.json"  # in the directory of a study of consyn-tune
TRIAL_RECORD = "trial.json"  # in the directory of a trial: its study, and its values
RUNGS, LADDER_RECORD = "sizes", "ladder.json"  # in the directory of a ladder of consyn-tune
ENTRIES = (
    CONFIG,
    RUN_JSON,
    PROVENANCE,
    "kernels.json",
    "metrics.jsonl",
    TOKENIZER,
    CHECKPOINTS,
    "reference.safetensors",
    "best",
    "final",
    "logs",
    "profile",
    "report.html",
    "samples.jsonl",
    "loss.png",
    "schedule.png",
    "stacks",
    "nonfinite",
    "wandb",
)
# Flags that apply to one start only; config.yaml records their defaults. If it recorded
# --overwrite, `consyn-train --config` with this file would delete the run.
PER_START_FLAGS = (
    "overwrite",
    "overwrite_schedule",
    "remote",
    "resume",
    "replay",
    "verify",
    "replay_step",
    "documents_of",
    "json",
    "distributed",
    "coordinator_address",
    "num_processes",
    "process_id",
    "rendezvous_seconds",
)


def run_path(config: RunConfig) -> Path:
    """The run directory: --output, or with --decay_from a directory next to --output."""
    output, step = Path(config.saving.output), config.optimizer.decay_from
    return output if step is None else output.with_name(f"{output.name}-decay-{step}")


def same_command(options: SavingOptions) -> str:
    """Describe the command that continues the run.

    The command is the same, with two exceptions. --overwrite is left out, because it would delete
    the saved state. --resume STEP becomes --resume auto, because it would go back to that step.
    """
    if options.overwrite:
        return "the same command without --overwrite"
    return "the same command" if options.resume == "auto" else "the same command with --resume auto"


def found_study(path: Path) -> str | None:
    """Name the study or ladder of `consyn-tune` in a directory; None if there is none."""
    if (path / STUDY_RECORD).exists():
        return "a study of consyn-tune"
    if (path / LADDER_RECORD).exists() or any(path.glob(f"{RUNGS}/[0-9]*/{CONFIG}")):
        return "a ladder of consyn-tune"
    return None


@dataclass
class RunDirectory:
    """A directory to which only the processes of one run may write, until it is closed.

    Attributes:
        holds_run: Whether an earlier start of this run wrote to the directory, so that the run is
            resumed.
        record: Identity of the run and of this start.
        lock: The lock on the directory; None in processes that do not write.
        is_adopted: Whether the run had no identity, because an older version of this package
            started it.
        config: Content of config.yaml; empty until config.yaml and run.json are written.
        tokenizer: Content of tokenizer/; None until it is written.
        lost: Error that says why this process may no longer write to the directory; None if it may.
        place: File descriptor of the directory, to detect that another directory has taken its
            path; None in processes that do not write.
    """

    path: Path
    holds_run: bool
    record: RunRecord
    lock: RunLock | None = None
    is_adopted: bool = False
    config: str = ""
    tokenizer: BPETokenizer | None = None
    lost: UserError | None = None
    place: int | None = None
    # The heartbeat and the commit of a checkpoint call `check` from their own threads.
    _checked: float = -math.inf  # time of the last full check before a line of the log
    _guard: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @functools.cached_property
    def _root(self) -> str:
        return str(self.path)

    def _file(self, name: str) -> str:
        # Files are checked before each line of the log; a `Path` would take longer than the check.
        return f"{self._root}/{name}"

    @property
    def checkpoints(self) -> Path:
        """The directory of checkpoints."""
        return self.path / CHECKPOINTS

    def write_config(
        self, config: RunConfig, origins: dict[str, str], derived: dict[str, Any]
    ) -> None:
        """Write config.yaml and run.json, and flush them to the disk.

        config.yaml has every value with its origin; `consyn-train --config` can read it.

        Raises:
            UserError: A file cannot be written, or another process has taken the directory.
        """
        self.check()
        defaults = {name: flags(RunConfig)[name].default for name in PER_START_FLAGS}
        lasting = describe(
            with_flags(config, defaults), origins | dict.fromkeys(defaults, "default")
        )
        text = lasting + yaml.safe_dump({DERIVED: derived}, sort_keys=True)
        self._write(CONFIG, text)
        self._write(RUN_JSON, None)
        self.config = text

    @property
    def config_digest(self) -> str:
        """SHA-256 of the config.yaml that this process has written."""
        return hashlib.sha256(self.config.encode()).hexdigest()

    def write_provenance(self, text: str) -> None:
        """Write provenance.json.

        Raises:
            UserError: The file cannot be written.
        """
        self._write(PROVENANCE, text)

    def _write(self, name: str, text: str | None) -> None:
        try:
            if text is None:
                self.record.write(self.path)
            else:
                write_whole(self.path / name, text)
        except OSError as error:
            raise UserError(
                f"{self.path / name} cannot be written: {error.strerror}. {remedy(error)}, or "
                "name another --output."
            ) from error

    def write_tokenizer(self, tokenizer: BPETokenizer) -> None:
        """Write the tokenizer to tokenizer/.

        Raises:
            UserError: A file cannot be written.
        """
        try:
            tokenizer.save(self.path / TOKENIZER)
        except OSError as error:
            raise UserError(
                f"{self.path / TOKENIZER} cannot be written: {error.strerror}. {remedy(error)}, or "
                "name another --output."
            ) from error
        self.tokenizer = tokenizer  # set last: the heartbeat may call `check` at any time

    def check_for_line(self) -> None:
        """Check that this process still has its lock, before it writes a line of the log.

        The lock is enough, because another process can take the directory only after the lock was
        deleted. `check` is called if the lock is lost, and otherwise once a second. If it were
        called for every line, it would take a quarter of the time that recording a step takes.

        Raises:
            UserError: This process may no longer write to the directory.
        """
        is_old = time.monotonic() - self._checked >= CHECK_S
        if self.lock is not None and (is_old or self.lock.is_lost):
            self._checked = time.monotonic()
            self.check()
        self.raise_if_lost()

    def check(self) -> None:
        """Check before a write that the directory still belongs to this run; thread-safe.

        If only the lock, config.yaml, run.json or tokenizer/ were deleted, they are written again,
        because without them the run could not be resumed or read.

        Raises:
            UserError: The directory was deleted, moved or replaced, or another process has taken
                it. All later checks then raise the same error.
        """
        with self._guard:
            if self.lost is None and self.lock is not None:
                try:
                    self._check(self.lock)
                except UserError as error:
                    self.lost = error
        self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """Raise the error that an earlier check has found, if any.

        Raises:
            UserError: This process may no longer write to the directory.
        """
        if self.lost is not None:
            raise self.lost

    def _check(self, lock: RunLock) -> None:
        has_lock = not lock.is_lost
        if not has_lock and (not self.config or not (self.path / CONFIG).is_file()):
            raise UserError(
                f"--output {self.path} was deleted or moved while the run wrote to it, so the "
                "run ends here. Run the same command again to start anew; to continue from the "
                "last checkpoint, move the directory back first."
            )
        if not self.config:
            return
        if not self._holds_own_record():
            self._check_record(RunRecord.read(self.path), has_lock)
        self._check_place()
        if not has_lock:
            try:
                lock.renew()
            except OSError as error:
                raise UserError(
                    f"--output {self.path} cannot be written: {error.strerror}. Once that is "
                    f"fixed, the same command {CONTINUES}."
                ) from error
            # Another start may have come and gone before this process took the lock again.
            self._check_record(RunRecord.read(self.path), has_lock)
        if not os.path.isfile(self._file(CONFIG)):  # noqa: PTH113
            self._write(CONFIG, self.config)
        if self.tokenizer is not None and not holds_tokenizer(self.path / TOKENIZER):
            self.write_tokenizer(self.tokenizer)

    def _check_place(self) -> None:
        try:
            is_other = self.place is not None and not os.path.samestat(
                os.stat(self._root),  # noqa: PTH116
                os.fstat(self.place),
            )
        except OSError:  # the check of the lock has already reported a missing directory
            return
        if is_other:
            # The other directory may have been moved here after the record was compared.
            if (found := RunRecord.read(self.path)) is not None:
                self._check_record(found, has_lock=True)  # its error names the other run
            raise UserError(
                f"--output {self.path} is not the directory in which the run began, so "
                "the run ends here. Move the original directory back, and run the same command "
                "again."
            )
        if os.path.islink(self._file(CHECKPOINTS)):  # noqa: PTH114
            raise UserError(
                f"{self.checkpoints} has become a link, which is not followed, so the run ends "
                "here. Put the directory back, and run the same command again."
            )

    def _holds_own_record(self) -> bool:
        try:
            return self.record.is_in(self._file(RUN_JSON))
        except OSError:  # `RunRecord.read` reports the error
            return False

    def _check_record(self, found: RunRecord | None, has_lock: bool) -> None:
        own = self.record
        if found == own:
            return
        if found is None and has_lock:
            self._write(RUN_JSON, None)
            return
        if found is not None and found.run == own.run:
            what = "is now used by another process, which has started the run again"
        else:
            theirs = "none" if found is None else short(found.run)
            what = (
                f"now has another run (with identity {theirs}; this run has identity "
                f"{short(own.run)})"
            )
        raise UserError(
            f"--output {self.path} {what}, so this run ends here and no longer writes to the "
            "directory. Start this run again with another --output."
        )

    def close(self) -> None:
        """Release the directory, so that other processes may write to it."""
        if self.lock is not None and self.lost is None:
            self.lock.release()
        if self.place is not None:
            os.close(self.place)
            self.place = None

    def beat(self) -> None:
        """Update this process's heartbeat, and check the directory; call this every few seconds.

        If the check finds an error, `raise_if_lost` raises it.
        """
        if self.lock is not None:
            # The next write reports a disk that does not answer.
            with suppress(UserError, OSError):
                self.check()
            self.lock.beat()


def refuse_links(path: Path) -> None:
    """Check that the entries of a run in its directory are regular files and directories.

    A link would redirect the run's writes to another place. The inside of wandb/ is not checked,
    because Weights & Biases creates links there.

    Raises:
        UserError: There is a link, a pipe or a device; the message names it.
    """
    for name in (LOCK, *ENTRIES):
        if found := irregular(path / name, inside=name != "wandb"):
            raise UserError(
                f"{found[0]} is {found[1]}, but a run writes only to regular files of its own. "
                "Remove it, or name another --output."
            )


def delete_run(path: Path) -> None:
    """Delete only the files that a run has written to its directory."""
    if not (path / CONFIG).is_file():
        return
    # Delete config.yaml last, so that after a kill it still marks the remaining files as a run.
    for entry in reversed(ENTRIES):
        remove(path / entry)
