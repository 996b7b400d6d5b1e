"""Find the rows that earlier starts have sent to a Weights & Biases run.

A resumed run does not send these rows again. wandb writes rows to its file in blocks of 32 KB, so a
killed process may have lost its last rows. The resumed run reads the lost rows from `metrics.jsonl`
and sends them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BLOCK, FILE_HEADER, HEAD = 32768, 7, 7  # sizes in bytes in LevelDB's log format
WHOLE, LAST = 1, 4  # types of fragments that complete a record

Row = tuple[int, bool]


def row_of(values: Mapping[str, Any]) -> Row:
    """The key of a row: its step, and whether it is an evaluation.

    Training metrics and an evaluation may have the same step.
    """
    return int(values["step"]), any(name.startswith("eval/") for name in values)


def written_rows(directory: Path, run_id: str, except_in: Path) -> set[Row]:
    """Keys of the metric rows in W&B files of earlier starts.

    Args:
        directory: directory with one subdirectory per start.
        run_id: id of the W&B run.
        except_in: subdirectory of this start, which is skipped.
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
        if BLOCK - at % BLOCK < HEAD:  # too little room for a fragment: the block ends with padding
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
    """The values of a history record; empty for other records."""
    from wandb.proto.wandb_internal_pb2 import Record

    parsed = Record()
    parsed.ParseFromString(record)
    items = parsed.history.item if parsed.HasField("history") else ()
    return {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for item in items
        if item.value_json
    }
