"""The directory in which a store is made: its content, its lock, and checks before writing."""

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
    SHARD_DRAFTS,
    STORE_FILE,
    delete_store,
    has_manifest,
)
from consyn_jax.errors import AGAIN, UserError, listed
from consyn_jax.files import irregular, open_regular, read_whole, remove, try_lock
from consyn_jax.prepare_config import CorpusOptions

LOCK_POLL_SECONDS = 0.2
LOCK_TRIES = 10  # attempts to open the lock file while another process removes it

# States of a directory, compared with the store to make.
ABSENT, COMPLETE, OTHER, DAMAGED = "absent", "complete", "other", "damaged"
# Errors that reading JSON of the wrong structure may raise.
DAMAGED_TYPES = (ValueError, TypeError, LookupError, AttributeError, OverflowError)


@dataclass(frozen=True)
class Destination:
    """The directory of one store.

    In the cache, a damaged or outdated entry is rebuilt, and if another process is making the same
    store, this process waits. In a directory that the user named, each of these cases is an error,
    so that no user data is lost.

    Attributes:
        key: hash of the store's content (`preparation_spec.key_of`), which is its name in the
            cache.
    """

    directory: Path
    key: str
    options: CorpusOptions
    in_cache: bool

    @property
    def preparing(self) -> Path:
        """The directory for files that only an unfinished store needs."""
        return self.directory / PREPARING

    def is_complete(self) -> bool:
        """Whether the store exists and is complete.

        Raises:
            UserError: the user's directory contains another store or a damaged store.
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
            f"{self.directory} contains a token store that was made from other data or with other "
            "settings. Give another --output, or delete this store with --overwrite."
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
        """Refuse to write to a store that contains a link or a special file.

        Raises:
            UserError: an entry is neither a file nor a directory; the message names it.
        """
        entries = self.directory.iterdir() if self.directory.is_dir() else ()
        for entry in sorted(entries):
            if STORE_FILE.fullmatch(entry.name) and (found := irregular(entry)):
                raise UserError(
                    f"{found[0]} is {found[1]}, and a token store must not contain this. Remove "
                    f"it, and {AGAIN}."
                )

    def journal(self) -> Journal | None:
        """The journal of an earlier process that was making this store; None if there is none.

        Raises:
            UserError: the journal cannot be read. In the user's directory, this is also raised if
                the journal is damaged or belongs to another store.
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
                f"{path} cannot be read: {error.strerror}. Make it readable, or give another "
                "--output."
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
            f"{self.directory} contains an unfinished token store, made from other data or with "
            "other settings. Give another --output, or delete this store with --overwrite."
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
        """Remove the files that only an unfinished store needs."""
        shutil.rmtree(self.preparing, ignore_errors=True)

    def end_many_writers(self) -> None:
        """Delete the drafts of shards, so that late tasks add no more shards to the store.

        A task of `--shared_directory` writes a shard to a directory of drafts, and then moves it
        into the store. Later commands with `--shared_directory` write all shards again.
        """
        try:
            for place in self.preparing.glob(f"{SHARD_DRAFTS}*"):
                remove(place)
        except OSError as error:
            raise self._unwritable(error) from error

    def remove_fragment(self) -> None:
        """After a failure, remove an unfinished store that cannot be continued."""
        if not (self.preparing / JOURNAL).exists() and not (self.directory / MANIFEST).exists():
            with suppress(OSError):  # the directory cannot be written
                delete_store(self.directory)

    @contextmanager
    def locked(self, stop: Callable[[], bool]) -> Iterator[None]:
        """Lock the store against other processes that prepare it.

        The kernel releases the lock when this process ends, even if the process is killed.

        Args:
            stop: called while waiting for another process; the wait ends if it returns true.

        Raises:
            UserError: the directory cannot be written, or another process is preparing a store in
                the user's directory.
            Stopped: `stop` returned true.
        """
        lock = self._wait_for_lock(stop)
        try:
            yield
        finally:
            os.close(lock)
            with suppress(OSError):  # empty on NFS, which kept the lock file until it was closed
                self.preparing.rmdir()

    def _wait_for_lock(self, stop: Callable[[], bool]) -> int:
        failures = 0
        while True:
            lock = None
            try:
                lock, failures = self._try_lock(), 0
            except (FileNotFoundError, FileExistsError) as error:
                # Another process may be removing the directory at this moment, so try again. With a
                # broken link the error persists.
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
        """Lock the lock file; return its descriptor, or None if another process has the lock."""
        self.preparing.mkdir(parents=True, exist_ok=True)
        path = self.preparing / "lock"
        lock = open_regular(path, os.O_RDWR | os.O_CREAT)
        is_free = try_lock(lock)
        if is_free:
            # Another process may have finished and removed the file after it was opened here.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), path.stat()):
                    return lock
        os.close(lock)
        if not is_free and not self.in_cache:
            raise UserError(
                f"--output {self.directory} is in use by another process. Wait for that process, "
                "or give another directory."
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
                f"{error.filename} is a file and not a directory, or a broken link. {elsewhere}"
            )
        return UserError(f"{self.directory} cannot be written: {error.strerror}. {elsewhere}")


def check_output(directory: Path) -> None:
    """Refuse a directory that contains anything but a token store, so that no file is lost.

    `Destination.is_complete` checks later whether a store there was made from the same data.

    Raises:
        UserError: the directory has files, and is not a complete or unfinished token store.
    """
    names = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    if names and not _is_ours(directory):
        raise UserError(
            f"--output {directory} is not a token store: it contains {listed(names)}. Give "
            "another directory."
        )


def _is_ours(directory: Path) -> bool:
    """Whether the directory is a complete or unfinished token store."""
    if has_manifest(directory):
        return True
    preparing = directory / PREPARING
    # A preparation that is killed at its start leaves a directory without a lock file.
    return preparing.is_dir() and ((preparing / "lock").is_file() or not any(preparing.iterdir()))
