"""A thread that copies a run directory to a bucket during the run.

The thread only reads the directory, and training never waits for it. When a checkpoint has its
final name, the thread uploads the log, the models and the checkpoint, and then writes a marker. So
a marked checkpoint in the bucket always comes with its log and its best model.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from io import BufferedIOBase
from pathlib import Path

from consyn_jax.config import SavingOptions
from consyn_jax.errors import Interrupted, UserError, settled
from consyn_jax.files import open_regular
from consyn_jax.remote.bucket import BucketError
from consyn_jax.training.checkpointing.checkpoint_files import CHECKSUMS, saved_steps
from consyn_jax.training.checkpointing.commit import kept_steps
from consyn_jax.training.checkpointing.orbax_writes import lower_priority
from consyn_jax.training.checkpointing.ownership import RUN_JSON, RunRecord
from consyn_jax.training.mirror.remote_run import DIGEST, MARKERS, MODELS, RemoteRun
from consyn_jax.training.mirror.uploaded_files import as_it_is, files_of
from consyn_jax.training.run.directory import CHECKPOINTS, ENTRIES, RunDirectory, same_command
from consyn_jax.training.run.model_manifest import MANIFEST

LOOK_S = 1.0  # between checks for a new checkpoint
FILES_S = 60.0  # between uploads of a file that grows, such as the log
LONGEST_PAUSE_S = 60.0  # limit of the pause after a failure, which doubles with each failure
# At its end, a run waits for uploads as long as they make progress. It gives up after this time
# without progress, which is enough for a server to restart. The next start here uploads the rest.
EXIT_S = 120.0
ABANDON_S = 5.0  # the longest wait for a thread that is told to end
# After the end of the run, only this many attempts to upload an object count as progress. If all
# attempts counted, a server that takes bytes and then fails could prolong the wait for ever.
COUNTED_ATTEMPTS = 3
# run.json is first, because it says which run the other files belong to. wandb/ is left out,
# because Weights & Biases uploads it.
PLAIN = (RUN_JSON, *(n for n in ENTRIES if n not in (RUN_JSON, CHECKPOINTS, "wandb", *MODELS)))


class _LeaseLost(Exception):
    """Another process writes to the bucket now."""


class _Abandoned(Exception):
    """The run has ended without waiting for this thread."""


class RunMirror:
    """Keep the copy of a run up to date until `close`.

    A failed upload only causes a warning, and is tried again later. Training never waits.

    Args:
        remote: The copy; this process must hold its lease.
        saving: The run's options. The bucket keeps the same checkpoints as the directory.
        warn, note: Functions that the thread calls with a sentence.
        moved: Function that is called every second while `close` waits.
    """

    def __init__(
        self,
        remote: RemoteRun,
        directory: RunDirectory,
        saving: SavingOptions,
        warn: Callable[[str], None],
        note: Callable[[str], None],
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        self._remote, self._directory, self._path = remote, directory, directory.path
        self._warn, self._note, self._moved = warn, note, moved
        self._keep, self._again = (saving.keep_last, saving.keep_every), same_command(saving)
        self._sent: dict[str, tuple[int, ...]] = {}
        self._models: dict[str, str | None] = {}
        self._marked: dict[int, str] | None = None  # digests by step; None until they are read
        self._failure = ""  # clause about the newest failure; "" after a success
        # For each object, during `close`: the number of attempts, and the most bytes sent.
        self._begun, self._reached = Counter[str](), dict[str, float]()
        self._progress_at = time.monotonic()
        self._is_done = self._is_abandoned = False
        self._defect: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    # ----------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        lower_priority()
        try:
            self._follow()
        except _Abandoned:
            return
        except _LeaseLost:
            self._warn(
                f"Another process has taken --remote {self._remote.place}, so this one uploads "
                "nothing more. The run goes on in its own directory."
            )
        except BaseException as defect:  # noqa: BLE001 - raised by `close`
            self._defect = defect

    def _follow(self) -> None:
        files_at, pause_s = 0.0, LOOK_S
        while not self._is_abandoned:
            ends, now = self._stop.is_set(), time.monotonic()
            is_due = ends or now >= files_at
            try:
                if is_due or self._unmarked():
                    self._copy()
                    files_at = now + FILES_S
                pause_s = LOOK_S
                self._succeeded()
                if ends and not self._unmarked():
                    self._is_done = True
                    return
            except FileNotFoundError as error:
                files_at = 0.0  # the run replaced or removed the file, so copy again at once
                if ends:
                    self._failed(error)
            except (BucketError, OSError) as error:
                files_at = 0.0
                self._failed(error)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if ends:
                time.sleep(min(pause_s, LOOK_S))
            else:
                self._stop.wait(pause_s)

    def _failed(self, error: Exception) -> None:
        """Keep the reason of a failure; warn of it only if the previous attempt succeeded."""
        if self._is_abandoned:
            return
        if not self._failure:
            self._warn(
                f"--remote {self._remote.place} {_clause(error)}. The run goes on, and uploads the "
                "rest later."
            )
        self._failure = f"still {_clause(error)}"

    def _succeeded(self) -> None:
        if self._failure:
            self._failure = ""
            self._note(f"Uploads to {self._remote.place} succeed again.")

    def _took(self, name: str, sent: int | float = math.inf) -> None:
        """Record the number of bytes sent of an object; the default stands for all of them.

        Raises:
            _Abandoned: The run has ended without waiting, so the rest must not be sent.
        """
        if self._is_abandoned:
            raise _Abandoned
        if self._stop.is_set() and sent > self._reached.get(name, 0):
            self._reached[name] = sent
            self._progress_at = time.monotonic()

    def _rest(self) -> str:
        """Return the end of a sentence: what the bucket lacks, and how to upload the rest."""
        newest = max([*(self._marked or ())], default=None)
        there = "none" if newest is None else f"step {newest:,}"
        return (
            f"not all files of {self._path} are there (newest complete checkpoint there: {there}). "
            f"To upload the rest, run {self._again} again on this machine."
        )

    def _unmarked(self) -> list[int]:
        """Return the steps of the checkpoints that must be uploaded, ascending."""
        if not self._is_ready():
            return []
        known = self._marked or {}
        steps = saved_steps(self._path / CHECKPOINTS)
        kept = kept_steps(sorted({*known, *steps}), *self._keep)
        return [step for step in steps if step in kept and known.get(step) != self._digest(step)]

    def _digest(self, step: int) -> str:
        """Return a hash that distinguishes a checkpoint from an earlier one of the same step.

        Raises:
            FileNotFoundError: The checkpoint was removed meanwhile.
        """
        file = self._path / CHECKPOINTS / str(step) / CHECKSUMS
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def _is_ready(self) -> bool:
        """Whether the files in the directory belong to this run, and not to an earlier one."""
        if self._directory.lost is not None:
            return False
        try:
            found = RunRecord.read(self._path)
        except UserError:
            return False
        return found is not None and found.run == self._directory.record.run

    def _copy(self) -> None:
        """Upload new files, and at most one checkpoint; remove checkpoints that are not kept."""
        if not self._is_ready():
            return
        steps = saved_steps(self._path / CHECKPOINTS)
        if self._marked is None:
            self._marked = self._remote.marked()
        if steps:  # if the run went back to an earlier step, remove the checkpoints after that step
            here = {step: self._digest(step) for step in steps if step in self._marked}
            marked = self._marked.items()
            self._remove(
                {s for s, digest in marked if s > steps[-1] or here.get(s, digest) != digest}
            )
        for name in PLAIN:
            self._send_plain(self._path / name)
        for name in MODELS:
            self._send_model(name)
        for step in [step for step in reversed(self._unmarked()) if step in steps][:1]:
            self._send_checkpoint(step)
        self._remove({*self._marked} - {*kept_steps(sorted(self._marked), *self._keep)})

    # -------------------------------------------------------------------------------------- uploads

    def _require_lease(self) -> None:
        if self._is_abandoned:
            raise _Abandoned
        lease = self._remote.lease
        if not lease.is_valid:
            lease.renew()
        if lease.lost:
            raise _LeaseLost
        if not lease.is_valid:
            raise BucketError("answers too slowly to renew a lease")

    def _upload(self, content: BufferedIOBase, name: str) -> None:
        self._require_lease()
        if self._stop.is_set() and self._begun[name] < COUNTED_ATTEMPTS:
            self._begun[name] += 1
            self._reached[name] = 0
        self._remote.bucket.upload(
            content, self._remote.key(name), lambda sent: self._took(name, sent)
        )
        self._took(name)

    def _send(self, file: Path, name: str) -> None:
        with open(file, "rb", opener=open_regular) as opened:
            self._upload(as_it_is(opened.fileno()), name)

    def _delete(self, names: list[str]) -> None:
        self._require_lease()
        self._remote.delete(names)
        self._took(f"without {names}")

    def _send_plain(self, path: Path) -> None:
        for file in files_of(path):
            name = file.relative_to(self._path).as_posix()
            try:
                status = file.stat()
                state = status.st_size, status.st_mtime_ns, status.st_ino
                if self._sent.get(name) != state:
                    self._send(file, name)
                    self._sent[name] = state
            except FileNotFoundError:  # removed by its owner
                continue

    def _send_model(self, name: str) -> None:
        """Upload best/ or final/ if it has changed; if it was deleted, delete the uploaded copy."""
        place, mark = self._path / name, f"{name}/{MANIFEST}"
        try:
            manifest = (place / MANIFEST).read_bytes()
        except FileNotFoundError:
            manifest = None
        digest = None if manifest is None else hashlib.sha256(manifest).hexdigest()
        if name not in self._models:
            there = self._remote.bucket.read(self._remote.key(mark))
            self._models[name] = None if there is None else hashlib.sha256(there[0]).hexdigest()
        if self._models[name] == digest:
            return
        top = self._remote.key("")
        old = {each.key.removeprefix(top) for each in self._remote.bucket.find(f"{top}{name}/")}
        self._delete([mark])
        self._models[name] = None
        if manifest is None:
            self._delete(sorted(old - {mark}))
            return
        new = self._send_directory(place, name, besides=MANIFEST)
        self._upload(io.BytesIO(manifest), mark)
        self._models[name] = digest
        self._delete(sorted(old - new - {mark}))

    def _send_checkpoint(self, step: int) -> None:
        name = f"{CHECKPOINTS}/{step}"
        digest = self._digest(step)
        self._send_directory(self._path / name, name)
        about = {"run": self._directory.record.run, "step": step, DIGEST: digest}
        self._upload(io.BytesIO(json.dumps(about).encode()), f"{MARKERS}/{step}.json")
        assert self._marked is not None
        self._marked[step] = digest

    def _send_directory(self, place: Path, name: str, besides: str = "") -> set[str]:
        """Upload all files of a directory, and return their names in the bucket.

        Args:
            besides: Name of a file to leave out.

        Raises:
            FileNotFoundError: The directory was replaced or removed meanwhile.
        """
        before, names = place.stat(), set()
        for file in files_of(place):
            inside = file.relative_to(place).as_posix()
            if inside != besides:
                self._send(file, f"{name}/{inside}")
                names.add(f"{name}/{inside}")
        if not os.path.samestat(before, place.stat()):
            raise FileNotFoundError(str(place))
        return names

    def _remove(self, steps: set[int]) -> None:
        """Remove checkpoints from the bucket, each marker before its files."""
        assert self._marked is not None
        top = self._remote.key("")
        for step in sorted(steps):
            self._delete([f"{MARKERS}/{step}.json"])
            self._marked.pop(step, None)
            found = self._remote.bucket.find(f"{top}{CHECKPOINTS}/{step}/")
            self._delete([each.key.removeprefix(top) for each in found])

    # -------------------------------------------------------------------------------------- the end

    def close(self, is_complete: bool = False) -> None:
        """Wait for the uploads, then release the lease.

        The wait ends when all files are uploaded, when nothing has been uploaded for `EXIT_S`
        seconds, or at a signal.

        Args:
            is_complete: Whether the run is complete. If not, a signal only causes a warning here.

        Raises:
            Interrupted: The run is complete, and a signal ended the wait.
        """
        self._progress_at = time.monotonic()
        self._stop.set()
        place, signal = self._remote.place, ""
        try:
            self._await_uploads()
        except KeyboardInterrupt as stopped:
            signal = settled(stopped)
        self._leave()
        if self._defect is not None:
            raise self._defect
        if signal and not self._is_done:
            if is_complete:
                raise Interrupted(
                    f"{signal}: the run in {self._path} is complete, and no longer waits for "
                    f"--remote {place}: {self._rest()}"
                )
            self._warn(
                f"After a signal, the run no longer waits for --remote {place}: {self._rest()}"
            )

    def _await_uploads(self) -> None:
        """Wait for the thread, until it ends or nothing has been uploaded for `EXIT_S` seconds."""
        while self._thread.is_alive():
            self._thread.join(LOOK_S)
            self._moved()
            if self._thread.is_alive() and time.monotonic() - self._progress_at > EXIT_S:
                still = self._failure or f"has taken nothing for {EXIT_S:g} seconds"
                self._warn(f"--remote {self._remote.place} {still}, so {self._rest()}")
                return

    def _leave(self) -> None:
        """Tell the thread to end, wait for it, and release the lease.

        The lease is not released if the thread hangs in a request, or if a signal ends the wait.
        It then expires by itself.
        """
        self._is_abandoned = True
        try:
            self._thread.join(ABANDON_S)
            if not self._thread.is_alive():
                self._remote.release()
        except KeyboardInterrupt as stopped:
            settled(stopped)
        self._remote.abandon()


def _clause(error: Exception) -> str:
    """Describe an error by a clause that follows the name of the bucket."""
    if isinstance(error, BucketError):
        return str(error)
    refused = error.strerror if isinstance(error, OSError) else None
    return f"lacks a file that this process cannot read ({refused or error})"
