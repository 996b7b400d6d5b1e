"""Models and tokenizers elsewhere: on the Hugging Face Hub, as `owner/name`, or in buckets.

Files that were downloaded before are used without a network. Nothing that is downloaded is run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from consyn_jax.errors import UserError, brief, listed
from consyn_jax.remote.urls import is_bucket_url

_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a name is a model on the Hub: `owner/name` or `owner/name@revision`, and no path.

    >>> is_hub_id("Qwen/Qwen3-0.6B"), is_hub_id("../models"), is_hub_id("runs/verse/final")
    (True, False, False)
    """
    return bool(_NAME.fullmatch(name)) and not Path(name).exists()


def is_elsewhere(name: str) -> bool:
    """Whether a name is one of the Hub, or a place in a bucket: what `download` takes."""
    return is_bucket_url(name) or is_hub_id(name)


def is_hub_name(name: str) -> bool:
    """Whether a name has the form `owner/name`.

    >>> is_hub_name("me/model"), is_hub_name("me/model@main"), is_hub_name("model")
    (True, False, False)
    """
    match = _NAME.fullmatch(name)
    return match is not None and match["revision"] is None


def download(name: str, patterns: Sequence[str]) -> Path:
    """Return the directory with the files of a name, downloading those that are not cached.

    Args:
        patterns: patterns of the files that are needed.

    Raises:
        UserError: no such model, no access to it, or no network and no copy.
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
            f"{repository} has no revision {revision!r}. Give a branch, a tag or a commit of it."
        ) from error
    except RepositoryNotFoundError as error:
        _check_path(repository, "is not there")
        raise UserError(
            f"{repository} is not a directory here, and there is no such model on the Hugging Face "
            "Hub, or it is private. Check the name, or try `hf auth login`."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        _check_path(repository, f"cannot be reached ({hub_reason(error)})")
        raise UserError(
            f"{repository} is not a directory here, and the Hugging Face Hub cannot be reached "
            f"({hub_reason(error)}). Where there is a network, run `hf download {repository} "
            "--local-dir DIR`, then give DIR instead."
        ) from error


def _check_path(repository: str, fault: str) -> None:
    """Refuse a name whose first part is a directory here: it is more likely a mistyped path.

    Args:
        fault: what is wrong with it as a hub id.
    """
    parent = Path(repository).parent
    if parent.is_dir():
        beside = listed(sorted(path.name for path in parent.iterdir()), 5)
        raise UserError(
            f"{repository} does not exist, and as a model of the Hugging Face Hub it {fault}. "
            f"Correct the path or the name; the directory {parent} holds {beside or 'nothing'}."
        )


def hub_reason(error: Exception) -> str:
    """An error of the Hub in a few words: the first cause that is not a wrapper."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if type(cause).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set"
    return brief(cause)
