"""Parse names of datasets on the Hugging Face Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass

from consyn_jax.errors import UserError

DEFAULT_SPLIT = "train"
_SPEC = re.compile(
    r"(?P<repository>[^@:]+)(@(?P<revision>[^:]+))?(:(?P<config>[^:]*)(:(?P<split>[^:]+))?)?"
)
_REPOSITORY = re.compile(r"([\w.-]+/)?[\w.-]{1,96}", re.ASCII)
_NO_REPOSITORY = re.compile(r"--|\.\.|\.git$|(^|/)[.-]|[.-](/|$)")
_NO_REVISION = re.compile(r"[\s~^?*\[\\@]|\.\.|^[/-]|/$")
_NO_CONFIG = re.compile(r"[<>/\\|?*]")
_SPLIT = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True)
class HubName:
    """Name of a dataset on the Hugging Face Hub, as in `owner/name@revision:config:split`.

    Attributes:
        repository: `owner/name`, or only `name` for some old datasets.
        revision: a branch, tag or commit; None for the newest commit of the main branch.
        config: a configuration of the dataset; None for the default or only configuration.
        split: a split of the dataset.
    """

    repository: str
    revision: str | None = None
    config: str | None = None
    split: str = DEFAULT_SPLIT

    def __str__(self) -> str:
        """The name in the form that `parse_hub_name` parses."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}:{self.config or ''}:{self.split}"


def parse_hub_name(spec: str) -> HubName | None:
    """Parse `NAME[@REVISION][:CONFIG[:SPLIT]]`; None if this is not a valid name of a dataset.

    CONFIG may be empty. NAME follows the rules of `huggingface_hub.utils.validate_repo_id`.

    >>> parse_hub_name("allenai/c4:en:validation")
    HubName(repository='allenai/c4', revision=None, config='en', split='validation')
    >>> parse_hub_name("stas/openwebtext-10k@refs/convert/parquet").revision
    'refs/convert/parquet'
    >>> parse_hub_name("./corpus.txt")
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        return None
    repository, revision = match["repository"], match["revision"]
    config, split = match["config"], match["split"]
    if not _REPOSITORY.fullmatch(repository) or _NO_REPOSITORY.search(repository):
        return None
    if revision is not None and _NO_REVISION.search(revision):
        return None
    if (config == "" and split is None) or (config is not None and _NO_CONFIG.search(config)):
        return None
    if split is not None and not _SPLIT.fullmatch(split):
        return None
    return HubName(repository, revision, config or None, split or DEFAULT_SPLIT)


def names_split(spec: str) -> bool:
    """Whether the name of a dataset chooses a split.

    >>> names_split("allenai/c4:en:train"), names_split("allenai/c4:en")
    (True, False)
    """
    match = _SPEC.fullmatch(spec)
    return match is not None and match["split"] is not None


def hub_name(name: str) -> HubName:
    """Parse a name as `parse_hub_name` does, or raise an error.

    Raises:
        UserError: the name is not valid.
    """
    hub = parse_hub_name(name)
    if hub is None:
        raise UserError(
            f"{name} is neither a file nor the name of a Hugging Face Hub dataset. Such names "
            "have the form owner/name or owner/name:config:split."
        )
    return hub
