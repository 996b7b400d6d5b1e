"""The copy of a run in a bucket: list it, check its identity, and download it to a new machine.

URL/lease.json              the process that may write (`remote.lease`)
URL/markers/STEP.json       written after all files of a checkpoint, removed before any of them
URL/checkpoints/STEP/...    the files of checkpoints
URL/best/..., URL/final/... models; their manifest is written last and removed first
URL/...                     the other files of the run directory, under their own names
"""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError, listed
from consyn_jax.files import aside, restore_replaced
from consyn_jax.integers import natural
from consyn_jax.remote.bucket import BucketError, Stored
from consyn_jax.remote.bucket_clients import open_bucket
from consyn_jax.remote.lease import Lease
from consyn_jax.remote.local_copy import fetch, inside
from consyn_jax.remote.urls import is_bucket_url, parse
from consyn_jax.training.checkpointing.checkpoint_files import damage, saved_steps
from consyn_jax.training.checkpointing.ownership import RUN_JSON, RunRecord, short
from consyn_jax.training.logging.console import show
from consyn_jax.training.run.directory import CHECKPOINTS, CONFIG, ENTRIES, delete_run, run_path
from consyn_jax.training.run.identity import differences, read_run_config
from consyn_jax.training.run.model_manifest import MANIFEST, disagreement

LEASE, MARKERS = "lease.json", "markers"
DIGEST = "checksums"  # key in a marker, for the SHA-256 of the checkpoint's file CHECKSUMS
MODELS = ("best", "final")
FETCHED = "fetched"  # directory for unfinished downloads, in the run directory
AT_ONCE = 8  # concurrent downloads
RELEASE_S = 10.0  # the longest wait for the release of the lease


@dataclass(frozen=True)
class Contents:
    """The files of a run in a bucket.

    Attributes:
        objects: All stored objects except the lease, by name relative to the URL.
        record: Identity of the run; None if there is no run.
    """

    objects: dict[str, Stored]
    record: RunRecord | None

    @cached_property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        names = (Path(name) for name in self.below(MARKERS))
        return sorted(s for name in names if (s := natural(name.stem)) is not None)

    @property
    def models(self) -> list[str]:
        """Names of the complete models."""
        return [name for name in MODELS if f"{name}/{MANIFEST}" in self.objects]

    @property
    def holds_run(self) -> bool:
        """Whether there is a checkpoint or a model, which a new run would delete."""
        return bool(self.steps or self.models)

    def below(self, *directories: str) -> list[str]:
        """Return the names of the objects in some directories."""
        starts = tuple(f"{each}/" for each in directories)
        return [name for name in self.objects if name.startswith(starts)]


