"""Make a store with many writers, which run the tasks of each phase in parallel.

The result is the same `Journal` that a single writer has after its last block. `build.Preparation`
then checks the data and writes the report and the manifest, as it does for a single writer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from consyn_jax.data.preparation.build import text_bytes
from consyn_jax.data.preparation.corpus_report import Report, is_as_lenient
from consyn_jax.data.preparation.destination import DAMAGED_TYPES, Destination
from consyn_jax.data.preparation.journal import JOURNAL, Journal
from consyn_jax.data.preparation.preparation_spec import Spec
from consyn_jax.data.preparation.segments.job import JOB, STARTS, Job
from consyn_jax.data.preparation.segments.phases import Answer, work, work_on_file
from consyn_jax.data.preparation.segments.shard_tasks import plan_shards, write_shards_plan
from consyn_jax.data.preparation.segments.spans import large_sources, plan
from consyn_jax.data.preparation.workers.messages import WorkerSettings
from consyn_jax.data.preparation.workers.worker import learn_tokenizer
from consyn_jax.data.split import SPLITS
from consyn_jax.data.store.store_writer import SHARD_TOKENS
from consyn_jax.errors import UserError, remedy
from consyn_jax.files import aside, make_directory, replace_directory, write_whole
from consyn_jax.tokenization import BPETokenizer

TOKENIZER = "tokenizer"  # learned from the data
# A segment takes a core up to two minutes. A small corpus has a few thousand segments.
MOST_SEGMENT_BYTES, LEAST_SEGMENT_BYTES, SEGMENTS = 256 << 20, 4 << 20, 4096
MOST_PARTITIONS, LEAST_PARTITIONS, PARTITION_BYTES = 1024, 8, 1 << 30


class Tasks(AbstractContextManager["Tasks"]):
    """Runs the tasks of a phase, in any order and in any number of processes."""

    @abstractmethod
    def run(
        self, job: Job, phase: str, numbers: Sequence[int], done: Callable[[int], None]
    ) -> None:
        """Run the tasks `numbers` of a phase; call `done` with the number of finished tasks so far.

        Raises:
            UserError: tasks have failed; the message is about the failed task with the lowest
                number.
        """

    @abstractmethod
    def hashes(self, paths: Sequence[Path], done: Callable[[int], None]) -> list[Any]:
        """Size, time stamp and SHA-256 of each file; `done` is as for `run`.

        Raises:
            UserError: a file cannot be read.
        """

    @abstractmethod
    def close(self) -> None:
        """End the processes; tasks in progress are lost."""

    def __exit__(self, *_: object) -> None:
        self.close()


class TasksHere(Tasks):
    """Runs the tasks one after another in this process, for tests and measurements."""

    def run(
        self, job: Job, phase: str, numbers: Sequence[int], done: Callable[[int], None]
    ) -> None:
        """Run the tasks in order."""
        for count, number in enumerate(numbers, 1):
            _taken(work(str(job.root), job.identity, phase, number))
            done(count)

    def hashes(self, paths: Sequence[Path], done: Callable[[int], None]) -> list[Any]:
        """Hash the files in order."""
        return [_taken(work_on_file(str(path.resolve()))) for path in paths]

    def close(self) -> None:
        """Do nothing, because there are no processes."""


def _taken(answer: Answer) -> Any:
    fault, result = answer
    if fault:
        raise UserError(fault)
    return result


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
    output = hashlib.sha256(str(destination.directory.resolve()).encode()).hexdigest()[:8]
    return Path(spec.engine.shared_directory).resolve() / f"consyn-{destination.key}-{output}"


class ManyWriters:
    """A store that many writers make.

    Raises:
        UserError: the data is unusable, or a directory cannot be written.
    """

    def __init__(self, spec: Spec, destination: Destination) -> None:
        self._spec, self._destination = spec, destination
        self._root = root_of(spec, destination)
        try:
            make_directory(self._root)
            self._job = self._begin()
        except OSError as error:
            raise UserError(
                f"--shared_directory {self._root.parent} cannot be written: "
                f"{error.strerror or error}. {remedy(error)}, and run the same command again."
            ) from error

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

        if not (job.root / STARTS).exists():
            large = large_sources(job)
            run("cuts", large, "look")
            cuts = {number: job.result("cuts", number)["positions"] for number in large}
            job.write_starts(plan(job, cuts))
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
        run("kept", job.num_segments)
        state = Journal.begin(spec, self._destination.key, job.settings.single)
        shards = plan_shards(job, self._count(state.report))
        write_shards_plan(job, shards)
        self._forget_missing_shards(len(shards))
        run("shards", len(shards), "write")
        entries: dict[str, list[Any]] = {}
        for number, (split, *_) in enumerate(shards):
            entries.setdefault(SPLITS[split], []).append(job.result("shards", number))
        state.writer["shards"] = entries
        state.report.file_bytes = text_bytes(spec)
        return state

    def remove(self) -> None:
        """Remove the segments."""
        shutil.rmtree(self._root, ignore_errors=True)

    def _begin(self) -> Job:
        """Begin or resume the job in `root`; remove files that another job left there."""
        tokenizer, single = self._tokenizer(), self._spec.is_one_text
        job = self._new_job(tokenizer, single)
        path = job.root / JOB
        try:
            is_old = _may_continue(Job.from_json(path.read_bytes()), job)
        except (FileNotFoundError, *DAMAGED_TYPES):
            is_old = False
        if not is_old:
            for entry in job.root.iterdir():
                if entry.name == TOKENIZER:  # the same for all jobs of this key
                    continue
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        tokenizer.save(job.output / "tokenizer")
        # Write the journal that one writer has before its first block. Then a command with other
        # data is refused, and a command without --shared_directory starts from the beginning.
        begin = Journal.begin(self._spec, self._destination.key, single)
        begin.write(self._destination.preparing / JOURNAL)
        job.remove_drafts()
        write_whole(path, job.to_json())
        return job

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
        )

    def _tokenizer(self) -> BPETokenizer:
        """Return the tokenizer; if it is to be trained, train it once and keep it in `root`."""
        spec, path = self._spec, self._root / TOKENIZER
        if not isinstance(spec.tokenizer, str):
            return spec.tokenizer
        if not path.is_dir():
            learned = learn_tokenizer(spec, spec.is_one_text)
            fresh = aside(path)
            learned.save(fresh)
            replace_directory(fresh, path)
        return BPETokenizer.from_file(path)

    def _count(self, report: Report) -> list[list[int]]:
        """Join the reports of all segments; return each segment's number of tokens per split."""
        tokens = []
        for segment in range(self._job.num_segments):
            result = self._job.result("kept", segment)
            report.join(Report(**result["report"]))
            for source, read, kept in result["sources"]:
                report.sources[source]["documents"] += read
                report.sources[source]["kept"] += kept
            tokens.append(result["tokens"])
        return tokens

    def _forget_missing_shards(self, count: int) -> None:
        """Forget finished shards whose files are missing in the output, so they are made again."""
        job = self._job
        for number in job.done("shards"):
            entry: dict[str, Any] = job.result("shards", number)
            files = [
                entry[kind] for kind in ("file", "index", "targets", "origins") if kind in entry
            ]
            if number >= count or not all((job.output / name).is_file() for name in files):
                shutil.rmtree(job.place("shards", number))


def _may_continue(old: Job, new: Job) -> bool:
    """Whether the job `new` can use the finished tasks of the job `old`.

    The two jobs may treat bad rows differently, as long as no bad row was found.
    """

    def compared(job: Job) -> str:
        options = dataclasses.replace(job.settings.options, on_bad_rows="", invalid_utf8="")
        settings = dataclasses.replace(job.settings, options=options)
        return dataclasses.replace(job, settings=settings).to_json()

    return compared(old) == compared(new) and all(
        is_as_lenient(Report(**old.result("segments", n)["report"]), new.settings.options)
        for n in old.done("segments")
    )
