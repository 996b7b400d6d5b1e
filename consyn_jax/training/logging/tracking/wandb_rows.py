"""The rows of a Weights & Biases run that earlier starts have written, so none is sent twice.

wandb keeps rows in blocks of 32 KB until they are full, so a start that was killed may have lost
its last ones. `metrics.jsonl` has them, and the next start sends those that are missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BLOCK, FILE_HEADER, HEAD = 32768, 7, 7  # bytes; a file is a log in the format of LevelDB
WHOLE, LAST = 1, 4  # kinds of parts that complete a record

Row = tuple[int, bool]


def row_of(values: Mapping[str, Any]) -> Row:
    """The step of a row, and whether it is an evaluation, as both may have the same step."""
    return int(values["step"]), any(name.startswith("eval/") for name in values)


def written_rows(directory: Path, run_id: str, except_in: Path) -> set[Row]:
    """The rows of metrics in the files of earlier starts.

    Args:
        directory: the directory of all W&B runs.
        except_in: the directory of this start.
    """
    found: set[Row] = set()
    for path in directory.glob(f"*-{run_id}/run-{run_id}.wandb"):
        if path.parent != except_in:
            rows = (_values(record) for record in _records(path.read_bytes()))
            found |= {row_of(row) for row in rows if "step" in row and "tokens" in row}
    return found


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file, without an incomplete last record."""
    at, record = FILE_HEADER, b""
    while at + HEAD <= len(data):
        if BLOCK - at % BLOCK < HEAD:  # nothing begins so near the end of a block
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part = data[at + HEAD : at + HEAD + length]
        if not kind or len(part) < length:
            return
        at, record = at + HEAD + length, record + part
        if kind in (WHOLE, LAST):
            yield record
            record = b""


def _values(record: bytes) -> dict[str, Any]:
    """The values of a row of the history; empty for other records."""
    from wandb.proto.wandb_internal_pb2 import Record

    parsed = Record()
    parsed.ParseFromString(record)
    items = parsed.history.item if parsed.HasField("history") else ()
    return {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for item in items
        if item.value_json
    }
