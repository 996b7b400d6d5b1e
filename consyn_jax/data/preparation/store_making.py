"""Make or finish one store, with one writer or with many."""

from __future__ import annotations

from contextlib import closing
from typing import NamedTuple

from consyn_jax.data.preparation.build import Preparation, Publish
from consyn_jax.data.preparation.corpus_report import check_leniency
from consyn_jax.data.preparation.destination import Destination, check_output
from consyn_jax.data.preparation.journal import JOURNAL, Journal
from consyn_jax.data.preparation.preparation_spec import Spec
from consyn_jax.data.preparation.segments.engines import start_tasks
from consyn_jax.data.preparation.segments.job_directory import remove_scratch
from consyn_jax.data.preparation.segments.many_writers import ManyWriters, one_writer_reason


class Built(NamedTuple):
    """The outcome of `build`.

    Attributes:
        was_complete: whether the store was already complete.
        scratch: sentences about the directories of segments that could not be removed.
    """

    was_complete: bool
    scratch: tuple[str, ...] = ()


def build(spec: Spec, destination: Destination, publish: Publish | None = None) -> Built:
    """Make or finish the store."""
    if destination.is_complete() and not destination.preparing.exists():
        return Built(was_complete=True)
    destination.refuse_links()
    if not destination.in_cache:
        check_output(destination.directory)
    with destination.locked(stop=lambda: publish is not None and publish(None, None)):
        # Meanwhile, another process may have completed the store, or been killed before it cleaned
        # up.
        was_complete = destination.is_complete()
        if not was_complete:
            destination.remove_manifest()
            _make(spec, destination, publish)
        scratch = remove_scratch(destination.directory)
        destination.remove_preparing()
    return Built(was_complete, tuple(scratch))


def _make(spec: Spec, destination: Destination, publish: Publish | None) -> None:
    journal = destination.journal()
    if journal is not None:
        check_leniency(journal.report, spec.options)
    state = journal or Journal.begin(spec, destination.key, spec.is_one_text)
    try:
        if spec.engine.shared_directory is not None and not one_writer_reason(spec):
            is_complete = _by_many(spec, destination)
        else:
            is_complete = _fill(spec, destination, state, journal is not None, publish)
        if not is_complete:
            # The files are rewritten from the start, so remove their old journal first.
            (destination.preparing / JOURNAL).unlink(missing_ok=True)
            state = Journal.begin(spec, destination.key, single=True)
            _fill(spec, destination, state, False, publish)
    except BaseException:
        begun = (destination.preparing / JOURNAL).exists()
        # Segments that cannot be removed stay noted in the store, so that a later command says so.
        if not begun and not remove_scratch(destination.directory):
            destination.remove_fragment()
        raise


def _fill(
    spec: Spec, destination: Destination, state: Journal, resumed: bool, publish: Publish | None
) -> bool:
    """Write the store; return whether it is complete.

    If the corpus is found to be a single row, the store stays unfinished. The caller then starts
    again and splits that row by position.
    """
    destination.end_many_writers()
    with closing(Preparation(spec, destination.directory, state, resumed)) as preparation:
        preparation.run(publish)
        if preparation.is_one_row:
            return False
        preparation.finish()
    return True


def _by_many(spec: Spec, destination: Destination) -> bool:
    """Write the store with many writers; return whether it is complete, as `_fill` does."""
    with closing(ManyWriters(spec, destination)) as writers, start_tasks(spec) as tasks:
        state = writers.fill(tasks)
    with closing(Preparation(spec, destination.directory, state, resumed=True)) as preparation:
        is_complete = not preparation.is_one_row
        if is_complete:
            preparation.finish()
    return is_complete
