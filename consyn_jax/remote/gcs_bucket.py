"""Buckets of Google Cloud Storage, by the library google-cloud-storage.

Application default credentials are used. `STORAGE_EMULATOR_HOST` selects another server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import google.api_core.exceptions
import google.auth.credentials
import google.auth.exceptions
import google.cloud.storage
import google.cloud.storage.exceptions
import google.cloud.storage.retry
import requests

from consyn_jax.remote.bucket import (
    ANSWER_S,
    CONNECT_S,
    BucketError,
    Sent,
    Stored,
    no_credentials,
    refused,
    unreachable,
)

# Size of a part of a resumable upload. A failed part is sent again. Progress is shown per part.
_PART_BYTES = 1 << 23
_RETRIED_S = 20.0


class GcsBucket:
    """A bucket of Google Cloud Storage."""

    def __init__(self, bucket: str) -> None:
        is_emulated = "STORAGE_EMULATOR_HOST" in os.environ
        own = google.auth.credentials.AnonymousCredentials() if is_emulated else None
        with _told():
            client = google.cloud.storage.Client(project=None, credentials=own)
        self._bucket: Any = client.bucket(bucket)
        retry = google.cloud.storage.retry.DEFAULT_RETRY.with_timeout(_RETRIED_S)
        self._how: dict[str, Any] = {"timeout": (CONNECT_S, ANSWER_S), "retry": retry}

    def find(self, prefix: str) -> list[Stored]:
        """List all objects below a prefix."""
        with _told():
            found = self._bucket.list_blobs(prefix=prefix, **self._how)
            each = [Stored(blob.name, blob.size, str(blob.generation)) for blob in found]
        return sorted(each, key=lambda stored: stored.key)

    def read(self, key: str) -> tuple[bytes, str] | None:
        """Read a small object and its generation; None if it does not exist."""
        with _told():
            blob = self._bucket.blob(key)
            try:
                content = blob.download_as_bytes(**self._how)
            except google.api_core.exceptions.NotFound:
                if not self._bucket.exists(**self._how):
                    raise
                return None
            return content, str(blob.generation)

    def download(self, stored: Stored, path: Path) -> None:
        """Download this version of an object to a new file."""
        with _told(), path.open("xb") as file:
            blob = self._bucket.blob(stored.key, generation=int(stored.version))
            blob.download_to_file(file, **self._how)

    def upload(self, file: BufferedIOBase, key: str, sent: Sent = lambda total: None) -> None:
        """Upload an object from an open file; `sent` is called before each part."""
        with _told():
            blob = self._bucket.blob(key, chunk_size=_PART_BYTES)
            blob.upload_from_file(_Told(file, sent), **self._how)

    def put(self, key: str, content: bytes, expected: str | None) -> str | None:
        """Write a small object if its version is `expected`; return the new version, or None."""
        with _told():
            blob = self._bucket.blob(key)
            try:
                wanted = 0 if expected is None else int(expected)
                blob.upload_from_string(content, if_generation_match=wanted, **self._how)
            except google.api_core.exceptions.PreconditionFailed:
                return None
            return str(blob.generation)

    def delete(self, keys: list[str]) -> None:
        """Delete objects."""
        for key in keys:
            with _told():
                try:
                    self._bucket.blob(key).delete(**self._how)
                except google.api_core.exceptions.NotFound:
                    continue


class _Told:
    """A file that calls `sent` before each read, with the bytes that the server has confirmed."""

    def __init__(self, file: BufferedIOBase, sent: Sent) -> None:
        self._file, self._sent = file, sent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        """Read a part."""
        self._sent(self._file.tell())
        return self._file.read(size)


def _refusal(error: google.api_core.exceptions.GoogleAPIError) -> BucketError:
    """Build the error for a server's response, or for the last failed attempt."""
    cause = getattr(error, "cause", None) or error
    if not isinstance(cause, google.api_core.exceptions.GoogleAPICallError):
        return unreachable(cause)
    status = None if cause.code is None else int(cause.code)
    return refused(status, type(cause).__name__, cause.message or "")


@contextmanager
def _told() -> Iterator[None]:
    """Turn errors of google-cloud-storage into `BucketError`."""
    try:
        yield
    except google.api_core.exceptions.GoogleAPIError as error:
        raise _refusal(error) from error
    except google.auth.exceptions.DefaultCredentialsError as error:
        raise no_credentials("gcloud") from error
    except google.auth.exceptions.RefreshError as error:
        raise BucketError("refuses these credentials", "Check them with gcloud auth") from error
    except (
        google.auth.exceptions.GoogleAuthError,
        google.cloud.storage.exceptions.DataCorruption,
        google.cloud.storage.exceptions.InvalidResponse,
        requests.exceptions.RequestException,
    ) as error:
        raise unreachable(error) from error
