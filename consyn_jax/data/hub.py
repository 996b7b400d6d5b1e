"""Datasets of the Hugging Face Hub: their names and commits, and their rows as Arrow tables, from the cache or over the network.

A dataset is downloaded and laid out as Arrow files by `datasets`, in its cache, and then read like any other file; the exception is
`stream`, which leaves nothing on the disk and has to pass over the rows before a position. Nothing that comes with data is run.

The commit of a dataset is found once, by `identity`, whose answer is itself a name: what was hashed is what is read.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from consyn_jax.config import UserError, nearest
from consyn_jax.data.arrow_tables import BATCH_ROWS, choose, line, tables, without_values

DEFAULT_SPLIT = "train"
ANSWER_S = 20.0
SHOWN_NAMES = 20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SPEC = re.compile(r"(?P<repository>[^@:]+)(@(?P<revision>[^:]+))?(:(?P<config>[^:]*)(:(?P<split>[^:]+))?)?")
_REPOSITORY = re.compile(r"([\w.-]+/)?[\w.-]{1,96}", re.ASCII)
_NO_REVISION = re.compile(r"[\s~^?*\[\\@]|\.\.|^[/-]|/$")
_NO_CONFIG = re.compile(r"[<>/\\|?*]")
_SPLIT = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True)
class HubName:
    """A dataset of the Hugging Face Hub, as in `owner/name@revision:config:split`.

    Attributes:
        repository: `owner/name`, or the `name` of one of the oldest datasets, which have no owner.
        revision: a branch, tag or commit; None is the newest commit of the main branch.
        config: one of the dataset's configurations; None is the default one, or the only one.
    """

    repository: str
    revision: str | None = None
    config: str | None = None
    split: str = DEFAULT_SPLIT

    def __str__(self) -> str:
        """The name that `parse_hub_name` gives this back for."""
        return f"{self.repository}{f'@{self.revision}' if self.revision else ''}:{self.config or ''}:{self.split}"


def parse_hub_name(spec: str) -> HubName | None:
    """The parts of `NAME[@REVISION][:CONFIG[:SPLIT]]`; None where no dataset of the Hub can be called that. CONFIG may be left empty.

    The rules for NAME are those of `huggingface_hub.utils.validate_repo_id`.

    >>> parse_hub_name("allenai/c4:en:validation")
    HubName(repository='allenai/c4', revision=None, config='en', split='validation')
    >>> parse_hub_name("stas/openwebtext-10k@refs/convert/parquet").revision
    'refs/convert/parquet'
    >>> parse_hub_name("./corpus.txt")
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        return None
    repository, revision, config, split = match["repository"], match["revision"], match["config"], match["split"]
    if not _REPOSITORY.fullmatch(repository) or "--" in repository or ".." in repository or repository.endswith(".git"):
        return None
    if any(part[0] in "-." or part[-1] in "-." for part in repository.split("/")):
        return None
    if revision is not None and _NO_REVISION.search(revision):
        return None
    if (config == "" and split is None) or (config is not None and _NO_CONFIG.search(config)):
        return None
    if split is not None and not _SPLIT.fullmatch(split):
        return None
    return HubName(repository, revision, config or None, split or DEFAULT_SPLIT)


def hub_name(name: str) -> HubName:
    """As `parse_hub_name`; `UserError` where it gives None."""
    hub = parse_hub_name(name)
    if hub is None:
        raise UserError(f"{name} is neither a file nor the name of a dataset of the Hugging Face Hub. Those are as in owner/name or owner/name:config:split.")
    return hub


def identity(name: str) -> str:
    """The dataset of the Hub behind `name` with its commit: the same string whenever the rows are the same, and a name for them.

    Where the Hub cannot be reached, the commit is the one last seen, or that of the newest copy in the cache of `datasets`.

    Raises:
        UserError: no such dataset or revision, or no access to it; neither the Hub nor a copy of the dataset can be reached.
    """
    hub, _ = _find(hub_name(name))
    if hub.revision is None or not _COMMIT.fullmatch(hub.revision):
        hub = replace(hub, revision=_cached(hub).name)
    return str(hub)


def files_in_cache(hub: HubName) -> tuple[Path, ...]:
    """The Arrow files of a dataset that are in the cache; none before it is downloaded."""
    copy = _newest(_copies(hub))
    return _cached_files(hub, copy) if copy else ()


def downloaded_files(hub: HubName) -> tuple[Path, ...]:
    """The Arrow files of a dataset of the Hub, which is downloaded if it is not in the cache."""
    hub, reached = _find(hub)
    with suppress(_OutOfReachError):
        if reached:
            builder = _builder(hub)
            with _hub_errors(hub):
                builder.download_and_prepare()
            return _cached_files(hub, Path(builder.cache_dir))
    return _cached_files(hub, _cached(hub))


