"""The table of phases, and the functions that run a task, which is a phase and a number."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from consyn_jax.data.preparation.segments.duplicates import (
    write_bands,
    write_dropped,
    write_exact,
    write_groups,
    write_near,
)
from consyn_jax.data.preparation.segments.encode import write_segment
from consyn_jax.data.preparation.segments.job import JOB, Job, unseen
from consyn_jax.data.preparation.segments.kept import write_kept
from consyn_jax.data.preparation.segments.long_documents import write_long
from consyn_jax.data.preparation.segments.shard_tasks import write_shard
from consyn_jax.data.preparation.segments.spans import write_cuts
from consyn_jax.data.store.file_hashes import hash_of
from consyn_jax.errors import AGAIN, UserError, remedy

PHASES: dict[str, Callable[[Job, int], None]] = {
    "cuts": write_cuts,
    "segments": write_segment,
    "long": write_long,
    "exact": write_exact,
    "dropped-exact": lambda job, _: write_dropped(job, "exact"),
    "bands": write_bands,
    "groups": write_groups,
    "near": write_near,
    "dropped-near": lambda job, _: write_dropped(job, "near"),
    "kept": write_kept,
    "shards": write_shard,
}


Answer = tuple[str, Any]
"""An error message ("" after success), and a result (None if the result is in files)."""


def work(root: str, identity: str, phase: str, number: int) -> Answer:
    """Run one task, which writes its result to files.

    Args:
        root: directory of the job, under the same path on all nodes.
        identity: hash of the file `JOB` in `root`.
    """

    def run() -> None:
        job = _job(root, identity)
        if not job.place(phase, number).exists():
            PHASES[phase](job, number)

    return _answer(run, f"A file in {root}")


def work_on_file(path: str) -> Answer:
    """Size, time stamp and SHA-256 of a file."""

    def run() -> tuple[int, int, str]:
        try:
            status = Path(path).stat()
        except FileNotFoundError as error:
            raise unseen(f"--data {path}") from error
        return status.st_size, status.st_mtime_ns, hash_of(Path(path))

    return _answer(run, path)


def _answer(run: Callable[[], Any], place: str) -> Answer:
    """Run a task, and turn its errors into messages.

    Args:
        place: name in the message of an OSError without a file name, such as that of a full disk.
    """
    try:
        return "", run()
    except UserError as error:
        return str(error), None
    except OSError as error:
        return (
            f"{error.filename or place} cannot be read or written on node "
            f"{socket.gethostname()}: {error.strerror or error}. {remedy(error)}, and {AGAIN}; it "
            "continues.",
            None,
        )


@lru_cache(maxsize=1)
def _job(root: str, identity: str) -> Job:
    """Read the job in a directory, and check that its directories exist on this node.

    Raises:
        UserError: a directory does not exist on this node.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task uses one core
    path = Path(root) / JOB
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    if hashlib.sha256(content).hexdigest() != identity:
        raise unseen(f"--shared_directory {path.parent.parent}")
    job = Job.from_json(content)
    if not job.shard_drafts.is_dir():
        raise unseen(f"--output {job.output}")
    names = [source.name for source in job.sources]
    if not all(map(os.path.isabs, names)) and str(Path.cwd()) != job.working_directory:
        try:
            os.chdir(job.working_directory)
        except OSError as error:
            raise unseen(f"The directory {job.working_directory} of the command") from error
    return job
