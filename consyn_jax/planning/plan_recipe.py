"""Write the recipe of `--fit`, and format changed flags and times."""

from __future__ import annotations

from typing import Any

import yaml

from consyn_jax.config import RunConfig
from consyn_jax.flags import flat
from consyn_jax.planning.plan import Alternative

GIB = 2**30


def in_flags(changes: dict[str, Any]) -> str:
    """Format changed flags as on a command line."""
    return " ".join(f"--{name} {value}" for name, value in changes.items()) or "no change"


def recipe(found: Alternative, origins: dict[str, str], topology: str) -> str:
    """Return a YAML recipe: the values that the user set, with the changes of `--fit`.

    Args:
        origins: the origin of each value, by flag name.
    """
    plan = found.plan
    how = "as compiled" if plan.compiled is not None else "by arithmetic, not compiled"
    given = {
        name: value
        for name, value in _given(plan.run, origins).items()
        if name not in ("topology", "fit")
    }
    expected = "no time: this program was never measured on a TPU"
    if plan.time is not None:
        expected = (
            f"not measured: {in_seconds(plan.time.total)} per step, "
            f"{plan.work.tokens / plan.time.total:,.0f} tokens/s."
        )
    head = (
        f"# consyn-train --config THIS_FILE\n#\n"
        f"# For {topology}: {plan.total_bytes / GIB:.1f} GiB of "
        f"{plan.topology.device.memory_bytes / GIB:.1f} on each device, {how}.\n"
        f"# EXPECTED, {expected}\n"
        f"# Changed by --fit: {in_flags(found.changes) if found.changes else 'nothing'}\n"
    )
    return head + yaml.safe_dump(given | found.changes, sort_keys=False, allow_unicode=True)


def _given(run: RunConfig, origins: dict[str, str]) -> dict[str, Any]:
    values = flat(run)
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if origins[name].startswith(("flag", "file", "keyword"))
    }


def in_seconds(seconds: float) -> str:
    """Format a time in seconds or milliseconds."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
