"""Buckets of S3 and of compatible servers, accessed through boto3.

boto3 finds the region, profile, endpoint (`AWS_ENDPOINT_URL`) and credentials.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import boto3
import boto3.exceptions
import botocore.config
import botocore.exceptions
from s3transfer.manager import TransferConfig, TransferManager
from s3transfer.subscribers import BaseSubscriber

from consyn_jax.errors import brief
from consyn_jax.remote.bucket import (
    ANSWER_S,
    ATTEMPTS,
    CONNECT_S,
    UNCHANGED,
    BucketError,
    Sent,
    Stored,
    no_credentials,
    refused,
    unreachable,
)
from consyn_jax.remote.daemon_threads import DaemonThreads

# With parts of 32 MiB, a file of 300 GB stays below the limit of 10,000 parts. Two threads saturate
# 1 Gbit/s and leave the other cores to training. They are daemon threads, because the threads of
# `upload_fileobj` would keep this process alive until a hanging server answers.
_TRANSFER = TransferConfig(
    multipart_threshold=1 << 25,
    multipart_chunksize=1 << 25,
    max_request_concurrency=2,
    max_in_memory_upload_chunks=3,
)
_CHUNK_BYTES = 1 << 20
_BROKEN = (
    botocore.exceptions.ResponseStreamingError,
    botocore.exceptions.ReadTimeoutError,
    botocore.exceptions.IncompleteReadError,
)
_DELETED_AT_ONCE = 1000  # the limit of S3 for one request
_OURS = ("AccessKey", "Credentials", "Token", "Profile")


class S3Bucket:
    """A bucket of S3."""

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket
        settings = botocore.config.Config(
            connect_timeout=CONNECT_S,
            read_timeout=ANSWER_S,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        )
        with _told():
            self._client: Any = boto3.session.Session().client("s3", config=settings)

    def find(self, prefix: str) -> list[Stored]:
        """List all objects below a prefix."""
        with _told():
            pages = self._client.get_paginator("list_objects_v2")
            found = [
                Stored(each["Key"], each["Size"], each["ETag"])
                for page in pages.paginate(Bucket=self._bucket, Prefix=prefix)
                for each in page.get("Contents", ())
            ]
        return sorted(found, key=lambda stored: stored.key)

    def read(self, key: str) -> tuple[bytes, str] | None:
        """Read a small object and its ETag."""
        with _told():
            try:
                found = self._client.get_object(Bucket=self._bucket, Key=key)
            except self._client.exceptions.NoSuchKey:
                return None
            return found["Body"].read(), found["ETag"]

    def download(self, stored: Stored, path: Path) -> None:
        """Download this version of an object to a new file; resume after a broken connection."""
        with _told(), path.open("xb") as file:
            for attempt in range(ATTEMPTS):
                try:
                    self._stream(stored, file)
                except _BROKEN:
                    if attempt == ATTEMPTS - 1:
                        raise
                else:
                    return

    def _stream(self, stored: Stored, file: BufferedIOBase) -> None:
        start = file.tell()
        rest = {"Range": f"bytes={start}-"} if start else {}
        found = self._client.get_object(
            Bucket=self._bucket, Key=stored.key, IfMatch=stored.version, **rest
        )
        for chunk in found["Body"].iter_chunks(_CHUNK_BYTES):
            file.write(chunk)

    def upload(self, file: BufferedIOBase, key: str, sent: Sent = lambda total: None) -> None:
        """Upload an object from an open file; `sent` is called for every 256 KiB."""
        transfers = TransferManager(self._client, _TRANSFER, executor_cls=DaemonThreads)
        progress = _Progress(sent)
        with _told():
            try:
                with transfers:
                    transfers.upload(file, self._bucket, key, subscribers=[progress]).result()
            finally:
                if progress.error is not None:
                    raise progress.error

    def put(self, key: str, content: bytes, expected: str | None) -> str | None:
        """Write a small object if its current version is `expected`."""
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        with _told():
            try:
                written = self._client.put_object(
                    Bucket=self._bucket, Key=key, Body=content, **condition
                )
            except botocore.exceptions.ClientError as error:
                status, code, _ = _answer(error)
                # 404: the object does not exist. 409: another conditional write is in progress.
                if status in (409, 412) or (code == "NoSuchKey" and expected is not None):
                    return None
                raise
            return str(written["ETag"])

    def delete(self, keys: list[str]) -> None:
        """Delete objects."""
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            some = [{"Key": key} for key in keys[start : start + _DELETED_AT_ONCE]]
            with _told():
                answer = self._client.delete_objects(
                    Bucket=self._bucket, Delete={"Objects": some, "Quiet": True}
                )
            for error in answer.get("Errors", ()):
                status = 403 if error.get("Code") == "AccessDenied" else None
                raise refused(status, error.get("Code", ""), error.get("Message", ""))


class _Progress(BaseSubscriber):
    """Adds up the bytes that the threads of an upload send; bytes that are sent again count once.

    Attributes:
        error: the exception that `sent` raised, which ends the upload; None if it raised none.
    """

    def __init__(self, sent: Sent) -> None:
        self.error: Exception | None = None
        self._sent, self._total, self._guard = sent, 0, threading.Lock()

    def on_progress(self, future: Any, bytes_transferred: int, **more: Any) -> None:
        """Count bytes."""
        with self._guard:
            self._total += bytes_transferred
            total = self._total
        try:
            self._sent(total)
        except Exception as error:
            self.error = error
            future.cancel()  # otherwise botocore would send the part again, as after other errors
            raise


def _answer(error: botocore.exceptions.ClientError) -> tuple[int | None, str, str]:
    said = error.response.get("Error", {})
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status, str(said.get("Code", "")), str(said.get("Message", ""))


@contextmanager
def _told() -> Iterator[None]:
    """Turn errors of boto3 into `BucketError`."""
    errors = botocore.exceptions
    try:
        yield
    except errors.ClientError as error:
        status, code, said = _answer(error)
        if code == "412" or status == 412:
            raise BucketError("was changed while it was read", UNCHANGED) from error
        raise refused(403 if any(w in code for w in _OURS) else status, code, said) from error
    except (errors.NoCredentialsError, errors.PartialCredentialsError) as error:
        raise no_credentials("the AWS tools") from error
    except (errors.ProfileNotFound, errors.InvalidConfigError, errors.ConfigParseError) as error:
        raise BucketError(
            f"cannot be opened ({brief(error)})", "Correct AWS_PROFILE, or the files in ~/.aws"
        ) from error
    except (errors.BotoCoreError, boto3.exceptions.Boto3Error) as error:
        # boto3 wraps the server's error when it transfers a large file
        if isinstance(error.__context__, errors.ClientError):
            raise refused(*_answer(error.__context__)) from error
        raise unreachable(error) from error
