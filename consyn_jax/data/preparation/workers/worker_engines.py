"""The choice between workers of this machine and those of a Ray cluster."""

from __future__ import annotations

from consyn_jax.data.preparation.preparation_spec import Spec
from consyn_jax.data.preparation.workers.messages import WorkerSettings
from consyn_jax.data.preparation.workers.ordered_results import Workers
from consyn_jax.data.preparation.workers.worker_pool import WorkerPool
from consyn_jax.tokenization import BPETokenizer


def start_workers(spec: Spec, tokenizer: BPETokenizer, single: bool) -> Workers:
    """Start the workers that `--engine` names.

    Raises:
        UserError: they cannot be started.
    """
    settings = WorkerSettings(
        spec.options,
        tokenizer,
        spec.test_fraction,
        single,
        spec.chat_template,
        spec.tool_template,
    )
    if spec.engine.engine == "ray":
        from consyn_jax.data.preparation.workers.ray_pool import RayPool

        return RayPool(spec.options.num_workers, settings, spec.engine.ray_address)
    return WorkerPool(spec.num_workers, settings)
