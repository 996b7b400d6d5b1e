"""Download models and tokenizers from the Hugging Face Hub (`owner/name`) or from a bucket.

Cached files are used without a network. Downloaded code is never run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from consyn_jax.errors import UserError, brief, listed
from consyn_jax.remote.urls import is_bucket_url

_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a name is a hub id, `owner/name` or `owner/name@revision`, and not an existing path.

    >>> is_hub_id("Qwen/Qwen3-0.6B"), is_hub_id("../models"), is_hub_id("runs/verse/final")
    (True, False, False)
    """
    return bool(_NAME.fullmatch(name)) and not Path(name).exists()


def is_elsewhere(name: str) -> bool:
    """Whether a name is a hub id or a bucket URL, which `download` accepts."""
    return is_bucket_url(name) or is_hub_id(name)


def is_hub_name(name: str) -> bool:
    """Whether a name has the form `owner/name`.

    >>> is_hub_name("me/model"), is_hub_name("me/model@main"), is_hub_name("model")
    (True, False, False)
    """
    match = _NAME.fullmatch(name)
    return match is not None and match["revision"] is None


def download(name: str, patterns: Sequence[str]) -> Path:
    """Download all files of a hub id or URL that are not cached yet; return their directory.

    Args:
        patterns: glob patterns of the files needed.

    Raises:
        UserError: the model does not exist, access is denied, or there is neither a network nor a
            cached copy.
    """
    if is_bucket_url(name):
        from consyn_jax.remote.local_copy import local_copy

        return local_copy(name, tuple(patterns))
    match = _NAME.fullmatch(name)
    assert match is not None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, revision = match["repository"], match["revision"]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise UserError(
            f"{repository} is gated. Ask for access at https://huggingface.co/{repository}, then "
            "log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{repository} has no revision {revision!r}. Give one of its branches, tags or commits."
        ) from error
    except RepositoryNotFoundError as error:
        _check_path(repository, "does not exist")
        raise UserError(
            f"{repository} is not a directory, and the Hugging Face Hub has no public model of "
            "this name. Check the name; for a private model, log in with `hf auth login`."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        _check_path(repository, f"cannot be reached ({hub_reason(error)})")
        raise UserError(
            f"{repository} is not a directory, and the Hugging Face Hub cannot be reached "
            f"({hub_reason(error)}). On a machine with a network, run `hf download {repository} "
            "--local-dir DIR`, copy DIR here, and give its path."
        ) from error


def _check_path(repository: str, fault: str) -> None:
    """Refuse a hub id whose `owner` is a local directory: it is more likely a mistyped path.

    Args:
        fault: what is wrong with the hub id, such as "does not exist"; part of the message.
    """
    parent = Path(repository).parent
    if parent.is_dir():
        beside = listed(sorted(path.name for path in parent.iterdir()), 5)
        raise UserError(
            f"{repository} does not exist here, and on the Hugging Face Hub it {fault}. "
            f"Correct the path or the name; the directory {parent} contains "
            f"{beside or 'nothing'}."
        )


def hub_reason(error: Exception) -> str:
    """Describe the root cause of an error of the Hub in a few words."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if type(cause).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set"
    return brief(cause)
