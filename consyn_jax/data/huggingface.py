"""Rows of Parquet files, Arrow files, datasets written by `save_to_disk`, and datasets of the Hugging Face Hub, from any position on.

A position is the number of rows before it, counted over all files in reading order. Everything comes down to Parquet row groups and
Arrow record batches, so getting to a position costs at most one of these, and memory holds one. A dataset of the Hub is downloaded and
laid out as Arrow files by `datasets`, in its cache, and then read like any other; the exception is `streaming`, which leaves nothing on
the disk and has to pass over the rows before a position. Nothing that came with data is run or unpickled, and nothing is decoded but JSON.

The commit of a dataset of the Hub is found once, by `identity`, whose answer is itself a name: what was hashed is what is read.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from consyn_jax.config import UserError, nearest

SUFFIXES = (".parquet", ".arrow")
DEFAULT_SPLIT = "train"
BATCH_ROWS = 256
# Python objects take several times the bytes of the Arrow values that they are made from.
BATCH_BYTES = 4 << 20
READ_BYTES = 1 << 20
ANSWER_S = 20.0
SHOWN_NAMES = 20
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
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


@dataclass(frozen=True)
class Batch:
    """Some rows, one after the other.

    Attributes:
        rows: a dictionary for each row, by column.
        position: how many rows lie before the end of this batch; `rows(name, position)` goes on behind it.
        bytes_done: how far reading has come, of the bytes that `size` gives; 0 while streaming.
    """

    rows: list[dict[str, Any]]
    position: int
    bytes_done: int


# --------------------------------------------------------------------------------------------------------------------- finding


def look(path: Path) -> bool:
    """Whether `path` is a Parquet file, an Arrow file, or a dataset or one split of several written by `save_to_disk` (`PATH:SPLIT`)."""
    return _local(str(path)) is not None


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


def files(path: Path) -> tuple[Path, ...]:
    """The files that the rows of a local `path` (or `PATH:SPLIT`) come from, in reading order. Their bytes decide what the rows are.

    Raises:
        UserError: a split that is not there; a dataset whose files are missing or do not say what they are.
    """
    found = _local(str(path))
    if found is None:
        raise UserError(f"{path} is neither a Parquet file, an Arrow file nor a dataset written by save_to_disk. Check the path.")
    place, split = found
    if not place.is_dir():
        return (place,)
    if (place / "dataset_dict.json").is_file():
        splits = _saved(place / "dataset_dict.json", "splits")
        _check_name("split", split or DEFAULT_SPLIT, splits, str(place), f"{place}:SPLIT")
        place = place / (split or DEFAULT_SPLIT)
    state = _saved(place / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        # `datasets` itself has stopped reading these, and gives the rows in another order without a word.
        raise UserError(f"{place} was saved by an old version of datasets, with its order in a file of its own. Load it with that version, "
                        "call flatten_indices, and save it again.")  # fmt: skip
    data = [entry.get("filename") if isinstance(entry, dict) else None for entry in _saved(place / "state.json", "_data_files")]
    if not all(isinstance(name, str) and Path(name).name == name for name in data):
        raise UserError(f"{place / 'state.json'} names files outside its directory. Save the dataset again.")
    return tuple(place / str(name) for name in data)


def identity(name: str) -> str:
    """The dataset of the Hub behind `name` with its commit: the same string whenever the rows are the same, and a name for them.

    Where the Hub cannot be reached, the commit is the one last seen, or that of the newest copy in the cache of `datasets`.

    Raises:
        UserError: no such dataset or revision, or no access to it; neither the Hub nor a copy of the dataset can be reached.
    """
    hub, _ = _find(_hub(name))
    if hub.revision is None or not _COMMIT.fullmatch(hub.revision):
        hub = replace(hub, revision=_cached(hub).name)
    return str(hub)


def size(name: str) -> int:
    """Bytes of the files behind `name`; of a dataset of the Hub, those in the cache, so 0 before it is downloaded and when it is streamed."""
    if _local(name):
        found = files(Path(name))
    else:
        hub = _hub(name)
        copy = _newest(_copies(hub))
        found = _cached_files(hub, copy) if copy else ()
    return sum(file.stat().st_size for file in found if file.is_file())


def _local(name: str) -> tuple[Path, str | None] | None:
    """(file or directory, split) of a local name, else None."""
    path = Path(name)
    if path.is_dir():
        saved = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
        return (path, None) if saved or (path / "dataset_dict.json").is_file() else None
    if path.is_file():
        return (path, None) if path.suffix.lower() in SUFFIXES else None
    head, _, split = name.rpartition(":")
    return (Path(head), split) if head and (Path(head) / "dataset_dict.json").is_file() else None


def _hub(name: str) -> HubName:
    hub = parse_hub_name(name)
    if hub is None:
        raise UserError(f"{name} is neither a file nor the name of a dataset of the Hugging Face Hub. Those are as in owner/name or owner/name:config:split.")
    return hub


def _saved(path: Path, key: str | None = None) -> Any:
    """What a JSON file of `save_to_disk` holds: an object, or the list under `key` in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        value = content if key is None else content[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is missing or not what save_to_disk writes ({_line(error)}). Save the dataset again.") from error
    if not isinstance(value, dict if key is None else list):
        raise UserError(f"{path} is not what save_to_disk writes. Save the dataset again.")
    return value


def _check_name(what: str, name: str, names: Sequence[str], place: str, form: str) -> None:
    if name not in names:
        shown = ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
        raise UserError(f"{place} has no {what} {name!r}; it has {shown or 'none'}{nearest(name, names)} Choose one with {form}.")


def _line(error: BaseException) -> str:
    """The beginning of an error's message, on one line."""
    return " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__


# --------------------------------------------------------------------------------------------------------------------- reading


def rows(name: str, start: int, columns: Sequence[str], streaming: bool = False) -> Iterator[Batch]:
    """The rows of `name` from position `start` on, in batches of at most `BATCH_ROWS` rows and, but for a longer row, `BATCH_BYTES` bytes.

    Args:
        name: a local path, `PATH:SPLIT`, or the name of a dataset of the Hub.
        columns: keys of which the rows need those that there are; a column is read if a key, or a key's part before the first dot, is
            its name. Where that is no column at all, the rows have every column, each with None.
        streaming: read a dataset of the Hub without keeping it; no effect on files, or on a copy where the Hub is out of reach.

    Raises:
        UserError: a file that is damaged; whatever hinders getting at a dataset of the Hub.
    """
    if _local(name):
        tables = _tables(files(Path(name)), start, columns)
    else:
        hub = _hub(name)
        tables = _stream(hub, start, columns) if streaming else _tables(_hub_files(hub), start, columns)
    position = start
    for table, bytes_done, place in tables:
        for piece in _pieces(table):
            try:
                made = _python_rows(piece)
            except (ValueError, OverflowError, ArithmeticError) as error:
                raise UserError(f"Row {position} of {place}, or one of the {piece.num_rows - 1} behind it, cannot be read: {_line(error)}.") from error
            position += piece.num_rows
            yield Batch(made, position, bytes_done)


def _tables(paths: tuple[Path, ...], start: int, columns: Sequence[str]) -> Iterator[tuple[Any, int, str]]:
    """(record batch, bytes read up to its end, place) from row `start` of all files on."""
    before = 0
    for path in paths:
        read = _parquet if path.suffix.lower() == ".parquet" else _arrow
        with _damage(path):
            skipped = 0
            for table, num_skipped, num_bytes in read(path, start, columns):
                skipped += num_skipped
                if table is not None and table.num_rows:
                    yield table, before + num_bytes, str(path)
            start -= skipped
            before += path.stat().st_size


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """What pyarrow finds wrong with a file, as a `UserError`."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last for the names of columns
        if isinstance(error, FileNotFoundError | PermissionError):
            raise UserError(f"{path} cannot be read: {error.strerror or _line(error)}. Check the path and its permissions.") from error
        raise UserError(f"{path} is damaged or cut short: {_line(error)}. Fetch or write the file again.") from error


def _parquet(path: Path, start: int, columns: Sequence[str]) -> Iterator[tuple[Any, int, int]]:
    """(record batch, rows passed over for it, bytes up to its end); row groups before `start` are not looked at."""
    import pyarrow.parquet as pq

    num_bytes = path.stat().st_size
    # Without pre-buffering and with a buffer, a row group is read page by page and not as a whole.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES) as file:
        names = file.schema_arrow.names
        chosen = _choose(names, columns, path)
        done, total = 0, max(file.metadata.num_rows, 1)
        for index in range(file.num_row_groups):
            group = file.metadata.row_group(index)
            skip = min(start, group.num_rows)
            start, done = start - skip, done + skip
            if skip == group.num_rows or not chosen:
                left = group.num_rows - skip
                done += left
                yield _without_values(names, left), skip, num_bytes * done // total
                continue
            # Of all columns, which is on the safe side: asking for those of one column aborts the process where the file is damaged (pyarrow 26).
            num_rows = min(max(BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1), 1), 4 * BATCH_ROWS)
            unread = skip
            for table in file.iter_batches(num_rows, row_groups=[index], columns=chosen, use_threads=False):
                passed = min(unread, table.num_rows)
                unread -= passed
                done += table.num_rows - passed
                yield table.slice(passed), passed, num_bytes * done // total


def _arrow(path: Path, start: int, columns: Sequence[str]) -> Iterator[tuple[Any, int, int]]:
    """The same of an Arrow file; the bytes of record batches before `start` stay on the disk."""
    chosen: list[str] | None = None
    names: list[str] = []
    for table, num_bytes in _record_batches(path):
        if chosen is None:
            names = table.schema.names
            chosen = _choose(names, columns, path)
        skip = min(start, table.num_rows)
        start -= skip
        if skip == table.num_rows or not chosen:
            yield _without_values(names, table.num_rows - skip), skip, num_bytes
            continue
        table = table.select(chosen)
        # Offsets in a file are a stranger's numbers; unchecked, a wrong one reads whatever is in memory there.
        table.validate(full=True)
        yield table.slice(skip), skip, num_bytes


def _record_batches(path: Path) -> Iterator[tuple[Any, int]]:
    """(record batch, bytes up to its end) of an Arrow file in the IPC file format or, which is what `datasets` writes, the stream format."""
    import pyarrow as pa

    if path.stat().st_size == 0:
        raise pa.ArrowInvalid("it is empty")
    with pa.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pa.ipc.open_file(source)
            for index in range(file.num_record_batches):
                yield file.get_batch(index), source.size() * (index + 1) // file.num_record_batches
            return
        source.seek(0)
        for table in pa.ipc.open_stream(source):
            yield table, source.tell()
        end = source.tell()
        source.seek(max(end - len(_END_OF_STREAM), 0))
        if source.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
            raise pa.ArrowInvalid("the mark at the end of the stream is missing")


def _choose(names: Sequence[str], columns: Sequence[str], place: Path | str) -> list[str]:
    """Which of the columns `names` are to be read; none where the row's names are all that helps."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{place} has more than one column {twice[0]!r}. Rename one of them.")
    wanted = {*columns, *(key.split(".")[0] for key in columns)}
    return [name for name in names if name in wanted]


def _without_values(names: Sequence[str], num_rows: int) -> Any:
    import pyarrow as pa

    return pa.record_batch({name: pa.nulls(num_rows) for name in names})


def _pieces(table: Any) -> Iterator[Any]:
    """`table` in pieces of at most `BATCH_ROWS` rows, halved until they are within `BATCH_BYTES` or a single row."""
    if table.num_rows > BATCH_ROWS:
        for offset in range(0, table.num_rows, BATCH_ROWS):
            yield from _pieces(table.slice(offset, BATCH_ROWS))
    elif table.num_rows > 1 and table.nbytes > BATCH_BYTES:
        half = table.num_rows // 2
        yield from _pieces(table.slice(0, half))
        yield from _pieces(table.slice(half))
    else:
        yield table


def _python_rows(table: Any) -> list[dict[str, Any]]:
    made = table.to_pylist()
    for field in table.schema:
        decode = _json_decoder(field.type)
        if decode:
            for row in made:
                row[field.name] = decode(row[field.name])
    return made


def _json_decoder(kind: Any) -> Callable[[Any], Any] | None:
    """What turns the JSON in values of an Arrow type into objects, as `datasets.Json` does; None where there is no JSON in them.

    `datasets` gives this type to fields that differ from row to row, such as the arguments of tool calls in `messages`.
    """
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        return lambda value: value if value is None else json.loads(value)
    if pa.types.is_struct(kind):
        inside = {field.name: decode for field in kind if (decode := _json_decoder(field.type))}
        if inside:
            return lambda value: value if value is None else {name: inside[name](x) if name in inside else x for name, x in value.items()}
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        item = _json_decoder(kind.value_type)
        if item:
            return lambda value: value if value is None else [item(x) for x in value]
    return None


# --------------------------------------------------------------------------------------------------------------------- the Hub


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
            name, text = hub.repository, " ".join(map(_line, chain))
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
                raise _OutOfReachError(_line(error)) from error
            raise UserError(f"The dataset {name} cannot be read: {_line(chain[-1] if str(chain[-1]) else error)}.") from error


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
                _check_name("configuration", hub.config, configs, f"The dataset {hub.repository}", form)
            elif len(configs) > 1:
                shown = ", ".join(configs[:SHOWN_NAMES]) + (", ..." if len(configs) > SHOWN_NAMES else "")
                raise UserError(f"The dataset {hub.repository} has several configurations: {shown}. Choose one with {form}.") from error
            raise
        if builder.hash != hub.revision:
            raise _OutOfReachError("datasets offers another commit from its cache")
        return builder


def _hub_files(hub: HubName) -> tuple[Path, ...]:
    """The Arrow files of a dataset of the Hub, which is downloaded if it is not in the cache."""
    hub, reached = _find(hub)
    with suppress(_OutOfReachError):
        if reached:
            builder = _builder(hub)
            with _hub_errors(hub):
                builder.download_and_prepare()
            return _cached_files(hub, Path(builder.cache_dir))
    return _cached_files(hub, _cached(hub))


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

    splits = _saved(directory / "dataset_info.json").get("splits") or {}
    _check_name("split", hub.split, list(splits), f"The dataset {hub.repository}", f"{hub.repository}:{hub.config or ''}:SPLIT")
    split = splits[hub.split]
    name = split.get("dataset_name") or hub.repository.rpartition("/")[2]
    return tuple(Path(file) for file in filenames_for_dataset_split(str(directory), name, hub.split, "arrow", split.get("shard_lengths")))


def _stream(hub: HubName, start: int, columns: Sequence[str]) -> Iterator[tuple[Any, int, str]]:
    """As `_tables`, straight from the Hub."""
    hub, reached = _find(hub)
    splits = None
    with suppress(_OutOfReachError):
        if reached:
            builder = _builder(hub)
            with _hub_errors(hub):
                splits = builder.as_streaming_dataset()
    if splits is None:
        yield from _tables(_cached_files(hub, _cached(hub)), start, columns)
        return
    _check_name("split", hub.split, list(splits), f"The dataset {hub.repository}", f"{hub.repository}:{hub.config or ''}:SPLIT")
    tables = iter(splits[hub.split].skip(start).with_format("arrow").iter(BATCH_ROWS))
    place = f"the dataset {hub.repository}"
    while True:
        try:
            with _hub_errors(hub):
                table = next(tables, None)
        except _OutOfReachError as error:
            raise UserError(f"The Hugging Face Hub cannot be reached any more while {place} is streamed: {error}. Run the same command again.") from error
        if table is None:
            return
        names = table.schema.names
        chosen = _choose(names, columns, place)
        yield table.select(chosen) if chosen else _without_values(names, table.num_rows), 0, place
