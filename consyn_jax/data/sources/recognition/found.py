"""A path that `--data` names, before its use is decided."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from consyn_jax.data.sources.source import Source


@dataclass(frozen=True)
class Found:
    """A file, dataset or store that a name stands for.

    Attributes:
        source: the source that it is.
        reason: why it cannot be used, or "".
        inside: its path below the directory or glob that was named, or its own name.
        given: the name that it was found by.
        is_named: the user named it itself, and not a directory or glob that it is in.
    """

    source: Source
    reason: str
    inside: Path
    given: str
    is_named: bool = False

    @property
    def is_used(self) -> bool:
        """Whether there is no reason to leave it out."""
        return not self.reason
