"""Read the cache of `datasets`, and the JSON files that `datasets` writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from consyn_jax.data.sources.huggingface.hub_names import HubName
from consyn_jax.errors import UserError, brief, listed, nearest

SHOWN_NAMES = 20


def files_in_cache(hub: HubName) -> tuple[Path, ...]:
    """List the Arrow files of a dataset in the cache; empty if it is not downloaded yet."""
    copy = _newest(_copies(hub))
    return cached_files(hub, copy) if copy else ()


def cached_copy(hub: HubName) -> Path:
    """Find the cached copy of a dataset, for use when the Hub cannot be reached.

    If `hub` names a commit, this is the copy of that commit, otherwise the newest copy.

    Raises:
        UserError: the cache has no copy, or has several configurations and `hub` names none.
    """
    copies = _copies(hub)
    if not copies:
        others = sorted(
            {
                f"{hub.repository}@{path.name}:{path.parent.parent.name}"
                for path in _copies(replace(hub, revision=None, config=None))
            }
        )
        there = f"only as {listed(others, SHOWN_NAMES)}" if others else ""
        name = str(hub).removesuffix("::train")
        raise UserError(
            f"The dataset {name} is {f'in the cache {there}' if others else 'not in the cache'}, "
            "and the Hugging Face Hub cannot be reached. Check the network and "
            "HF_HUB_OFFLINE, or give a dataset that is in the cache."
        )
    newest = _newest(copies)
    if newest is None:
        configs = ", ".join(sorted({path.parent.parent.name for path in copies}))
        raise UserError(
            f"The cache has several configurations of the dataset {hub.repository}: {configs}. "
            f"Choose one with {hub.repository}:CONFIG."
        )
    return newest


def cached_files(hub: HubName, directory: Path) -> tuple[Path, ...]:
    """List the Arrow files of a split in a directory of the cache."""
    from datasets.naming import filenames_for_dataset_split

    splits = saved(directory / "dataset_info.json").get("splits") or {}
    check_split(hub, list(splits))
    split = splits[hub.split]
    name = split.get("dataset_name") or hub.repository.rpartition("/")[2]
    files = filenames_for_dataset_split(
        str(directory), name, hub.split, "arrow", split.get("shard_lengths")
    )
    return tuple(map(Path, files))


def cached_splits(directory: Path) -> tuple[str, ...]:
    """List the splits in a directory of the cache."""
    return tuple(saved(directory / "dataset_info.json").get("splits") or {})


def _copies(hub: HubName) -> list[Path]:
    """List the directories NAME/CONFIG/VERSION/COMMIT in the cache that match `hub`, oldest first.

    If `hub.revision` is a tag or branch, the list is empty: the directories have names of commits.
    """
    import datasets
    from datasets.naming import camelcase_to_snakecase

    *owner, name = hub.repository.split("/")
    directory = "___".join([*owner, camelcase_to_snakecase(name)])
    root = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / directory
    found = [
        path.parent
        for path in root.glob("*/*/*/dataset_info.json")
        if not path.parent.name.endswith(".incomplete")
    ]
    fitting = [
        path
        for path in found
        if hub.revision in (None, path.name) and hub.config in (None, path.parent.parent.name)
    ]
    return sorted(fitting, key=lambda path: (path.stat().st_mtime, path))


def _newest(copies: Sequence[Path]) -> Path | None:
    """Choose the cached copy of the newest commit.

    If several configurations of this commit are cached, choose "default"; return None if
    "default" is not among them.
    """
    last = [path for path in copies if path.name == copies[-1].name]
    default = [path for path in last if path.parent.parent.name == "default"]
    chosen = default or last
    return chosen[-1] if len({path.parent.parent for path in chosen}) == 1 else None


def saved(path: Path, key: str | None = None) -> Any:
    """Read a JSON file that `datasets` wrote; return its object, or the list at `key` if given."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        value = content if key is None else content[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is missing or was not written by save_to_disk ({brief(error)}). "
            "Save the dataset again."
        ) from error
    if not isinstance(value, dict if key is None else list):
        raise UserError(f"{path} was not written by save_to_disk. Save the dataset again.")
    return value


def check_split(hub: HubName, splits: Sequence[str]) -> None:
    """Raise a `UserError` if a Hub dataset lacks the split that `hub` names."""
    form = f"{hub.repository}:{hub.config or ''}:SPLIT"
    check_name("split", hub.split, splits, f"The dataset {hub.repository}", form)


def check_name(what: str, name: str, names: Sequence[str], place: str, form: str) -> None:
    """Check that `name` is among `names`.

    Raises:
        UserError: there is no such name. The message lists the names, and shows how to choose one
            (`form`).
    """
    if name not in names:
        raise UserError(
            f"{place} has no {what} {name!r}; it has {listed(names, SHOWN_NAMES) or 'none'}"
            f"{nearest(name, names)} Choose one with {form}."
        )
