"""A thread that copies a run directory to a bucket while the run goes on.

It only looks at the directory, and nothing waits for it: a checkpoint that has its name is uploaded
and then marked. A marker comes after the log up to its step, and after the best model up to then.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from consyn_jax.errors import Unsaved, UserError
from consyn_jax.files import open_regular
from consyn_jax.remote.bucket import BucketError
from consyn_jax.training.checkpointing.checkpoint_files import CHECKSUMS, saved_steps
from consyn_jax.training.checkpointing.commit import kept_steps
from consyn_jax.training.checkpointing.orbax_writes import lower_priority
from consyn_jax.training.checkpointing.ownership import RUN_JSON, RunRecord
from consyn_jax.training.mirror.remote_run import DIGEST, MARKERS, MODELS, RemoteRun
from consyn_jax.training.run.directory import CHECKPOINTS, ENTRIES, RunDirectory
from consyn_jax.training.run.model_manifest import MANIFEST

LOOK_S = 1.0  # between two looks for a new checkpoint
FILES_S = 60.0  # between two uploads of a file that grows, such as the log
LONGEST_PAUSE_S = 60.0  # after failures; the first pause is a second
# The end of a run waits for its uploads while they succeed. It gives up after as long as a server
# needs to restart; what is missing is then uploaded by the next start here.
EXIT_S = 120.0
# Run.json first: it says whose all else is. Links are Weights & Biases' own, which has its copy.
PLAIN = (RUN_JSON, *(n for n in ENTRIES if n not in (RUN_JSON, CHECKPOINTS, "wandb", *MODELS)))


class _LeaseLost(Exception):
    """Another process writes to the bucket now."""


class RunMirror:
    """Keep the copy of a run up to date until `close`.

    A failure is a warning, and is tried again later; training never waits.

    Args:
        remote: the copy, whose lease is held.
        keep: how many of the newest checkpoints to keep there, and multiples of which step.
        warn, note: called with a sentence, from the thread.
        moved: called every second while `close` waits.
    """

    def __init__(
        self,
        remote: RemoteRun,
        directory: RunDirectory,
        keep: tuple[int, int | None],
        warn: Callable[[str], None],
        note: Callable[[str], None],
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        self._remote, self._directory, self._path = remote, directory, directory.path
        self._keep, self._warn, self._note, self._moved = keep, warn, note, moved
        self._sent: dict[str, tuple[int, ...]] = {}
        self._models: dict[str, str | None] = {}
        self._marked: dict[int, str] | None = None  # digests by step; not listed yet
        self._failing_since: float | None = None
        self._ends_since = 0.0
        self._defect: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    # ----------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        lower_priority()
        try:
            self._follow()
        except _LeaseLost:
            self._warn(
                f"Another process has taken --remote {self._remote.place}, so this one uploads "
                "nothing more. The run goes on in its own directory."
            )
        except BaseException as defect:  # noqa: BLE001 - raised by `close`
            self._defect = defect

    def _follow(self) -> None:
        files_at, pause_s = 0.0, LOOK_S
        while True:
            ends, now = self._stop.is_set(), time.monotonic()
            is_due = ends or now >= files_at
            try:
                if is_due or self._unmarked():
                    self._copy()
                    files_at = now + FILES_S
                pause_s = LOOK_S
                self._succeeded()
                if ends and not self._unmarked():
                    return
            except FileNotFoundError as error:
                files_at = 0.0  # it was replaced or removed meanwhile, unless the run is over
                if ends and self._gives_up(error, ends):
                    return
            except (BucketError, OSError) as error:
                files_at = 0.0
                if self._gives_up(error, ends):
                    return
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if ends:
                time.sleep(min(pause_s, LOOK_S))
            else:
                self._stop.wait(pause_s)

    def _gives_up(self, error: Exception, ends: bool) -> bool:
        """Report the first of several failures; whether the end of the run waits no longer."""
        place, now = self._remote.place, time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
            self._warn(
                f"--remote {place} {_clause(error)}. The run goes on, and uploads the rest later."
            )
        if ends and now - max(self._failing_since, self._ends_since) > EXIT_S:
            self._warn(f"--remote {place} still {_clause(error)}, so {self._rest()}")
            return True
        return False

    def _rest(self) -> str:
        """The difference between the two copies, as a clause and a sentence."""
        newest = max(self._marked or (), default=None)
        there = "no checkpoint" if newest is None else f"the run to step {newest:,}"
        return (
            f"it has {there} and not all of {self._path}. The same command uploads the rest from "
            "here."
        )

    def _succeeded(self) -> None:
        if self._failing_since is not None:
            self._failing_since = None
            self._note(f"Uploads to {self._remote.place} succeed again.")

    def _unmarked(self) -> list[int]:
        """Steps of checkpoints that are to be uploaded, ascending."""
        if not self._is_ready():
            return []
        known = self._marked or {}
        steps = saved_steps(self._path / CHECKPOINTS)
        kept = kept_steps(sorted({*known, *steps}), *self._keep)
        return [step for step in steps if step in kept and known.get(step) != self._digest(step)]

    def _digest(self, step: int) -> str:
        """Tell a checkpoint from others of its step, which the run may have taken more than once.

        Raises:
            FileNotFoundError: it was removed meanwhile.
        """
        file = self._path / CHECKPOINTS / str(step) / CHECKSUMS
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def _is_ready(self) -> bool:
        """Whether the files in the directory are this run's: they are not at its very beginning."""
        if self._directory.lost is not None:
            return False
        try:
            found = RunRecord.read(self._path)
        except UserError:
            return False
        return found is not None and found.run == self._directory.record.run

    def _copy(self) -> None:
        """Upload what is new, once."""
        if not self._is_ready():
            return
        steps = saved_steps(self._path / CHECKPOINTS)
        if self._marked is None:
            self._marked = self._remote.marked()
        if steps:  # a run that went back has steps there that its log will not have
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
        lease = self._remote.lease
        if not lease.is_valid:
            lease.renew()
        if lease.lost:
            raise _LeaseLost
        if not lease.is_valid:
            raise BucketError("answers too slowly to renew a lease")

    def _send(self, file: Path, name: str) -> None:
        self._require_lease()
        with open(file, "rb", opener=open_regular) as opened:
            self._remote.bucket.upload(_as_it_is(opened.fileno()), self._remote.key(name))

    def _put(self, name: str, content: bytes) -> None:
        self._require_lease()
        self._remote.bucket.upload(io.BytesIO(content), self._remote.key(name))

    def _delete(self, names: list[str]) -> None:
        self._require_lease()
        self._remote.delete(names)

    def _send_plain(self, path: Path) -> None:
        for file in _files(path):
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
        """Bring best/ or final/ to what it is here, or remove it."""
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
        self._put(mark, manifest)
        self._models[name] = digest
        self._delete(sorted(old - new - {mark}))

    def _send_checkpoint(self, step: int) -> None:
        name = f"{CHECKPOINTS}/{step}"
        digest = self._digest(step)
        self._send_directory(self._path / name, name)
        about = {"run": self._directory.record.run, "step": step, DIGEST: digest}
        self._put(f"{MARKERS}/{step}.json", json.dumps(about).encode())
        assert self._marked is not None
        self._marked[step] = digest

    def _send_directory(self, place: Path, name: str, besides: str = "") -> set[str]:
        """Upload all files of a directory that is replaced as a whole, if at all.

        Raises:
            FileNotFoundError: it was replaced or removed meanwhile.
        """
        before, names = place.stat(), set()
        for file in _files(place):
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

    def close(self) -> None:
        """Upload the rest, waiting for it as `EXIT_S` says, and end the lease.

        A signal ends the waiting; what it interrupts has ended before.
        """
        self._ends_since = time.monotonic()
        self._stop.set()
        try:
            while self._thread.is_alive():
                self._thread.join(1.0)
                self._moved()
        except KeyboardInterrupt as stopped:
            if isinstance(stopped, Unsaved):
                stopped.settle()
            self._warn(
                f"--remote {self._remote.place} is not waited for after a signal: {self._rest()}"
            )
            return
        self._remote.release()
        if self._defect is not None:
            raise self._defect


def _files(path: Path) -> Iterator[Path]:
    """A file, or the files in a directory, without hidden ones and links."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in found:
        is_hidden = any(part.startswith(".") for part in file.relative_to(path.parent).parts)
        if file.is_file() and not file.is_symlink() and not is_hidden:
            yield file


def _clause(error: Exception) -> str:
    """An error as a clause after the name of the bucket."""
    if isinstance(error, BucketError):
        return str(error)
    refused = error.strerror if isinstance(error, OSError) else None
    return f"misses a file that cannot be read here ({refused or error})"


def _as_it_is(descriptor: int) -> io.BufferedReader:
    return io.BufferedReader(_Bounded(descriptor), 1 << 20)


class _Bounded(io.RawIOBase):
    """The bytes that a file has now, however it grows while they are read."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._place = descriptor, 0
        self._size = os.fstat(descriptor).st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        begins = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}
        self._place = max(0, begins[whence] + place)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, into: Any) -> int:
        wanted = max(0, min(len(into), self._size - self._place))
        data = os.pread(self._descriptor, wanted, self._place)
        into[: len(data)] = data
        self._place += len(data)
        return len(data)
