"""A bucket as its callers see it, whoever stores it, and the errors of stores.

Credentials are found by the provider's own library, as it documents that, and are in no message.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Protocol

from consyn_jax.errors import brief

CONNECT_S, ANSWER_S = 10, 60  # until a server accepts a connection, and answers
ATTEMPTS = 3  # of one request; what calls again has its own rule


class BucketError(RuntimeError):
    """A request that failed, as a clause after the name of the place: "cannot be reached (...)"."""


@dataclass(frozen=True)
class Stored:
    """An object in a bucket.

    Attributes:
        version: changes with the content: an ETag of S3, a generation of GCS.
    """

    key: str
    size: int
    version: str


class Bucket(Protocol):
    """The operations on a bucket. Every one raises `BucketError` if the store does not do it."""

    def find(self, prefix: str) -> list[Stored]:
        """All objects whose keys begin with `prefix`, sorted by key."""

    def read(self, key: str) -> tuple[bytes, str] | None:
        """The content and version of a small object; None if there is none."""

    def download(self, stored: Stored, path: Path) -> None:
        """Write exactly this version of an object to a new file."""

    def upload(self, file: BufferedIOBase, key: str) -> None:
        """Write an object of any size from the rest of an open file."""

    def put(self, key: str, content: bytes, expected: str | None) -> str | None:
        """Write a small object on a condition.

        Args:
            expected: the version that is there now; None if no object may be there.

        Returns:
            The new version; None if the condition did not hold, and nothing was written.
        """

    def delete(self, keys: list[str]) -> None:
        """Delete objects; those that are missing are no error."""


def unreachable(error: BaseException) -> BucketError:
    """The error for a server that does not answer."""
    return BucketError(f"cannot be reached ({without_keys(brief(error))})")


def refused(status: int | None, code: str, said: str) -> BucketError:
    """The error for a request that the server has refused.

    Args:
        status: HTTP status; None if unknown.
        code: the provider's word for it, such as AccessDenied.
        said: the provider's sentence.
    """
    if status in (401, 403):
        return BucketError(
            f"refuses these credentials ({code}). Check them with the provider's own tools"
        )
    if status == 404:
        return BucketError(f"is not there ({code})")
    if status == 429 or (status or 500) >= 500:
        return BucketError(f"does not answer now ({code})")
    return BucketError(f"refuses the request ({code}: {without_keys(said)})")


def no_credentials(tools: str) -> BucketError:
    """The error for credentials that are nowhere."""
    return BucketError(
        f"needs credentials, and there are none in the environment or in the files of {tools}"
    )


def without_keys(text: str) -> str:
    """Leave out what may be part of a key or a signature: long words, and queries of URLs.

    >>> without_keys("GET http://h/b?X-Amz-Signature=0123 by AKIAIOSFODNN7EXAMPLE failed")
    'GET http://h/b?... by ... failed'
    """
    text = re.sub(r"\?\S+", "?...", text)
    return re.sub(r"(?<![\w/:.-])(?=\w*\d)[A-Za-z0-9+=_]{16,}(?![\w/:.-])", "...", text)
