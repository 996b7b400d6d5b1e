"""The interface of a bucket, the same for every provider, and the errors of its requests.

The provider's own library finds the credentials. Error messages never contain credentials.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Protocol

from consyn_jax.errors import brief

CONNECT_S, ANSWER_S = 10, 60  # time limits for a connection and for a response
UNCHANGED = "Wait until nothing writes there"  # remedy
ATTEMPTS = 3  # per request; callers may retry as well

Sent = Callable[[int], None]


class BucketError(RuntimeError):
    """A failed request. Its message, such as "cannot be reached (...)", is put after the URL.

    Attributes:
        advice: a sentence for the user about what to do.
    """

    def __init__(
        self, message: str, remedy: str = "Check the bucket with the provider's own tools"
    ) -> None:
        super().__init__(message)
        self.advice = f"{remedy}, and run the same command again."


@dataclass(frozen=True)
class Stored:
    """An object in a bucket.

    Attributes:
        version: the ETag in S3 or the generation in GCS, which changes with the content.
    """

    key: str
    size: int
    version: str


class Bucket(Protocol):
    """The operations on a bucket. Each raises `BucketError` if the request fails."""

    def find(self, prefix: str) -> list[Stored]:
        """List all objects whose keys begin with `prefix`, sorted by key."""

    def read(self, key: str) -> tuple[bytes, str] | None:
        """Read the content and version of a small object; None if it does not exist."""

    def download(self, stored: Stored, path: Path) -> None:
        """Download exactly this version of an object to a new file."""

    def upload(self, file: BufferedIOBase, key: str, sent: Sent = lambda total: None) -> None:
        """Upload an object of any size: the open file from its current position to its end.

        Args:
            sent: called from time to time with the number of bytes that have been sent; if it
                raises, the upload fails.
        """

    def put(self, key: str, content: bytes, expected: str | None) -> str | None:
        """Write a small object if its current version is `expected`.

        Args:
            expected: the required current version; None if the object must not exist yet.

        Returns:
            The new version; None if the current version was not `expected` and nothing was written.
        """

    def delete(self, keys: list[str]) -> None:
        """Delete objects; missing objects are no error."""


def unreachable(error: BaseException) -> BucketError:
    """Build the error for a server that does not respond."""
    return BucketError(
        f"cannot be reached ({without_keys(brief(error))})",
        "Check the network, and the region or address in the settings of the provider's tools",
    )


def refused(status: int | None, code: str, said: str) -> BucketError:
    """Build the error for a request that the server refused.

    Args:
        status: HTTP status; None if unknown.
        code: the provider's error code, such as AccessDenied.
        said: the provider's error message.
    """
    if status in (401, 403):
        return BucketError(
            f"refuses these credentials ({code})", "Check them with the provider's own tools"
        )
    if status == 404:
        return BucketError(f"is not there ({code})", "Correct the URL, or create the bucket")
    if status == 429 or (status or 500) >= 500:
        return BucketError(f"does not answer now ({code})", "Wait a while")
    return BucketError(
        f"refuses the request ({code}: {without_keys(said)})",
        "Correct the URL, or the settings of the provider's tools",
    )


def no_credentials(tools: str) -> BucketError:
    """Build the error for missing credentials."""
    return BucketError(
        f"needs credentials, and there are none in the environment or in the files of {tools}",
        "Set them up with these tools",
    )


def without_keys(text: str) -> str:
    """Replace everything that may contain a key or signature: long words, and queries of URLs.

    >>> without_keys("GET http://h/b?X-Amz-Signature=0123 by AKIAIOSFODNN7EXAMPLE failed")
    'GET http://h/b?... by ... failed'
    """
    text = re.sub(r"\?\S+", "?...", text)
    return re.sub(r"(?<![\w/:.-])(?=\w*\d)[A-Za-z0-9+=_]{16,}(?![\w/:.-])", "...", text)