class RemoteRun:
    """The copy of a run in a bucket.

    Raises:
        UserError: The URL is invalid, or the library for its store is not installed.
    """

    def __init__(self, url: str) -> None:
        self.place = parse(url, "remote")
        self.bucket = open_bucket(self.place)
        key = self.key(LEASE)
        holder = secrets.token_hex(8)
        self.lease = Lease(open_bucket(self.place), key, f"--remote {self.place}", holder)
        self._is_released = False

    def key(self, name: str) -> str:
        """Return the bucket key of a file, from its name in the run directory."""
        return f"{self.place.key}/{name}" if self.place.key else name

    def contents(self) -> Contents:
        """List the objects in the bucket, and read the identity of the run.

        Raises:
            UserError: There are objects but no run, or run.json is damaged.
            BucketError: The store does not answer.
        """
        top = self.key("")
        found = {each.key.removeprefix(top): each for each in self.bucket.find(top)}
        found = {name: each for name, each in found.items() if name and name[-1] != "/"}
        found.pop(LEASE, None)
        record = None
        if RUN_JSON in found:
            content = self.bucket.read(self.key(RUN_JSON))
            try:
                record = RunRecord.from_json(json.loads(content[0] if content else b""))
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(
                    f"--remote {self.place}/{RUN_JSON} is damaged, so it is unknown which run is "
                    "there. Restore the file from a copy, or name another --remote."
                ) from error
        elif found:
            raise UserError(
                f"--remote {self.place} holds {listed(sorted(found))}, but no run of "
                "consyn-train. Name an unused prefix."
            )
        return Contents(found, record)

    def marked(self) -> dict[int, str]:
        """Read the digest of each complete checkpoint from its marker; "" if the marker is damaged.

        Raises:
            BucketError: The store does not answer.
        """
        found = {}
        for step in self.contents().steps:
            content = self.bucket.read(self.key(f"{MARKERS}/{step}.json"))
            with suppress(ValueError, TypeError, LookupError, RecursionError):
                found[step] = str(json.loads(content[0] if content else b"")[DIGEST])
            found.setdefault(step, "")
        return found

    def check(
        self, contents: Contents, config: RunConfig, derived: dict[str, Any] | None = None
    ) -> None:
        """Check that the run of `config` may write to the bucket.

        Args:
            derived: Values that follow from flags and data, see `identity.DERIVED_NAMES`; None if
                the data is not known yet.

        Raises:
            UserError: The bucket holds another run, or --overwrite would delete an input.
        """
        path = run_path(config)
        if config.saving.overwrite:
            self._check_overwrite(config)
            return
        if not contents.holds_run or contents.record is None:
            return
        theirs = contents.record.run
        if holds_run(path):
            own = RunRecord.read(path)
            if own is None or own.run != theirs:
                raise UserError(
                    f"--remote {self.place} holds another run (its identity is {short(theirs)}, "
                    f"and the identity of the run in {path} is {short(own and own.run)}). Name "
                    "another --remote, or another --output."
                )
            return
        if config.saving.resume == "never":
            raise UserError(
                f"--remote {self.place} already holds a run. Name another place, continue the run "
                "with --resume auto, or delete it with --overwrite."
            )
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / CONFIG
            if CONFIG not in contents.objects:
                raise UserError(
                    f"--remote {self.place} holds a run without its {CONFIG}. Restore the file, or "
                    "name another --remote."
                )
            fetch(self.bucket, contents.objects[CONFIG], file)
            changes = differences(read_run_config(file), config, derived)
        if changes:
            raise UserError(
                f"--remote {self.place} holds another run: {'; '.join(changes)}. Name another "
                "place, use the old values, or delete that run with --overwrite."
            )

    def _check_overwrite(self, config: RunConfig) -> None:
        model, data = config.model, config.data
        inputs = {
            "checkpoint": (model.checkpoint,),
            "data": data.data,
            "validation": data.validation,
            "tokenizer": (data.tokenizer,),
        }
        for flag, values in inputs.items():
            for value in values:
                if value and is_bucket_url(value) and self.place.holds(parse(value, flag)):
                    raise UserError(
                        f"--overwrite would delete --{flag} {value}, which is in --remote "
                        f"{self.place}. Name another place for the new run."
                    )

    # ------------------------------------------------------------------------------------- starting

    def begin(
        self, path: Path, config: RunConfig, derived: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        """Acquire the lease, and download the run if the bucket has a newer step than `path`.

        Call this while no other process can write to `path`.

        Args:
            say: Function that is called with a sentence about slow work or damaged files.

        Raises:
            UserError: Another process writes to the bucket, the bucket holds another run, or the
                store does not answer.
        """
        with self.explained():
            self.lease.acquire(say)
            self.lease.start()
            contents = self.contents()
            self.check(contents, config, derived)
            if config.saving.overwrite or not contents.holds_run:
                self.delete(contents.objects)
                return
            marked = {str(step) for step in contents.steps}
            halves = [n for n in contents.below(CHECKPOINTS) if n.split("/")[1] not in marked]
            self.delete(halves)
            own_steps = saved_steps(path / CHECKPOINTS)
            is_behind = max(own_steps, default=-1) < max(contents.steps, default=-1)
            if is_behind or not holds_run(path):
                delete_run(path)
                self._fetch(contents, path, say)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Return a context manager that converts errors of the store to `UserError`."""
        try:
            yield
        except BucketError as error:
            raise UserError(f"--remote {self.place} {error}. {error.advice}") from error

    def _fetch(self, contents: Contents, path: Path, say: Callable[[str], None]) -> None:
        """Download the run with its newest intact checkpoint."""
        restore_replaced(path, [FETCHED])
        fresh = aside(path / FETCHED)
        others = set(contents.below(CHECKPOINTS, MARKERS, *MODELS))
        names = [n for n in contents.objects if n not in others and n.split("/")[0] in ENTRIES]
        self._download(contents, names, fresh)
        for model in contents.models:
            self._download(contents, contents.below(model), fresh)
            if reason := disagreement(fresh / model):
                say(f"warning: {self.place}/{model} is left out: {reason}.")
                shutil.rmtree(fresh / model)
        step = self._fetch_checkpoint(contents, fresh, say)
        # checkpoints/ is moved last: if this is interrupted, the directory has no checkpoint, and
        # the next start downloads the run again.
        entries = sorted(fresh.iterdir(), key=lambda e: (e.name == CHECKPOINTS, e.name != CONFIG))
        for entry in entries:
            entry.rename(path / entry.name)
        fresh.rmdir()
        if step is not None:
            say(f"The run up to step {step:,} was downloaded from {self.place}.")

    def _fetch_checkpoint(
        self, contents: Contents, fresh: Path, say: Callable[[str], None]
    ) -> int | None:
        reasons = []
        for step in reversed(contents.steps):
            name = f"{CHECKPOINTS}/{step}"
            self._download(contents, contents.below(name), fresh)
            if (reason := damage(fresh / name)) is None:
                return step
            reasons.append(f"{step}: {reason}")
            say(f"warning: {self.place}/{name} is damaged and is skipped: {reason}.")
            shutil.rmtree(fresh / name, ignore_errors=True)
        if reasons:
            raise UserError(
                f"--remote {self.place} has no intact checkpoint ({'; '.join(reasons)}), and "
                "nothing was changed. Start again with another --remote, or with --overwrite."
            )
        return None

    def _download(self, contents: Contents, names: Iterable[str], fresh: Path) -> None:
        def one(name: str) -> None:
            fetch(self.bucket, contents.objects[name], inside(fresh, name))

        with ThreadPoolExecutor(AT_ONCE, "downloads") as threads:
            for _ in threads.map(one, names):
                pass

    def delete(self, names: Iterable[str]) -> None:
        """Delete files in this order: markers and manifests, all others, and then run.json.

        An interrupted deletion thus leaves no incomplete checkpoint or model that looks complete.

        Raises:
            BucketError: The store refuses the deletion.
        """

        def rank(name: str) -> int:
            is_mark = name.startswith(f"{MARKERS}/") or name.endswith(f"/{MANIFEST}")
            return 0 if is_mark else 2 if name == RUN_JSON else 1

        keys: dict[int, list[str]] = {0: [], 1: [], 2: []}
        for name in names:
            keys[rank(name)].append(self.key(name))
        for some in keys.values():
            if some:
                self.bucket.delete(some)

    def release(self) -> None:
        """Release the lease. If the store does not answer soon, the lease expires by itself."""
        if self._is_released:
            return
        self._is_released = True

        def ask() -> None:
            with suppress(BucketError):
                self.lease.release()

        asking = threading.Thread(target=ask, name="release", daemon=True)
        asking.start()
        asking.join(RELEASE_S)

    def abandon(self) -> None:
        """Let the lease expire, because an upload may still be in progress."""
        self._is_released = True
        self.lease.stop()


def holds_run(path: Path) -> bool:
    """Whether a run directory has a checkpoint or a model, which a new run would delete."""
    models = any((path / name).exists() for name in MODELS)
    return models or bool(saved_steps(path / CHECKPOINTS))


def check_remote(config: RunConfig) -> None:
    """Check `--remote` before slow work. `RemoteRun.begin` repeats the check under the lease.

    Raises:
        UserError: The bucket cannot be reached, or holds another run.
    """
    if (remote := _of(config)) is not None:
        with remote.explained():
            remote.check(remote.contents(), config)


def _of(config: RunConfig) -> RemoteRun | None:
    if config.saving.remote is None:
        return None
    if config.optimizer.decay_from is not None:
        raise UserError(
            "--remote does not work with --decay_from, which starts from a run in --output. Leave "
            "--remote out, and copy the directory when the run is done."
        )
    return RemoteRun(config.saving.remote)


Fetch = Callable[[Path], None]
NO_REMOTE: tuple[RemoteRun | None, Fetch] = (None, lambda path: None)


def open_remote(
    config: RunConfig, derived: dict[str, Any], stack: ExitStack
) -> tuple[RemoteRun | None, Fetch]:
    """Return the run of `--remote`, and a function that downloads it into a locked directory.

    Args:
        derived: Values that follow from flags and data, see `identity.DERIVED_NAMES`.
        stack: Stack that releases the lease.

    Raises:
        UserError: The URL cannot be used.
    """
    if (remote := _of(config)) is None:
        return NO_REMOTE
    stack.callback(remote.release)
    return remote, lambda path: remote.begin(path, config, derived, show)
