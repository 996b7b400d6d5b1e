"""Exchange messages between the processes of a run, from any thread."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax

from consyn_jax.training.checkpointing.orbax_writes import refusal

# Longest wait for the slowest process's write. JAX reports a dead process earlier.
TIMEOUT_MS = 6 * 3600 * 1000

_OBJECTS = itertools.count()


class Exchange:
    """Exchanges texts through JAX's coordination service, without using the devices.

    All processes must make the same calls in the same order.
    """

    def __init__(self) -> None:
        self._prefix, self._count = f"consyn_jax/checkpoints/{next(_OBJECTS)}", 0

    def gather(self, text: str) -> list[str]:
        """Send a text, and return the texts of all processes in the order of their numbers."""
        if jax.process_count() == 1:
            return [text]
        import orbax.checkpoint as ocp

        client, process = ocp.multihost.get_jax_distributed_client(), jax.process_index()
        client.key_value_set(f"{self._prefix}/{self._count}/{process}", text)
        texts = [
            client.blocking_key_value_get(f"{self._prefix}/{self._count}/{number}", TIMEOUT_MS)
            for number in range(jax.process_count())
        ]
        if self._count:  # all processes have sent this text, so all have read the previous one
            client.key_value_delete(f"{self._prefix}/{self._count - 1}/{process}")
        self._count += 1
        return texts

    def on_first(self, work: Callable[[], None]) -> str | None:
        """Call `work` in process 0 only.

        Returns:
            The operating system's error in `work`, as text, in every process; None after success.
        """
        reason = None
        if jax.process_index() == 0:
            try:
                work()
            except Exception as error:
                reason = refusal(error)
                if reason is None:
                    raise
        return self.gather(reason or "")[0] or None
