"""URLs of buckets, and the flags that understand them. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consyn_jax.errors import UserError, in_line

BUCKETS = ("s3", "gs")
HUB = "hf"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
# By name: the same flag means the same in every command.
READ = frozenset({"data", "validation", "checkpoint", "model", "tokenizer"})
LOCAL = frozenset(
    {
        *("output", "config", "chat_template", "eval_requests", "requests", "replay", "verify"),
        *("fit", "run", "watch", "page", "file"),
    }
)
REMOTE = "remote"
_LONGEST = 200  # characters of a URL in a message
MOST_KEY_BYTES = 1024  # of S3 and of GCS


@dataclass(frozen=True)
class BucketUrl:
    """The place of an object, or of all objects below a prefix.

    Attributes:
        key: without a slash at its beginning or end; "" for the whole bucket.
    """

    scheme: str
    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}{f'/{self.key}' if self.key else ''}"

    def holds(self, other: BucketUrl) -> bool:
        """Whether the other place is this one or below it.

        >>> parse("s3://bucket/run").holds(parse("s3://bucket/run/final"))
        True
        """
        is_same = (self.scheme, self.bucket) == (other.scheme, other.bucket)
        return is_same and f"{other.key}/".startswith(f"{self.key}/" if self.key else "")


def is_url(text: str) -> bool:
    """Whether a value has the form of a URL.

    >>> is_url("s3://bucket/corpus"), is_url("runs/verse"), is_url("owner/name")
    (True, False, False)
    """
    return _URL.fullmatch(text) is not None


def is_bucket_url(text: str) -> bool:
    """Whether a value names a place in a bucket.

    >>> is_bucket_url("gs://bucket/corpus"), is_bucket_url("hf://owner/name")
    (True, False)
    """
    match = _URL.fullmatch(text)
    return match is not None and match[1].lower() in BUCKETS


def parse(text: str, flag: str = "") -> BucketUrl:
    """Parse the URL of a bucket.

    Args:
        flag: the flag that it was given to, for messages; "" if unknown.

    Raises:
        UserError: it is not one. The message shows no user or key that the URL may have.
    """
    match, place = _URL.fullmatch(text), f"--{flag} {shown(text)}" if flag else shown(text)
    scheme = "" if match is None else match[1].lower()
    if match is None or scheme not in BUCKETS:
        raise UserError(
            f"{place} is not a place in a bucket. Write it as s3://BUCKET/PATH or gs://BUCKET/PATH."
        )
    bucket, _, key = match[2].partition("/")
    if "@" in bucket:
        raise UserError(
            f"{place} has a user or a key in it. Leave them out: credentials come from the "
            "environment or from the files of the provider's own tools."
        )
    if not _BUCKET.fullmatch(bucket):
        raise UserError(f"{place} names no bucket. Write it as {scheme}://BUCKET/PATH.")
    key = key.strip("/")
    is_plain = key.isprintable() and all(part not in ("", ".", "..") for part in key.split("/"))
    if key and (not is_plain or len(key.encode(errors="replace")) > MOST_KEY_BYTES):
        raise UserError(
            f"{place} has a path that no file can have. Write it without //, . and "
            ".. between its parts."
        )
    return BucketUrl(scheme, bucket, key)


def shown(text: str) -> str:
    """A URL as messages show it: on one line, not too long, and without a user or key in it.

    >>> shown("s3://me:secret@bucket/x")
    's3://...@bucket/x'
    """
    text = in_line(re.sub(r"//[^/]*@", "//...@", text))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def understood(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check that no flag has a URL that it does not understand.

    Args:
        values: by flag name.

    Returns:
        The values with hf:// URLs, as the names on the Hub that they stand for.

    Raises:
        UserError: a flag has such a URL.
    """
    changed: dict[str, Any] = {}
    for name in values.keys() & (READ | LOCAL | {REMOTE}):
        given = values[name]
        if name == REMOTE and given is not None:
            parse(given, name)
        elif isinstance(given, tuple):
            changed[name] = tuple(_understood(name, value) for value in given)
        else:
            changed[name] = _understood(name, given)
    return changed


def _understood(name: str, value: Any) -> Any:
    if not isinstance(value, str) or not is_url(value):
        return value
    if name in LOCAL:
        raise UserError(
            f"--{name} {shown(value)} is a URL, and --{name} takes a path on this machine. Give "
            "one, and let consyn-train --remote URL copy the run to a bucket, or copy other files "
            "with the bucket's own tools."
        )
    scheme = value.partition(":")[0].lower()
    if scheme == HUB:
        return _hub_name(name, value)
    if scheme not in BUCKETS:
        raise UserError(
            f"--{name} {shown(value)}: {scheme}:// is not read here; s3://, gs:// and hf:// are. "
            "Download it, and give its path (consyn-train --remote writes to buckets)."
        )
    parse(value, name)
    return value


def _hub_name(flag: str, url: str) -> str:
    """The name on the Hugging Face Hub that an hf:// URL stands for."""
    kind = "datasets/" if flag in ("data", "validation") else ""
    name = url.partition("://")[2].strip("/")
    if not name.startswith(kind) or name.removeprefix(kind).partition("@")[0].count("/") != 1:
        raise UserError(
            f"--{flag} {shown(url)} is not of the form hf://{kind}OWNER/NAME. Correct it."
        )
    name = name.removeprefix(kind)
    if Path(name).exists():
        raise UserError(
            f"--{flag} {shown(url)} has the name of a path here, too. Run the command elsewhere, "
            f"or give ./{name} if you mean that one."
        )
    return name
