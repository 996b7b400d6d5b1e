"""Find commits of Hugging Face Hub datasets, and read rows from the cache or the network.

`datasets` downloads a dataset to its cache as Arrow files, which are then read like local files.
`stream` stores nothing on the disk, but a resumed run has to skip all earlier rows. No code from
the data is run.

`identity` finds the commit of a dataset once, and returns a name that includes the commit. The
rows are read by this name, which is also part of the token store's cache key. So the store cannot
have the rows of another commit.
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
from consyn_jax.errors import AGAIN, UserError, listed

ANSWER_S = 20.0
_COMMIT = re.compile(r"[0-9a-f]{40}")


def identity(name: str) -> str:
    """Return the name of a dataset with its commit; this name determines the rows.

    If the Hub cannot be reached, the last known commit is used, or the commit of the newest copy in
    the cache of `datasets`.

    Raises:
        UserError: the dataset or revision does not exist, access is denied, or the Hub cannot be
            reached and the cache has no copy.
    """
    hub, _ = _find(hub_name(name))
    if hub.revision is None or not _COMMIT.fullmatch(hub.revision):
        hub = replace(hub, revision=cached_copy(hub).name)
    return str(hub)


def other_splits(name: str) -> tuple[str, ...]:
    """Return the full names of all splits of a dataset except the split in `name`.

    No rows are read. If the Hub cannot be reached, the splits are those of the copy in the cache
    of `datasets`.

    Raises:
        UserError: the dataset cannot be found (see `identity`), or has several configurations.
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
    """Return the Arrow files of a dataset; download them first if they are not in the cache."""
    hub, reached = _find(hub)
    with suppress(OutOfReachError):
        if reached:
            builder = _builder(hub)
            with hub_errors(hub):
                builder.download_and_prepare()
            return cached_files(hub, Path(builder.cache_dir))
    return cached_files(hub, cached_copy(hub))


def stream(hub: HubName, start: int, columns: Sequence[str]) -> Iterator[Part]:
    """Read a dataset over the network from row `start` on, without storing it.

    If the Hub cannot be reached, the copy in the cache of `datasets` is read instead.
    """
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
                f"The connection to the Hugging Face Hub was lost while {place} was streamed: "
                f"{error}. Check the network, and {AGAIN}."
            ) from error
        if table is None:
            return
        names = table.schema.names
        chosen = choose(names, columns, place)
        read = table.select(chosen) if chosen else without_values(names, table.num_rows)
        yield Part(read, names, 0, place)


def _find(hub: HubName) -> tuple[HubName, bool]:
    """Look up the full name and commit of `hub`; also return whether the Hub was reached.

    If the Hub cannot be reached, the last known commit is used; if there is none, `hub` is
    unchanged.
    """
    try:
        with hub_errors(hub):
            from huggingface_hub import dataset_info, hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError

            info = dataset_info(hub.repository, revision=hub.revision, timeout=ANSWER_S)
            if hub.revision is None or not _COMMIT.fullmatch(hub.revision):
                # Download a small file, so that the cache records the revision's commit for use
                # offline.
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
    """Load the `datasets` builder of a dataset at a commit."""
    with hub_errors(hub):
        import datasets

        # No local directory has this name, because local paths are tried before the Hub.
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
            raise OutOfReachError("datasets returned another commit from its cache")
        return builder
