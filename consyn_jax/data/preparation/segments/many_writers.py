"""Make a store with many writers, which run the tasks of each phase in parallel.

The result is the same `Journal` that a single writer has after its last block. `build.Preparation`
then checks the data and writes the report and the manifest, as it does for a single writer.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from consyn_jax.data.preparation.build import text_bytes
from consyn_jax.data.preparation.corpus_report import Report, check_leniency, is_as_lenient
from consyn_jax.data.preparation.destination import DAMAGED_TYPES, Destination
from consyn_jax.data.preparation.journal import JOURNAL, Journal
from consyn_jax.data.preparation.preparation_spec import Spec
from consyn_jax.data.preparation.segments.job import JOB, Job
from consyn_jax.data.preparation.segments.job_directory import (
    GENERATION,
    TOKENIZER,
    clear,
    note_scratch,
    open_directory,
    scratch_name,
)
from consyn_jax.data.preparation.segments.shard_tasks import plan_shards, write_shards_plan
from consyn_jax.data.preparation.segments.spans import large_sources, plan
from consyn_jax.data.preparation.segments.tasks import Tasks
from consyn_jax.data.preparation.workers.messages import WorkerSettings
from consyn_jax.data.preparation.workers.worker import learn_tokenizer
from consyn_jax.data.split import SPLITS
from consyn_jax.data.store.shards import Shard
from consyn_jax.data.store.store_writer import SHARD_TOKENS
from consyn_jax.errors import AGAIN, UserError, remedy
from consyn_jax.files import (
    aside,
    flush,
    make_directory,
    read_whole,
    remove,
    replace_directory,
    write_whole,
)
from consyn_jax.tokenization import BPETokenizer

# A segment takes a core up to two minutes. A small corpus has a few thousand segments.
MOST_SEGMENT_BYTES, LEAST_SEGMENT_BYTES, SEGMENTS = 256 << 20, 4 << 20, 4096
# Errors from reading a file that is missing or damaged. A `UserError` is a `ValueError`.
_DAMAGED = (FileNotFoundError, RecursionError, *DAMAGED_TYPES)
MOST_PARTITIONS, LEAST_PARTITIONS, PARTITION_BYTES = 1024, 8, 1 << 30


T = TypeVar("T")


def one_writer_reason(spec: Spec) -> str:
    """Reason for using one writer despite --shared_directory; "" if many writers can be used.

    Hub datasets are in the cache of one node only. The texts of `--data sample` come from Python,
    whose version may differ between nodes.
    """
    names = [source.name for source in spec.sources if not source.files]
    return f"{names[0]} is not a file that all nodes can read" if names else ""


def root_of(spec: Spec, destination: Destination) -> Path:
    """The directory of the segments, a different one for each pair of spec and destination."""
    assert spec.engine.shared_directory is not None
    name = scratch_name(destination.key, destination.directory)
    return Path(spec.engine.shared_directory).resolve() / name


class ManyWriters:
    """A store that many writers make.

    Raises:
        UserError: the data is unusable, or a directory cannot be written.
    """

    def __init__(self, spec: Spec, destination: Destination) -> None:
        self._spec, self._destination = spec, destination
        self._root = root_of(spec, destination)
        with self._writing_shared():
            self._lock = open_directory(self._root)
        try:
            with _writing(str(destination.directory)):
                note_scratch(destination.directory, self._root)
            self._job = self._begin()
        except BaseException:
            self.close()
            raise

    def fill(self, tasks: Tasks) -> Journal:
        """Run all phases; return the state after the last document."""
        job, spec = self._job, self._spec

        def run(phase: str, count: int | Sequence[int], stage: str = "deduplicate") -> None:
            numbers = range(count) if isinstance(count, int) else count
            known = job.done(phase)
            left = [number for number in numbers if number not in known]
            total, before = spec.num_bytes, len(numbers) - len(left)

            def done(now: int) -> None:
                spec.progress(stage, total * (before + now) // max(len(numbers), 1), total)

            tasks.run(job, phase, left, done)

        if not _has_starts(job):
            large = large_sources(job)
            self._forget_damaged("cuts", lambda number: job.result("cuts", number)["positions"])
            run("cuts", large, "look")
            cuts = {number: job.result("cuts", number)["positions"] for number in large}
            starts = plan(job, cuts)
            with self._writing_shared():
                job.write_starts(starts)
        run("segments", job.num_segments, "tokenize")
        run("long", 1)
        if job.drops_duplicates:
            run("exact", job.partitions)
            run("dropped-exact", 1)
        if job.threshold is not None:
            run("bands", job.partitions)
            run("groups", 1)
            run("near", job.partitions)
            run("dropped-near", 1)
        self._forget_damaged("kept", self._counts)
        run("kept", job.num_segments)
        state = Journal.begin(spec, self._destination.key, job.settings.single)
        shards = plan_shards(job, self._count(state.report))
        with self._writing_shared():
            write_shards_plan(job, shards)
        self._forget_damaged("shards", self._shard)
        run("shards", len(shards), "write")
        entries: dict[str, list[Any]] = {}
        for number, (split, *_) in enumerate(shards):
            entries.setdefault(SPLITS[split], []).append(job.result("shards", number))
        state.writer["shards"] = entries
        state.report.file_bytes = text_bytes(spec)
        return state

    def close(self) -> None:
        """Release the lock of the segments; their files stay."""
        os.close(self._lock)

    # ---------------------------------------------------------------------------------- beginning

    def _begin(self) -> Job:
        """Begin a job, or continue the job of an earlier command."""
        tokenizer, single = self._tokenizer(), self._spec.is_one_text
        job = self._new_job(tokenizer, single)
        with self._writing_shared():
            continues = self._take_results(job)
        with _writing(str(job.output)):
            tokenizer.save(job.output / "tokenizer")
            # Write the journal that one writer has before its first block. Then a command with
            # other data is refused, and one without --shared_directory starts from the beginning.
            begin = Journal.begin(self._spec, self._destination.key, single)
            begin.write(self._destination.preparing / JOURNAL)
        self._take_shards(job, continues)
        with self._writing_shared():
            job.remove_drafts()
            write_whole(job.root / JOB, job.to_json())
        return job

    def _take_results(self, job: Job) -> bool:
        """Take over the results of an earlier command; return whether there are any.

        Results of another job are removed.

        Raises:
            UserError: the earlier command skipped or repaired rows, but now such rows are an error.
        """
        found = [path for path in job.root.iterdir() if GENERATION.fullmatch(path.name)]
        if len(found) == 1 and _is_same(_saved(job.root / JOB), job):
            # From here on, the tasks of that command fail.
            found[0].rename(job.results)
            flush(job.root)
            report = _report_of_segments(job)
            check_leniency(report, job.settings.options)
            if is_as_lenient(report, job.settings.options):
                return True
        clear(job.root, kept=(TOKENIZER,))  # the tokenizer is the same for all jobs of this key
        job.results.mkdir()
        flush(job.root)
        return False

    def _take_shards(self, job: Job, continues: bool) -> None:
        """Take over the shards of an earlier command, unless the store has changed since.

        The shards may be older than the results, because a command may have been killed after it
        took over the results and before it took over the shards.

        Args:
            continues: whether the results of an earlier command were taken over.
        """
        found = job.earlier_shard_drafts if continues else []
        if len(found) == 1:
            with _writing(str(job.output)):
                found[0].rename(job.shard_drafts)
                flush(job.shard_drafts.parent)
            return
        with self._writing_shared():
            remove(job.place("shards", 0).parent)
        self._destination.end_many_writers()
        with _writing(str(job.output)):
            make_directory(job.shard_drafts)

    def _writing_shared(self) -> AbstractContextManager[None]:
        return _writing(f"--shared_directory {self._root.parent}")

    def _new_job(self, tokenizer: BPETokenizer, single: bool) -> Job:
        spec = self._spec
        size = spec.num_bytes
        # Leave out options that do not change the documents, so that they may change in a resume.
        options = dataclasses.replace(
            spec.options, data=(), validation=(), num_workers=None, tokenizer=None
        )
        return Job(
            self._root,
            self._destination.directory.resolve(),
            WorkerSettings(
                options,
                tokenizer,
                spec.test_fraction,
                single,
                spec.chat_template,
                spec.tool_template,
            ),
            spec.sources,
            spec.num_validation,
            working_directory=str(Path.cwd()),
            segment_bytes=min(max(size // SEGMENTS, LEAST_SEGMENT_BYTES), MOST_SEGMENT_BYTES),
            partitions=min(max(size // PARTITION_BYTES, LEAST_PARTITIONS), MOST_PARTITIONS),
            shard_tokens=SHARD_TOKENS,
            generation=secrets.token_hex(16),
        )

    def _tokenizer(self) -> BPETokenizer:
        """Return the tokenizer; if it is to be trained, train it once and keep it in `root`."""
        spec, path = self._spec, self._root / TOKENIZER
        if not isinstance(spec.tokenizer, str):
            return spec.tokenizer
        if not path.is_dir():
            learned = learn_tokenizer(spec, spec.is_one_text)
            with self._writing_shared():
                fresh = aside(path)
                learned.save(fresh)
                replace_directory(fresh, path)
        return BPETokenizer.from_file(path)

    def _count(self, report: Report) -> list[list[int]]:
        """Join the reports of all segments; return each segment's number of tokens per split."""
        tokens = []
        for segment in range(self._job.num_segments):
            of_segment, sources, here = self._counts(segment)
            report.join(of_segment)
            for source, read, kept in sources:
                report.sources[source]["documents"] += read
                report.sources[source]["kept"] += kept
            tokens.append(here)
        return tokens

    def _counts(self, segment: int) -> tuple[Report, list[list[int]], list[int]]:
        """The report of a segment, its documents by source, and its tokens by split."""
        result = self._job.result("kept", segment)
        return Report.of(result["report"]), result["sources"], result["tokens"]

    def _forget_damaged(self, phase: str, read: Callable[[int], object]) -> None:
        with self._writing_shared():
            _results(self._job, phase, read)

    def _shard(self, number: int) -> Shard:
        """A finished shard, whose files exist and have the right sizes."""
        job = self._job
        return Shard(job.output, job.result("shards", number), job.tokenizer.vocab_size)


