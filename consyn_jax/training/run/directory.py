"""A run directory: names of its files, its owner, its config.yaml, and its deletion."""

from __future__ import annotations

import hashlib
import os
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from consyn_jax.config import RunConfig
from consyn_jax.config_file import DERIVED, describe
from consyn_jax.errors import CONTINUES, UserError, remedy
from consyn_jax.files import irregular, remove, write_whole
from consyn_jax.flags import flags, with_flags
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.tokenization.tokenizer_files import holds_tokenizer
from consyn_jax.training.checkpointing.checkpoint_files import PROVENANCE
from consyn_jax.training.checkpointing.ownership import RUN_JSON, RunRecord, short
from consyn_jax.training.run.lock import LOCK, RunLock

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
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
# Flags of one start of the command; config.yaml has their defaults. If a recipe kept --overwrite,
# it would delete the run that it came from.
PER_START_FLAGS = (
    "overwrite",
    "overwrite_schedule",
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
    """The run directory: --output, or with --decay_from a directory beside it."""
    output, step = Path(config.saving.output), config.optimizer.decay_from
    return output if step is None else output.with_name(f"{output.name}-decay-{step}")


@dataclass
class RunDirectory:
    """A directory that only this run's processes may write to until it is closed.

    Attributes:
        holds_run: whether it holds an earlier start of the same run, which this one resumes.
        record: the identity of the run and of this start.
        lock: held by the process that writes.
        is_adopted: whether the run had no identity, as an older version began it.
        config: the content of config.yaml, once it and run.json are written.
        tokenizer: the content of tokenizer/, once it is written.
        lost: the reason why this process may no longer write here; None if it may.
        place: the directory, kept open by the process that writes, to notice if another takes its
            name.
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
    _guard: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def checkpoints(self) -> Path:
        """The directory of checkpoints."""
        return self.path / CHECKPOINTS

    def write_config(
        self, config: RunConfig, origins: dict[str, str], derived: dict[str, Any]
    ) -> None:
        """Write config.yaml and run.json. `consyn-train --config` reads config.yaml back.

        config.yaml has every value with its origin. Both are on the disk when this returns.

        Raises:
            UserError: the files cannot be written, or another process has taken the directory.
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
        """SHA-256 of config.yaml as it was written."""
        return hashlib.sha256(self.config.encode()).hexdigest()

    def write_provenance(self, text: str) -> None:
        """Write provenance.json.

        Raises:
            UserError: the file cannot be written.
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
        """Write tokenizer/.

        Raises:
            UserError: the files cannot be written.
        """
        try:
            tokenizer.save(self.path / TOKENIZER)
        except OSError as error:
            raise UserError(
                f"{self.path / TOKENIZER} cannot be written: {error.strerror}. {remedy(error)}, or "
                "name another --output."
            ) from error
        self.tokenizer = tokenizer  # set last, as the heartbeat may call `check` meanwhile

    def check(self) -> None:
        """Check before a write that the directory still belongs to this run; from any thread.

        Restore the lock, config.yaml, run.json or tokenizer/ if only they were deleted, as the run
        could not be resumed or read without them.

        Raises:
            UserError: the directory was deleted, moved or replaced, or another process has taken
                it. From then on every check raises.
        """
        with self._guard:
            if self.lost is None and self.lock is not None:
                try:
                    self._check(self.lock)
                except UserError as error:
                    self.lost = error
        self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """Raise the error that an earlier check has found.

        Raises:
            UserError: this process may no longer write to the directory.
        """
        if self.lost is not None:
            raise self.lost

    def _check(self, lock: RunLock) -> None:
        has_lock = not lock.is_lost
        if not has_lock and (not self.config or not (self.path / CONFIG).is_file()):
            raise UserError(
                f"--output {self.path} was deleted or moved while the run wrote to it, so the "
                "run ends here. Run the same command again to start anew, or move the "
                "directory back first: the run then continues from its last checkpoint, if it has "
                "one."
            )
        if not self.config:
            return
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
        if not (self.path / CONFIG).is_file():
            self._write(CONFIG, self.config)
        if self.tokenizer is not None and not holds_tokenizer(self.path / TOKENIZER):
            self.write_tokenizer(self.tokenizer)

    def _check_place(self) -> None:
        try:
            is_other = self.place is not None and not os.path.samestat(
                self.path.stat(), os.fstat(self.place)
            )
        except OSError:  # it is gone, which the lock shows, or does not answer
            return
        if is_other:
            # It may have taken the place of the run's own since the record was compared.
            if (found := RunRecord.read(self.path)) is not None:
                self._check_record(found, has_lock=True)  # which names the other run
            raise UserError(
                f"--output {self.path} is not the directory that the run began in, so "
                "the run ends here. Move that one back, and run the same command again."
            )
        if self.checkpoints.is_symlink():
            raise UserError(
                f"{self.checkpoints} has become a link, which is not followed, so the run ends "
                "here. Put the directory back, and run the same command again."
            )

    def _check_record(self, found: RunRecord | None, has_lock: bool) -> None:
        own = self.record
        if found == own:
            return
        if found is None and has_lock:
            self._write(RUN_JSON, None)
            return
        if found is not None and found.run == own.run:
            what = "was started again by another process, which has the directory now"
        else:
            theirs = "none" if found is None else short(found.run)
            what = (
                f"holds another run now (its identity is {theirs}, and that of this run is "
                f"{short(own.run)})"
            )
        raise UserError(
            f"--output {self.path} {what}, so this run ends here and has written nothing to it "
            "since. Start it again with another --output."
        )

    def close(self) -> None:
        """Let other processes write to the directory."""
        if self.lock is not None and self.lost is None:
            self.lock.release()
        if self.place is not None:
            os.close(self.place)
            self.place = None

    def beat(self) -> None:
        """Show that this process is alive, and check the directory; call it every few seconds.

        `raise_if_lost` raises the error that is found.
        """
        if self.lock is not None:
            # The next write reports a disk that does not answer.
            with suppress(UserError, OSError):
                self.check()
            self.lock.beat()


def refuse_links(path: Path) -> None:
    """Refuse a run directory that holds anything but files and directories.

    A link would redirect the run's writes to another place.

    Raises:
        UserError: there is a link, a pipe or a device; the message names it.
    """
    for name in (LOCK, *ENTRIES):
        # Weights & Biases creates links there.
        if found := irregular(path / name, inside=name != "wandb"):
            raise UserError(
                f"{found[0]} is {found[1]}, and a run writes only to files of its own. Remove it, "
                "or name another --output."
            )


def delete_run(path: Path) -> None:
    """Delete only the files that a run has written to its directory."""
    if not (path / CONFIG).is_file():
        return
    # Delete config.yaml last: after a kill it still marks the rest as a run.
    for entry in reversed(ENTRIES):
        remove(path / entry)
