"""Datasets of the Hugging Face Hub: their commits and rows, from the cache or the network.

`datasets` downloads a dataset into its cache as Arrow files, which are then read like any others.
`stream` keeps nothing on the disk, but must skip the rows before a position. Nothing that comes
with the data is run.

The commit of a dataset is found once, by `identity`. The result is itself a name, so the commit
that was hashed is also the one that is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from consyn_jax.data.sources.huggingface.arrow_tables import (
    BATCH_ROWS,
    Part,
    choose,
    tables,
    without_values,
)
from consyn_jax.data.sources.huggingface.hub_cache import (
    SHOWN_NAMES,
    cached_copy,
    cached_files,
    cached_splits,
    check_name,
    check_split,
)
from consyn_jax.data.sources.huggingface.hub_errors import OutOfReachError, hub_errors
from consyn_jax.data.sources.huggingface.hub_names import HubName, hub_name
from consyn_jax.errors import UserError, listed

ANSWER_S = 20.0
_COMMIT = re.compile(r"[0-9a-f]{40}")


def identity(name: str) -> str:
    """The name of a dataset with its commit, which names exactly these rows.

    If the Hub cannot be reached, the commit is the one last seen, or that of the newest copy in the
    cache of `datasets`.

    Raises:
        UserError: no such dataset or revision, or no access to it; or neither the Hub nor a copy of
            the dataset can be reached.
    """
    hub, _ = _find(hub_name(name))
    if hub.revision is None or not _COMMIT.fullmatch(hub.revision):
        hub = replace(hub, revision=cached_copy(hub).name)
    return str(hub)


def other_splits(name: str) -> tuple[str, ...]:
    """Names of the splits of a dataset besides the one that `name` has, without reading any.

    If the Hub cannot be reached, they are read from the copy in the cache of `datasets`.

    Raises:
        UserError: as for `identity`, or the dataset has several configurations.
    """
    hub, reached = _find(hub_name(name))
    splits: Sequence[Any] | None = None
    with suppress(OutOfReachError):
        if reached:
            builder = _builder(hub)
            splits = list(builder.config.data_files or builder.info.splits or ())
    if splits is None:
        splits = cached_splits(cached_copy(hub))
    others = [str(split) for split in splits if str(split) != hub.split]
    return tuple(str(replace(hub, split=split)) for split in others)


def downloaded_files(hub: HubName) -> tuple[Path, ...]:
    """The Arrow files of a dataset, which is downloaded if it is not in the cache."""
    hub, reached = _find(hub)
    with suppress(OutOfReachError):
        if reached:
            builder = _builder(hub)
            with hub_errors(hub):
                builder.download_and_prepare()
            return cached_files(hub, Path(builder.cache_dir))
    return cached_files(hub, cached_copy(hub))


def stream(hub: HubName, start: int, columns: Sequence[str]) -> Iterator[Part]:
    """Read a dataset straight from the Hub, as `arrow_tables.tables` reads files."""
    hub, reached = _find(hub)
    splits = None
    with suppress(OutOfReachError):
        if reached:
            builder = _builder(hub)
            with hub_errors(hub):
                splits = builder.as_streaming_dataset()
    if splits is None:
        yield from tables(cached_files(hub, cached_copy(hub)), start, columns)
        return
    check_split(hub, list(splits))
    batches = iter(splits[hub.split].skip(start).with_format("arrow").iter(BATCH_ROWS))
    place = f"the dataset {hub.repository}"
    while True:
        try:
            with hub_errors(hub):
                table = next(batches, None)
        except OutOfReachError as error:
            raise UserError(
                f"The Hugging Face Hub cannot be reached any more while {place} is streamed: "
                f"{error}. Run the same command again."
            ) from error
        if table is None:
            return
        names = table.schema.names
        chosen = choose(names, columns, place)
        read = table.select(chosen) if chosen else without_values(names, table.num_rows)
        yield Part(read, names, 0, place)


def _find(hub: HubName) -> tuple[HubName, bool]:
    """`hub` with its full name and its commit, and whether the Hub was reached.

    Without the Hub, the commit is the last one seen, if any.
    """
    try:
        with hub_errors(hub):
            from huggingface_hub import dataset_info, hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError

            info = dataset_info(hub.repository, revision=hub.revision, timeout=ANSWER_S)
            if hub.revision is None or not _COMMIT.fullmatch(hub.revision):
                # This records in the cache which commit the revision is, for use offline.
                with suppress(EntryNotFoundError):
                    hf_hub_download(
                        info.id, "README.md", repo_type="dataset", revision=hub.revision
                    )
            return replace(hub, repository=info.id, revision=info.sha), True
    except OutOfReachError:
        pass
    with suppress(OutOfReachError), hub_errors(hub):
        card = hf_hub_download(
            hub.repository,
            "README.md",
            repo_type="dataset",
            revision=hub.revision,
            local_files_only=True,
        )
        return replace(hub, revision=Path(card).parent.name), False
    return hub, False


def _builder(hub: HubName) -> Any:
    """The builder of `datasets` for the repository at a commit."""
    with hub_errors(hub):
        import datasets

        # A local directory of that name is not meant: it would have been found before.
        place = f"hf://datasets/{hub.repository}"
        try:
            builder = datasets.load_dataset_builder(place, hub.config, revision=hub.revision)
        except ValueError as error:
            configs = datasets.get_dataset_config_names(place, revision=hub.revision)
            dataset, form = f"The dataset {hub.repository}", f"{hub.repository}:CONFIG"
            if hub.config is not None:
                check_name("configuration", hub.config, configs, dataset, form)
            elif len(configs) > 1:
                shown = listed(configs, SHOWN_NAMES)
                raise UserError(
                    f"{dataset} has several configurations: {shown}. Choose one with {form}."
                ) from error
            raise
        if builder.hash != hub.revision:
            raise OutOfReachError("datasets offers another commit from its cache")
        return builder
