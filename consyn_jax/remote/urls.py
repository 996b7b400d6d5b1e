"""Parse bucket URLs, and check the paths, URLs and addresses of flags; standard library only."""

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
# Flags that accept bucket URLs, and flags that accept only local paths, in every command.
READ = frozenset({"data", "validation", "checkpoint", "model", "tokenizer"})
LOCAL = frozenset(
    {
        *("output", "config", "chat_template", "eval_requests", "requests", "replay", "verify"),
        *("fit", "run", "watch", "page", "file", "shared_directory"),
    }
)
REMOTE = "remote"
ADDRESSES = frozenset({"ray_address", "coordinator_address", "storage", "push_to_hub"})
_LONGEST = 200  # characters of a URL in a message
MOST_KEY_BYTES = 1024  # the limit of S3 and of GCS


@dataclass(frozen=True)
class BucketUrl:
    """The URL of an object, or of a prefix of objects.

    Attributes:
        key: key or prefix, without slashes at its ends; "" for the whole bucket.
    """

    scheme: str
    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}{f'/{self.key}' if self.key else ''}"

    def holds(self, other: BucketUrl) -> bool:
        """Whether `other` is this URL, or is below this URL.

        >>> parse("s3://bucket/run").holds(parse("s3://bucket/run/final"))
        True
        """
        is_same = (self.scheme, self.bucket) == (other.scheme, other.bucket)
        return is_same and f"{other.key}/".startswith(f"{self.key}/" if self.key else "")


def is_url(text: str) -> bool:
    """Whether a string has the form of a URL.

    >>> is_url("s3://bucket/corpus"), is_url("runs/verse"), is_url("owner/name")
    (True, False, False)
    """
    return _URL.fullmatch(text) is not None


def is_bucket_url(text: str) -> bool:
    """Whether a string is the URL of a bucket or of objects in one.

    >>> is_bucket_url("gs://bucket/corpus"), is_bucket_url("hf://owner/name")
    (True, False)
    """
    match = _URL.fullmatch(text)
    return match is not None and match[1].lower() in BUCKETS


def parse(text: str, flag: str = "") -> BucketUrl:
    """Parse the URL of a bucket.

    Args:
        flag: name of the flag with this value, for messages; "" if unknown.

    Raises:
        UserError: the text is not a valid bucket URL. The message hides user names and keys.
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
            f"{place} contains a user name or a key. Remove it; credentials come from the "
            "environment or from the files of the provider's own tools."
        )
    if not _BUCKET.fullmatch(bucket):
        raise UserError(f"{place} names no bucket. Write it as {scheme}://BUCKET/PATH.")
    key = key.strip("/")
    is_plain = key.isprintable() and all(part not in ("", ".", "..") for part in key.split("/"))
    if key and (not is_plain or len(key.encode(errors="replace")) > MOST_KEY_BYTES):
        raise UserError(
            f"{place} has a path that is not valid for a file. Use printable characters, no empty "
            f"part, no . or .. as a part, and at most {MOST_KEY_BYTES} bytes."
        )
    return BucketUrl(scheme, bucket, key)


def shown(text: str) -> str:
    """Format a URL for messages: on one line, shortened, without a user name or key.

    >>> shown("s3://me:secret@bucket/x")
    's3://...@bucket/x'
    """
    text = in_line(re.sub(r"//[^/]*@", "//...@", text))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def understood(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check paths, URLs and addresses of flags, and replace hf:// URLs by names on the Hub.

    Args:
        values: values of all flags, by name.

    Returns:
        New values of the flags in `READ` and `LOCAL`.

    Raises:
        UserError: a value is empty, or is a URL that its flag does not accept.
    """
    changed: dict[str, Any] = {}
    for name in sorted(values.keys() & (READ | LOCAL | ADDRESSES | {REMOTE})):
        # An empty path would be the current directory. An unset shell variable gives an empty path.
        if "" in (values[name] if isinstance(values[name], tuple) else (values[name],)):
            raise UserError(f"--{name} has an empty value. Give one, or leave --{name} out.")
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
            f"--{name} {shown(value)} is a URL, but --{name} needs a path on this machine. Give a "
            "path; use consyn-train --remote URL to copy a run to a bucket, and the bucket's own "
            "tools to copy other files."
        )
    scheme = value.partition(":")[0].lower()
    if scheme == HUB:
        return _hub_name(name, value)
    if scheme not in BUCKETS:
        raise UserError(
            f"--{name} {shown(value)}: {scheme}:// is not supported. Use s3://, gs:// or hf://, "
            "or download the data and give its path; consyn-train --remote copies a run to a "
            "bucket."
        )
    parse(value, name)
    return value


def _hub_name(flag: str, url: str) -> str:
    """Convert an hf:// URL to a name on the Hugging Face Hub."""
    kind = "datasets/" if flag in ("data", "validation") else ""
    name = url.partition("://")[2].strip("/")
    if not name.startswith(kind) or name.removeprefix(kind).partition("@")[0].count("/") != 1:
        raise UserError(
            f"--{flag} {shown(url)} is not of the form hf://{kind}OWNER/NAME. Correct it."
        )
    name = name.removeprefix(kind)
    if Path(name).exists():
        raise UserError(
            f"--{flag} {shown(url)} is ambiguous, because a local path {name} exists. Run the "
            f"command in another directory, or give ./{name} for the local path."
        )
    return name
