"""Cut a corpus into segments, and read the blocks of a segment.

A segment is a range of the corpus of about `segment_bytes`: several small sources, or a part of a
large source. To find the parts, a large source is read once, without tokenising. This pass also
counts the documents before each part, so that messages can give the number of a row in the whole
source. A source that cannot be read from the middle, such as a compressed file, is one segment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from consyn_jax.data.preparation.segments.job import Job, Start, check_seen
from consyn_jax.data.sources.reader import START, Block, Position, Reading
from consyn_jax.errors import AGAIN, UserError

# A source smaller than this many segments is not cut.
FEW = 1.5


def large_sources(job: Job) -> list[int]:
    """Return the indices of the sources that are large enough for several segments."""
    return [
        number
        for number, source in enumerate(job.sources)
        if source.num_bytes > FEW * job.segment_bytes
    ]


def write_cuts(job: Job, number: int) -> None:
    """Phase "cuts": find the positions at which segments of a source begin, except the first.

    The ends of blocks depend on the position where reading began. So the reader restarts at each
    position that it finds, as the task that reads the segment will.
    """
    source, settings = job.sources[number], job.settings
    reading = Reading(settings.options, settings.tokenizer, settings.single, settings.test_fraction)
    check_seen(source)
    positions: list[Position] = []
    start: Position | None = START if source.reader.can_seek(source.name) else None
    while start is not None:
        size, reached = 0, None
        for block in source.blocks(start, reading):
            if size == 0 and start != START:
                positions.append(start)
            size += max(len(block.data), 1)
            if size >= job.segment_bytes and block.end is not None:
                reached = block.end
                break
        start = reached
    with job.writing("cuts", number) as draft:
        draft.result = {"positions": positions}


def plan(job: Job, cuts: dict[int, list[Position]]) -> list[Start]:
    """Choose where each segment begins.

    Args:
        cuts: the positions that `write_cuts` found, by index of the source.
    """
    starts: list[Start] = [(0, START)]
    size = 0
    for number, source in enumerate(job.sources):
        if size and (size + source.num_bytes > FEW * job.segment_bytes):
            starts.append((number, START))
            size = 0
        size += source.num_bytes
        if positions := cuts.get(number):
            starts += [(number, position) for position in positions]
            # The next source begins a segment, unless it is less than half of one: then it
            # belongs to the last part of this source.
            size = job.segment_bytes
    return starts


def segment_blocks(job: Job, segment: int) -> Iterator[tuple[int, Block]]:
    """Yield the blocks of a segment, each with the index of its source.

    Raises:
        UserError: a source cannot be read, or has changed.
    """
    starts, settings = job.starts, job.settings
    number, position = starts[segment]
    end = starts[segment + 1] if segment + 1 < len(starts) else (len(job.sources), START)
    last, stop = end
    # Sources after the end are not opened.
    here = job.sources[: last + (stop != START)]
    for source in here[number:]:
        check_seen(source)
    spec = dataclasses.replace(job.spec, sources=here)
    for index, block in spec.blocks(number, position, settings.tokenizer, settings.single):
        yield index, block
        if (index, block.end) == end:
            return
    if stop != START:
        raise UserError(
            f"{job.sources[last].name} changed while it was read. Do not change the files of "
            f"--data, and {AGAIN}."
        )
