"""The choice of what runs the tasks."""

from __future__ import annotations

from consyn_jax.data.preparation.preparation_spec import Spec
from consyn_jax.data.preparation.segments.many_writers import Tasks, TasksHere


def start_tasks(spec: Spec) -> Tasks:
    """Start what runs the tasks of `--engine`.

    Raises:
        UserError: the cluster cannot be reached.
    """
    if spec.engine.engine == "ray":
        from consyn_jax.data.preparation.segments.ray_tasks import RayTasks

        return RayTasks(spec.options.num_workers, spec.engine.ray_address)
    return TasksHere()