def _results(job: Job, phase: str, read: Callable[[int], T]) -> list[T]:
    """Read the results of all finished tasks of a phase.

    Damaged results, and shards whose files are missing, are removed, so that their tasks run again.
    """
    found = []
    for number in sorted(job.done(phase)):
        try:
            found.append(read(number))
        except _DAMAGED:
            remove(job.place(phase, number))
    return found


def _has_starts(job: Job) -> bool:
    try:
        return job.starts is not None
    except _DAMAGED:
        return False


def _saved(path: Path) -> Job | None:
    """Read a job from a file; None if the file is missing or damaged."""
    try:
        return Job.from_json(read_whole(path))
    except _DAMAGED:
        return None


def _is_same(old: Job | None, new: Job) -> bool:
    """Whether the job `new` can use the finished tasks of the job `old`.

    The two jobs may treat bad rows differently: `_take_results` checks that with the reports of the
    segments. They may also have different working directories, because the names and the content of
    all files are compared.
    """

    def compared(job: Job) -> str:
        options = dataclasses.replace(job.settings.options, on_bad_rows="", invalid_utf8="")
        settings = dataclasses.replace(job.settings, options=options)
        return dataclasses.replace(
            job, settings=settings, working_directory="", generation=""
        ).to_json()

    return old is not None and compared(old) == compared(new)


def _report_of_segments(job: Job) -> Report:
    """The counts of all finished segments, with the first dropped rows."""

    def of_segment(number: int) -> Report:
        saved = job.result("segments", number)
        report = Report.of(saved["report"])
        for _, rule, place, text in saved["drops"]:
            report.show(rule, place, text)
        return report

    report = Report()
    for each in _results(job, "segments", of_segment):
        report.join(each)
    return report


@contextmanager
def _writing(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{what} cannot be written: {error.strerror or error}. {remedy(error)}, and {AGAIN}; "
            "it continues."
        ) from error
