"""Upload a converted model to the Hugging Face Hub as one commit."""

from __future__ import annotations

from pathlib import Path

from consyn_jax.errors import UserError
from consyn_jax.hub_download import hub_reason, is_hub_name


def check_hub_name(name: str) -> None:
    """Check the form of `--push_to_hub`, before slow work.

    Raises:
        UserError: The value does not have the form owner/name.
    """
    if not is_hub_name(name):
        raise UserError(
            f"--push_to_hub {name} is not a valid name on the Hub. Give a name of the form "
            "owner/name."
        )


def push(path: Path, name: str, card: str) -> str:
    """Upload a directory, or a single file with its card, and return its URL.

    All files become visible in one commit; a failure or a kill leaves the model on the Hub
    unchanged.

    Raises:
        UserError: The Hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    files = [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else []
    operations = [CommitOperationAdd(str(file.relative_to(path)), str(file)) for file in files]
    if not path.is_dir():
        operations = [
            CommitOperationAdd(path.name, str(path)),
            CommitOperationAdd("README.md", card.encode()),
        ]
    api = HfApi()
    try:
        api.create_repo(name, repo_type="model", exist_ok=True)
        done = api.create_commit(name, operations, commit_message="Upload by consyn-convert")
    except LocalTokenNotFoundError as error:
        raise UserError(
            f"{path} is written, but not uploaded, because you are not logged in to the Hub. "
            f"Run `hf auth login`, then `hf upload {name} {path}`."
        ) from error
    # huggingface_hub wraps errors of an upload in a RuntimeError.
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} is written, but not uploaded to {name}: {hub_reason(error)}. Once that is "
            f"fixed, run `hf upload {name} {path}`."
        ) from error
    return str(done.commit_url or name)
