"""Plan the shards from the numbers of tokens, and write them (phase "shards")."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from consyn_jax.data.preparation.segments.encode import LAST, PART, SegmentTokens
from consyn_jax.data.preparation.segments.job import Job, document_ids
from consyn_jax.data.split import SPLITS
from consyn_jax.data.store.shard_writer import ShardWriter
from consyn_jax.data.store.store_writer import documents_to_fill
from consyn_jax.files import flush, write_whole

SHARDS = "shards.json"

Place = tuple[int, int]
"""A position: the number of a segment, and of a row in that segment."""
Shard = tuple[int, int, Place, Place]
"""A shard: (number of the split, number of the shard in the split, start, end).

The end is the position after the last row.
"""


def plan_shards(job: Job, tokens: Sequence[Sequence[int]]) -> list[Shard]:
    """Find the start and the end of each shard of all splits.

    Args:
        tokens: number of kept tokens, for each split and each segment.
    """
    return [
        (split, number, *ends)
        for split in range(len(SPLITS))
        for number, ends in enumerate(_shards_of(job, split, [each[split] for each in tokens]))
    ]


def _shards_of(job: Job, split: int, tokens: Sequence[int]) -> Iterator[tuple[Place, Place]]:
    """Yield (start, end) of each shard of a split.

    Only the segments in which a shard ends are read.
    """
    start: Place = (0, 0)
    waiting = 0  # tokens of the open shard before this segment
    for segment, here in enumerate(tokens):
        if waiting + here < job.shard_tokens:
            waiting += here
            continue
        kept = job.array("kept", segment, "splits") == split
        last = np.flatnonzero(kept & (job.array("segments", segment, "flags") & LAST > 0))
        ends = np.cumsum(np.where(kept, job.array("segments", segment, "lengths"), 0))[last]
        begin = -waiting
        while (count := documents_to_fill(ends, begin + job.shard_tokens)) <= len(ends):
            stop = (segment, int(last[count - 1]) + 1)
            yield start, stop
            start, begin = stop, int(ends[count - 1])
        waiting = here - begin
    if waiting:
        yield start, (len(tokens), 0)


def write_shards_plan(job: Job, shards: list[Shard]) -> None:
    """Write the planned shards to a file, for the tasks that write the shards."""
    write_whole(job.results / SHARDS, json.dumps(shards))


def write_shard(job: Job, number: int) -> None:
    """Write the files of a shard into the store.

    The result of the task is the shard's entry in the manifest.
    """
    split, name, start, stop = json.loads((job.results / SHARDS).read_bytes())[number]
    with (
        job.writing("shards", number) as draft,
        # Another process may write the same shard, so files get their names when complete.
        tempfile.TemporaryDirectory(dir=job.shard_drafts) as directory,
    ):
        writer = ShardWriter(Path(directory), f"{SPLITS[split]}-{name:05d}", job.dtype)
        try:
            for segment in range(start[0], min(stop[0] + 1, job.num_segments)):
                first = start[1] if segment == start[0] else 0
                last = stop[1] if segment == stop[0] else None
                _Rows(job, segment, split).write(writer, first, last)
            entry = writer.close()
        except OSError as error:
            error.filename = error.filename or str(job.output)  # a full disk names none
            raise
        finally:
            writer.abandon()
        assert entry is not None
        for path in writer.paths:
            path.rename(job.output / path.name)
        flush(job.output)
        draft.result = entry


class _Rows:
    """The rows of a segment that are kept in a split."""

    def __init__(self, job: Job, segment: int, split: int) -> None:
        self._job, self._segment = job, segment
        self._kept = np.flatnonzero(job.array("kept", segment, "splits") == split)

    def write(self, writer: ShardWriter, first: int, last: int | None) -> None:
        """Append the rows from `first` up to but not including `last` (None: the end)."""
        kept = self._kept[self._kept >= first]
        kept = kept if last is None else kept[kept < last]
        if not len(kept):
            return
        columns = {
            name: np.asarray(self._job.array("segments", self._segment, name))
            for name in ("lengths", "num_bytes", "origins", "flags")
        }
        tokens = SegmentTokens(self._job, self._segment)
        is_part = columns["flags"][kept] & PART > 0
        # A run is one part of a long document, or consecutive documents that are copied together.
        breaks = (np.diff(kept) > 1) | is_part[1:] | is_part[:-1]
        for run in np.split(kept, np.flatnonzero(breaks) + 1):
            self._write_run(writer, run, columns, tokens)

    def _write_run(
        self,
        writer: ShardWriter,
        run: Int64[np.ndarray, " rows"],
        columns: dict[str, Any],
        tokens: SegmentTokens,
    ) -> None:
        here, rows = slice(tokens.starts[run[0]], tokens.ends[run[-1]]), slice(run[0], run[-1] + 1)
        flags = int(columns["flags"][run[0]])
        if not flags & PART:
            writer.append(
                tokens.ids[here],
                columns["lengths"][rows],
                int(columns["num_bytes"][rows].sum()),
                None if tokens.targets is None else tokens.targets[here],
                columns["origins"][rows],
            )
            return
        writer.append_part(tokens.ids[here])
        if flags & LAST:
            end = document_ids(self._segment, run)[0]
            long = int(np.searchsorted(self._job.array("long", 0, "end"), end))
            source, _, stop = columns["origins"][run[0]].tolist()
            begin = int(self._job.array("long", 0, "offset")[long])
            num_bytes = int(self._job.array("long", 0, "num_bytes")[long])
            writer.end_document(num_bytes, np.array([source, begin, stop]))