def stream(hub: HubName, start: int, columns: Sequence[str]) -> Iterator[tuple[Any, int, str]]:
    """As `arrow_tables.tables`, straight from the Hub."""
    hub, reached = _find(hub)
    splits = None
    with suppress(_OutOfReachError):
        if reached:
            builder = _builder(hub)
            with _hub_errors(hub):
                splits = builder.as_streaming_dataset()
    if splits is None:
        yield from tables(_cached_files(hub, _cached(hub)), start, columns)
        return
    check_name("split", hub.split, list(splits), f"The dataset {hub.repository}", f"{hub.repository}:{hub.config or ''}:SPLIT")
    batches = iter(splits[hub.split].skip(start).with_format("arrow").iter(BATCH_ROWS))
    place = f"the dataset {hub.repository}"
    while True:
        try:
            with _hub_errors(hub):
                table = next(batches, None)
        except _OutOfReachError as error:
            raise UserError(f"The Hugging Face Hub cannot be reached any more while {place} is streamed: {error}. Run the same command again.") from error
        if table is None:
            return
        names = table.schema.names
        chosen = choose(names, columns, place)
        yield table.select(chosen) if chosen else without_values(names, table.num_rows), 0, place


# -------------------------------------------------------------------------------------------------------------- asking the Hub


class _OutOfReachError(Exception):
    """The Hub cannot be reached, and what is asked of it may be in the cache."""


@contextmanager
def _hub_errors(hub: HubName) -> Iterator[None]:
    """What can go wrong with the Hub, as a `UserError` or `_OutOfReachError`; `datasets` and `huggingface_hub` stay silent."""
    import datasets
    import huggingface_hub.utils
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        huggingface_hub.utils.logging.set_verbosity(huggingface_hub.utils.logging.CRITICAL)
        try:
            yield
        except (UserError, _OutOfReachError):
            raise
        except Exception as error:  # the two libraries let through whatever theirs raise
            chain = _causes(error)
            name, text = hub.repository, " ".join(map(line, chain))
            if any(isinstance(e, GatedRepoError) for e in chain) or "is a gated dataset" in text:
                raise UserError(
                    f"The dataset {name} is gated. Ask for access at https://huggingface.co/datasets/{name}, then log in with `hf auth login`."
                ) from error
            if any(isinstance(e, RevisionNotFoundError) for e in chain):
                raise UserError(f"The dataset {name} has no revision {hub.revision!r}. Give a branch, a tag or a commit of it.") from error
            if any(isinstance(e, RepositoryNotFoundError | datasets.exceptions.DatasetNotFoundError) for e in chain):
                raise UserError(f"There is no dataset {name} on the Hugging Face Hub, or it is private. Check the name, or try `hf auth login`.") from error
            if "Dataset scripts are no longer supported" in text:
                raise UserError(
                    f"The dataset {name} comes as a program, and nothing that comes with data is run. {name}@refs/convert/parquet may hold its rows as files."
                ) from error
            answered = any(isinstance(e, HfHubHTTPError) and not _is_out_of_reach(e) for e in chain)
            if not answered and any(map(_is_out_of_reach, chain)):
                raise _OutOfReachError(line(error)) from error
            raise UserError(f"The dataset {name} cannot be read: {line(chain[-1] if str(chain[-1]) else error)}.") from error


def _causes(error: Exception) -> list[Exception]:
    """`error`, and what led to it."""
    chain: list[Exception] = []
    cause: BaseException | None = error
    while isinstance(cause, Exception) and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ if cause.__cause__ or cause.__suppress_context__ else cause.__context__
    return chain


