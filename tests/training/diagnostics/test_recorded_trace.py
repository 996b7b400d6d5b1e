"""The profile of verse's steps as an H200 recorded it, in command buffers."""

import gzip
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from consyn_jax.training.diagnostics.trace import summarise


def recorded(file: Path) -> Any:
    """A trace in Chrome's format, in the form of the profiler's own data."""
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = {
        (each["pid"], each.get("tid")): each["args"]["name"]
        for each in events
        if each.get("ph") == "M" and each["name"] in ("process_name", "thread_name")
    }
    lines = defaultdict[tuple[int, int], list[Any]](list)
    for each in events:
        if each.get("ph") == "X":
            lines[each["pid"], each["tid"]].append(
                SimpleNamespace(
                    name=each["name"],
                    start_ns=1e3 * each["ts"],
                    duration_ns=1e3 * each["dur"],
                    stats=each.get("args", {}).items(),
                )
            )
    planes = defaultdict[str, list[Any]](list)
    for (process, thread), found in lines.items():
        line = SimpleNamespace(name=names[process, thread], events=found)
        planes[names[process, None]].append(line)
    return SimpleNamespace(
        planes=[SimpleNamespace(name=name, lines=found) for name, found in planes.items()]
    )


def test_kernels_in_command_buffers_are_known_by_their_names(shared_data: Path) -> None:
    trace = recorded(shared_data / "gpu" / "verse-h200.trace.json.gz")
    # Names that XLA gave to two fusions of the recorded program, which is not at hand.
    scopes = {
        "loop_add_multiply_fusion.11": "jit(train_step)/jvp()/mlp/mul",
        "loop_multiply_fusion.11": "jit(train_step)/transpose(jvp())/mlp/mul",
    }
    found = summarise(trace, scopes)
    # As they were counted by hand in the notes on this GPU, in ms a step.
    by_hand = {"matmuls": 67.8, "attention": 29.8, "head": 7.0, "norm": 8.9, "mlp": 6.3}
    each_ms = {part: 1e3 * spent / found.steps for part, spent in found.parts.items()}
    for part, spent_ms in by_hand.items():
        assert each_ms[part] == pytest.approx(spent_ms, abs=0.1), each_ms
    assert sum(each_ms.values()) == pytest.approx(125.7, abs=0.1)
    assert each_ms["other"] < 0.05 * 125.7, each_ms
    assert found.device == "gpu:0"
    assert found.largest[0].part == "matmuls"
