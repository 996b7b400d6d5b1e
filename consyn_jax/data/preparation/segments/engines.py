"""The engine that runs the tasks of many writers: its start, and the hashes of the sources."""

from __future__ import annotations

from consyn_jax.data.preparation.preparation_spec import Spec
from consyn_jax.data.preparation.segments.tasks import Tasks, TasksHere
from consyn_jax.data.store.file_hashes import FileHashes

HASHED_HERE = 4 << 30  # bytes that this process hashes alone, within seconds


def start_tasks(spec: Spec) -> Tasks:
    """Start the engine that `--engine` names.

    Raises:
        UserError: the cluster cannot be reached.
    """
    if spec.engine.engine == "ray":
        from consyn_jax.data.preparation.segments.ray_tasks import RayTasks

        return RayTasks(spec.options.num_workers, spec.engine.ray_address)
    return TasksHere()


def learn_hashes(spec: Spec) -> None:
    """Hash the sources in parallel tasks, and store the hashes for later use.

    Files whose hash is stored already are skipped. If the other files have fewer than
    `HASHED_HERE` bytes, nothing is done, because this process can hash them in seconds.

    Raises:
        UserError: a file cannot be read.
    """
    with FileHashes() as known:
        paths = known.unknown(file for source in spec.sources for file in source.files)
        size = sum(path.stat().st_size for path in paths)
        if size < HASHED_HERE:
            return

        def done(count: int) -> None:
            spec.progress("hash", size * count // len(paths), size)

        with start_tasks(spec) as tasks:
            found = tasks.hashes(paths, done)
        for path, values in zip(paths, found, strict=True):
            known.learn(path, *values)