def _is_out_of_reach(error: Exception) -> bool:
    """Whether `error` says that the Hub, or the network before it, did not answer."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, HfHubHTTPError):
        return error.response is None or error.response.status_code >= 500
    # By name, since `huggingface_hub` has used three HTTP libraries so far.
    transport = any(kind.__name__ in ("TransportError", "RequestException") for kind in type(error).__mro__)
    return transport or isinstance(error, ConnectionError | TimeoutError | LocalEntryNotFoundError)


def _find(hub: HubName) -> tuple[HubName, bool]:
    """`hub` with its full name and its commit, and whether the Hub could be asked; if not, the commit is the last one seen, where there is any."""
    try:
        with _hub_errors(hub):
            from huggingface_hub import dataset_info, hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError

            info = dataset_info(hub.repository, revision=hub.revision, timeout=ANSWER_S)
            if hub.revision is None or not _COMMIT.fullmatch(hub.revision):
                with suppress(EntryNotFoundError):  # this notes in the cache which commit the revision is, for when there is no network
                    hf_hub_download(info.id, "README.md", repo_type="dataset", revision=hub.revision)
            return replace(hub, repository=info.id, revision=info.sha), True
    except _OutOfReachError:
        pass
    with suppress(_OutOfReachError), _hub_errors(hub):
        card = hf_hub_download(hub.repository, "README.md", repo_type="dataset", revision=hub.revision, local_files_only=True)
        return replace(hub, revision=Path(card).parent.name), False
    return hub, False


def _builder(hub: HubName) -> Any:
    """What `datasets` makes of the repository at a commit."""
    with _hub_errors(hub):
        import datasets

        # A directory of that name is not meant: had it been, it would have been found before.
        place = f"hf://datasets/{hub.repository}"
        try:
            builder = datasets.load_dataset_builder(place, hub.config, revision=hub.revision)
        except ValueError as error:
            configs = datasets.get_dataset_config_names(place, revision=hub.revision)
            form = f"{hub.repository}:CONFIG"
            if hub.config is not None:
                check_name("configuration", hub.config, configs, f"The dataset {hub.repository}", form)
            elif len(configs) > 1:
                shown = ", ".join(configs[:SHOWN_NAMES]) + (", ..." if len(configs) > SHOWN_NAMES else "")
                raise UserError(f"The dataset {hub.repository} has several configurations: {shown}. Choose one with {form}.") from error
            raise
        if builder.hash != hub.revision:
            raise _OutOfReachError("datasets offers another commit from its cache")
        return builder


def _copies(hub: HubName) -> list[Path]:
    """What is in the cache of `datasets` for `hub`, oldest first: directories NAME/CONFIG/VERSION/COMMIT.

    A tag or branch that was never seen on this machine fits none of them.
    """
    import datasets
    from datasets.naming import camelcase_to_snakecase

    *owner, name = hub.repository.split("/")
    root = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "___".join([*owner, camelcase_to_snakecase(name)])
    found = [path.parent for path in root.glob("*/*/*/dataset_info.json") if not path.parent.name.endswith(".incomplete")]
    fitting = [path for path in found if hub.revision in (None, path.name) and hub.config in (None, path.parent.parent.name)]
    return sorted(fitting, key=lambda path: (path.stat().st_mtime, path))


def _cached(hub: HubName) -> Path:
    """The copy in the cache to read without the Hub: that of the commit, else the one made last.

    Raises:
        UserError: there is none, or `hub` does not say which of several configurations.
    """
    copies = _copies(hub)
    if not copies:
        others = sorted({f"{hub.repository}@{path.name}:{path.parent.parent.name}" for path in _copies(replace(hub, revision=None, config=None))})
        there = f"is in the cache only as {', '.join(others[:SHOWN_NAMES])}" if others else "is not in the cache"
        raise UserError(
            f"The dataset {hub} {there}, and the Hugging Face Hub cannot be reached. "
            "Check the network and HF_HUB_OFFLINE; without the Hub, only what is in the cache can be read."
        )
    newest = _newest(copies)
    if newest is None:
        configs = ", ".join(sorted({path.parent.parent.name for path in copies}))
        raise UserError(f"The cache holds several configurations of the dataset {hub.repository}: {configs}. Choose one with {hub.repository}:CONFIG.")
    return newest


def _newest(copies: Sequence[Path]) -> Path | None:
    """Of the copies of one dataset the one made last, in its only or its default configuration; None where that is not clear."""
    last = [path for path in copies if path.name == copies[-1].name]
    default = [path for path in last if path.parent.parent.name == "default"]
    chosen = default or last
    return chosen[-1] if len({path.parent.parent for path in chosen}) == 1 else None


def _cached_files(hub: HubName, directory: Path) -> tuple[Path, ...]:
    from datasets.naming import filenames_for_dataset_split

    splits = saved(directory / "dataset_info.json").get("splits") or {}
    check_name("split", hub.split, list(splits), f"The dataset {hub.repository}", f"{hub.repository}:{hub.config or ''}:SPLIT")
    split = splits[hub.split]
    name = split.get("dataset_name") or hub.repository.rpartition("/")[2]
    return tuple(Path(file) for file in filenames_for_dataset_split(str(directory), name, hub.split, "arrow", split.get("shard_lengths")))


# --------------------------------------------------------------------------------------------------------- what datasets wrote


def saved(path: Path, key: str | None = None) -> Any:
    """What a JSON file of `save_to_disk` holds: an object, or the list under `key` in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        value = content if key is None else content[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is missing or not what save_to_disk writes ({line(error)}). Save the dataset again.") from error
    if not isinstance(value, dict if key is None else list):
        raise UserError(f"{path} is not what save_to_disk writes. Save the dataset again.")
    return value


def check_name(what: str, name: str, names: Sequence[str], place: str, form: str) -> None:
    """`UserError` where `place` has no `what` of that name; `form` is how one is asked for."""
    if name not in names:
        shown = ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
        raise UserError(f"{place} has no {what} {name!r}; it has {shown or 'none'}{nearest(name, names)} Choose one with {form}.")
