"""Read Parquet and Arrow files as tables, starting at any row, and convert tables to Python rows.

Files are read by Parquet row group or Arrow record batch, one at a time. Row groups and record
batches before the start row are skipped. The group or batch with the start row is read, and rows
before the start row are dropped. Only columns of type JSON are decoded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from consyn_jax.errors import UserError, brief

BATCH_ROWS = 256
# Bytes of Arrow values. Python objects made from them take several times this memory.
BATCH_BYTES = 4 << 20
READ_BYTES = 1 << 20
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

_Read = tuple[Any, Sequence[str], int, int]
"""(Record batch, names of all columns, rows skipped before the batch, bytes up to its end)."""


class Part(NamedTuple):
    """Consecutive rows of a file or of a Hub dataset.

    Attributes:
        table: the needed columns. If the file has no needed column, the table has all columns of
            the file, with nulls instead of values.
        names: names of all columns of the file.
        bytes_done: bytes of the file read up to the end of this part; 0 while streaming.
        place: the file or dataset, for messages.
    """

    table: Any
    names: Sequence[str]
    bytes_done: int
    place: str


def tables(paths: tuple[Path, ...], start: int, columns: Sequence[str]) -> Iterator[Part]:
    """Read the rows of several files from row `start` on, as parts."""
    before = 0
    for path in paths:
        read = _parquet if path.suffix.lower() == ".parquet" else _arrow
        with _damage(path):
            skipped = 0
            for table, names, num_skipped, num_bytes in read(path, start, columns):
                skipped += num_skipped
                if table is not None and table.num_rows:
                    yield Part(table, names, before + num_bytes, str(path))
            start -= skipped
            before += path.stat().st_size


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn errors of pyarrow into a `UserError`."""
    import pyarrow as pa

    try:
        yield
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror or brief(error)}. "
            "Check the path and its permissions."
        ) from error
    # Damaged names of columns raise a UnicodeDecodeError.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is damaged or cut short: {brief(error)}. Download or write the file again."
        ) from error


def _parquet(path: Path, start: int, columns: Sequence[str]) -> Iterator[_Read]:
    """Read a Parquet file from row `start` on; row groups before that row are not read."""
    import pyarrow.parquet as pq

    num_bytes = path.stat().st_size
    # With a buffer and without pre-buffering, pyarrow reads a row group page by page.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES) as file:
        names = file.schema_arrow.names
        chosen = choose(names, columns, path)
        done, total = 0, max(file.metadata.num_rows, 1)
        for index in range(file.num_row_groups):
            group = file.metadata.row_group(index)
            skip = min(start, group.num_rows)
            start, done = start - skip, done + skip
            if skip == group.num_rows or not chosen:
                left = group.num_rows - skip
                done += left
                yield without_values(names, left), names, skip, num_bytes * done // total
                continue
            # The size of all columns is an upper bound for the chosen columns. The size of a single
            # column is not used, because reading it aborts the process if the file is damaged
            # (pyarrow 26).
            row_bytes = max(group.total_byte_size, 1)
            num_rows = min(max(BATCH_BYTES * group.num_rows // row_bytes, 1), 4 * BATCH_ROWS)
            unread = skip
            for table in file.iter_batches(
                num_rows, row_groups=[index], columns=chosen, use_threads=False
            ):
                passed = min(unread, table.num_rows)
                unread -= passed
                done += table.num_rows - passed
                yield table.slice(passed), names, passed, num_bytes * done // total


def _arrow(path: Path, start: int, columns: Sequence[str]) -> Iterator[_Read]:
    """Read an Arrow file from row `start` on; record batches before that row are not read."""
    chosen: list[str] | None = None
    names: list[str] = []
    for table, num_bytes in _record_batches(path):
        if chosen is None:
            names = table.schema.names
            chosen = choose(names, columns, path)
        skip = min(start, table.num_rows)
        start -= skip
        if skip == table.num_rows or not chosen:
            yield without_values(names, table.num_rows - skip), names, skip, num_bytes
            continue
        table = table.select(chosen)
        # Check the offsets, because a wrong offset would read arbitrary memory.
        table.validate(full=True)
        yield table.slice(skip), names, skip, num_bytes


def _record_batches(path: Path) -> Iterator[tuple[Any, int]]:
    """Yield (record batch, bytes of the file up to the end of this batch) of an Arrow file.

    The file has the IPC file format, or the IPC stream format that `datasets` writes.
    """
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
            raise pa.ArrowInvalid("the end-of-stream mark is missing")


def choose(names: Sequence[str], columns: Sequence[str], place: Path | str) -> list[str]:
    """Select the columns of a file that contain the wanted keys.

    The key "a.b" may be the column "a.b", or a field inside the column "a".

    Args:
        names: all columns of the file.
        columns: the wanted keys.
        place: the file, for messages.

    Raises:
        UserError: two columns have the same name.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{place} has several columns named {twice[0]!r}. Rename all but one.")
    wanted = {*columns, *(key.split(".")[0] for key in columns)}
    return [name for name in names if name in wanted]


def without_values(names: Sequence[str], num_rows: int) -> Any:
    """Build a table of nulls with all columns, for a file that has none of the needed columns.

    The message about the missing key can then list the column names.
    """
    import pyarrow as pa

    return pa.record_batch({name: pa.nulls(num_rows) for name in names})


def pieces(table: Any) -> Iterator[Any]:
    """Split `table` into pieces of at most `BATCH_ROWS` rows and `BATCH_BYTES` bytes.

    A piece with too many bytes is halved repeatedly, down to a single row.
    """
    if table.num_rows > BATCH_ROWS:
        for offset in range(0, table.num_rows, BATCH_ROWS):
            yield from pieces(table.slice(offset, BATCH_ROWS))
    elif table.num_rows > 1 and table.nbytes > BATCH_BYTES:
        half = table.num_rows // 2
        yield from pieces(table.slice(0, half))
        yield from pieces(table.slice(half))
    else:
        yield table


def python_rows(table: Any) -> list[dict[str, Any]]:
    """Convert the rows of a table to dictionaries, with JSON columns decoded."""
    made = table.to_pylist()
    for field in table.schema:
        decode = _json_decoder(field.type)
        if decode:
            for row in made:
                row[field.name] = decode(row[field.name])
    return made


def _json_decoder(kind: Any) -> Callable[[Any], Any] | None:
    """Make a function that decodes JSON in values of an Arrow type; None if there is no JSON.

    `datasets` gives the type `Json` to fields whose structure differs between rows, such as the
    arguments of tool calls in `messages`. The function decodes them as `datasets` does.
    """
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        return lambda value: value if value is None else json.loads(value)
    if pa.types.is_struct(kind):
        inside = {field.name: decode for field in kind if (decode := _json_decoder(field.type))}
        if inside:
            return lambda value: (
                value
                if value is None
                else {name: inside[name](x) if name in inside else x for name, x in value.items()}
            )
    elif (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ):
        item = _json_decoder(kind.value_type)
        if item:
            return lambda value: value if value is None else [item(x) for x in value]
    return None
