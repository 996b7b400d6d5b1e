"""Do the presets compile for slices of TPUs that are not here, and how much memory do they need?

    pip install 'consyn_jax[tpu]'
    python benchmarks/tpu_plans.py --out benchmarks/results/tpu-plans-DATE.json

Each row is one train step, compiled by libtpu on this machine: one sequence for each device, in the
preset's context. Nothing runs on a TPU, so there are no times of steps. Rows that are already in
--out are kept, and the script goes on with the others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import harness

from consyn_jax.config import architecture
from consyn_jax.planning.plan import Plan, compiled, estimate
from consyn_jax.planning.topology import parse_topology
from consyn_jax.resolve import resolve

GIB = 2**30
TOPOLOGIES = ("v5e:2x4", "v6e:8x8", "v5p:2x2x2", "v5e:4x4x2")  # the last is two slices
RECOMPUTED = {"haiku": "none", "verse": "none", "stanza": "full", "epic": "full"}
CASES = [(model, topology) for topology in TOPOLOGIES for model in RECOMPUTED]


def plan(model: str, topology: str) -> Plan:
    """The plan of a preset with one sequence for each device."""
    flags = {"model": model, "batch_size": parse_topology(topology).num_devices}
    run, _ = resolve(flags | {"gradient_checkpointing": RECOMPUTED[model]})
    words = {"vocab_size": 49_152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return estimate(architecture(run.model, **words), run, parse_topology(topology))


def row(model: str, topology: str) -> dict[str, Any]:
    """One compiled step."""
    began, planned = time.perf_counter(), plan(model, topology)
    found = compiled(planned, topology)
    seconds = time.perf_counter() - began
    result = {
        "model": model,
        "topology": topology,
        "mesh": ", ".join(f"{axis}={n}" for axis, n in found.mesh.sizes.items() if n > 1),
        "recomputed": RECOMPUTED[model],
        "needs GiB": round(found.total_bytes / GIB, 2),
        "of GiB": round(found.topology.device.memory_bytes / GIB, 2),
        "fits": found.fits,
        "by arithmetic GiB": round(planned.total_bytes / GIB, 2),
        "state GiB": None,
        "temporary GiB": None,
        "compiled in s": round(seconds, 1),
        "attention": "refused by the compiler",
    }
    if found.compiled is not None:
        result |= {
            "state GiB": round(found.compiled.argument_bytes / GIB, 2),
            "temporary GiB": round(found.compiled.temporary_bytes / GIB, 2),
            "attention": found.compiled.attention,
        }
    return result


def measure(
    cases: Iterable[tuple[str, str]] = CASES, out: Path | None = None, tiny: bool = False
) -> dict[str, Any]:
    """Compile the cases that `out` does not have."""
    if tiny:
        cases = [("haiku", "v5e:1x1")]
    rows = json.loads(out.read_text())["rows"] if out is not None and out.exists() else []
    done = {(each["model"], each["topology"]) for each in rows}
    for case in cases:
        if case not in done:
            rows.append(row(*case))
            print(rows[-1], flush=True)
            if out is not None:
                harness.write(out, {**harness.facts(), **versions(), "rows": rows})
    return {**versions(), "rows": rows}


def versions() -> dict[str, str]:
    """The compiler's version, which `harness.facts` does not know."""
    import importlib.metadata

    return {"libtpu": importlib.metadata.version("libtpu")}


def main() -> None:
    """Compile all cases."""
    given = harness.parser(__doc__).parse_args()
    harness.report(measure(out=given.out, tiny=given.tiny), given.out)


if __name__ == "__main__":
    main()
