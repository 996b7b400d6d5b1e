"""The directory in which a store is made: what it holds, who may write there, and the lock."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from consyn_jax.data.preparation.build import Stopped
from consyn_jax.data.preparation.corpus_report import is_as_lenient, read_report
from consyn_jax.data.preparation.journal import JOURNAL, Journal
from consyn_jax.data.store import TokenStore
from consyn_jax.data.store.manifest import (
    MANIFEST,
    PREPARING,
    STORE_FILE,
    delete_store,
    has_manifest,
)
from consyn_jax.errors import UserError, listed
from consyn_jax.files import irregular, open_regular, read_whole, try_lock
from consyn_jax.prepare_config import CorpusOptions

LOCK_POLL_SECONDS = 0.2
LOCK_TRIES = 10  # to open the lock file, which another process may just be removing

# Contents of a directory, compared with the store that is wanted.
ABSENT, COMPLETE, OTHER, DAMAGED = "absent", "complete", "other", "damaged"
# Errors for JSON that does not hold what it should.
DAMAGED_TYPES = (ValueError, TypeError, LookupError, AttributeError, OverflowError)


@dataclass(frozen=True)
class Destination:
    """The directory of one store.

    In the cache, a damaged or outdated entry is rebuilt, and a process that is making the same
    store is waited for. In a directory that the user named, both are errors, so that no user data
    is lost.

    Attributes:
        key: the name of the store by content (`spec.key_of`).
    """

    directory: Path
    key: str
    options: CorpusOptions
    in_cache: bool

    @property
    def preparing(self) -> Path:
        """The files that only an unfinished store has."""
        return self.directory / PREPARING

    def is_complete(self) -> bool:
        """Whether the store exists and is complete.

        Raises:
            UserError: the user's directory holds another store, or a damaged one.
        """
        found = self._look()
        if self.in_cache or found in (ABSENT, COMPLETE):
            return found == COMPLETE
        if found == DAMAGED:
            raise UserError(
                f"The token store in {self.directory} is damaged. Delete it with --overwrite, or "
                "give another --output."
            )
        raise UserError(
            f"{self.directory} holds a token store of other data or made by other rules. Give "
            "another --output, or delete it with --overwrite."
        )

    def _look(self) -> str:
        if not (self.directory / MANIFEST).exists():
            return ABSENT
        try:
            store = TokenStore(self.directory)
            assert store.tokenizer  # reads it, and compares it with the manifest
            is_wanted = store.manifest.get("key") == self.key and is_as_lenient(
                read_report(self.directory), self.options
            )
        except (UserError, OSError, *DAMAGED_TYPES):
            return DAMAGED
        return COMPLETE if is_wanted else OTHER

    def refuse_links(self) -> None:
        """Refuse to write to a directory in which someone else has put a link.

        Raises:
            UserError: something of the store is neither a file nor a directory; it is named.
        """
        entries = self.directory.iterdir() if self.directory.is_dir() else ()
        for entry in sorted(entries):
            if STORE_FILE.fullmatch(entry.name) and (found := irregular(entry)):
                raise UserError(
                    f"{found[0]} is {found[1]}, and a store is written only to files of its own. "
                    "Remove it, and run the same command again."
                )

    def journal(self) -> Journal | None:
        """The journal of an earlier process that was making this store; None to start anew.

        Raises:
            UserError: it cannot be read, or the user's directory holds another unfinished store or
                a damaged one.
        """
        path = self.preparing / JOURNAL
        try:
            saved = json.loads(read_whole(path))
            journal = Journal.of(saved) if saved["key"] == self.key else None
            if journal is not None and is_as_lenient(journal.report, self.options):
                return journal
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(
                f"{path} cannot be read: {error.strerror}. Repair that, or give another --output."
            ) from error
        except (*DAMAGED_TYPES, RecursionError) as error:
            if self.in_cache:
                return None
            raise UserError(
                f"{path} is damaged. Delete {self.directory} and prepare the data again."
            ) from error
        if self.in_cache:
            return None
        raise UserError(
            f"{self.directory} holds an unfinished preparation of other data or by other rules. "
            "Give another --output, or --overwrite."
        )

    def remove_manifest(self) -> None:
        """Turn a damaged or outdated entry of the cache into an unfinished store."""
        try:
            (self.directory / MANIFEST).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.directory} is damaged and cannot be written: {error.strerror}. Set "
                "CONSYN_CACHE to a directory with room."
            ) from error

    def remove_preparing(self) -> None:
        """Remove what a complete store does not need."""
        shutil.rmtree(self.preparing, ignore_errors=True)

    def remove_fragment(self) -> None:
        """After a failure, remove an unfinished store that no process could continue."""
        if not (self.preparing / JOURNAL).exists() and not (self.directory / MANIFEST).exists():
            with suppress(OSError):  # where nothing can be written, nothing can be deleted
                delete_store(self.directory)

    @contextmanager
    def locked(self, stop: Callable[[], bool]) -> Iterator[None]:
        """Keep other processes from preparing the same store.

        The kernel releases the lock however this process ends.

        Args:
            stop: called while waiting for another process; true ends the waiting.

        Raises:
            UserError: the directory cannot be written, or is the user's and in use.
            Stopped: `stop` returned true.
        """
        lock = self._wait_for_lock(stop)
        try:
            yield
        finally:
            os.close(lock)

    def _wait_for_lock(self, stop: Callable[[], bool]) -> int:
        failures = 0
        while True:
            lock = None
            try:
                lock, failures = self._try_lock(), 0
            except (FileNotFoundError, FileExistsError) as error:
                # Another process may just be removing the directory. A link that leads nowhere
                # gives the same errors every time.
                failures += 1
                if failures == LOCK_TRIES:
                    raise self._unwritable(error) from error
            except OSError as error:
                raise self._unwritable(error) from error
            if lock is not None:
                return lock
            if stop():
                raise Stopped
            time.sleep(LOCK_POLL_SECONDS)

    def _try_lock(self) -> int | None:
        """The descriptor of the lock file; None where another process holds or removes it."""
        self.preparing.mkdir(parents=True, exist_ok=True)
        path = self.preparing / "lock"
        lock = open_regular(path, os.O_RDWR | os.O_CREAT)
        is_free = try_lock(lock)
        if is_free:
            # Its holder may have finished and removed the file after it was opened here.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), path.stat()):
                    return lock
        os.close(lock)
        if not is_free and not self.in_cache:
            raise UserError(
                f"{self.directory} is being prepared by another process. Wait for it, or give "
                "another --output."
            )
        return None

    def _unwritable(self, error: OSError) -> UserError:
        elsewhere = (
            "Set CONSYN_CACHE to a directory with room."
            if self.in_cache
            else "Give another --output."
        )
        if isinstance(error, FileExistsError):
            return UserError(
                f"{error.filename} is a file and not a directory, or a link that leads nowhere. "
                f"{elsewhere}"
            )
        return UserError(f"{self.directory} cannot be written: {error.strerror}. {elsewhere}")


def check_output(directory: Path) -> None:
    """Refuse a directory with files that are not a token store, so that none of them is lost.

    Only the data can tell whether a store in it is the wanted one (`Destination.is_complete`).

    Raises:
        UserError: the directory holds something other than a token store or an unfinished one.
    """
    names = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    if names and not _is_ours(directory):
        raise UserError(
            f"--output {directory} is not a token store: it holds {listed(names)}. Name another "
            "directory."
        )


def _is_ours(directory: Path) -> bool:
    """Whether there is a token store, or one that a preparation has begun to make."""
    if has_manifest(directory):
        return True
    preparing = directory / PREPARING
    # A preparation that is killed at its very beginning leaves a directory without a lock.
    return preparing.is_dir() and ((preparing / "lock").is_file() or not any(preparing.iterdir()))
