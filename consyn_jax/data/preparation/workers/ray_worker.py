"""Code that runs inside a Ray task."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from functools import cache
from pathlib import Path

import numpy as np

import consyn_jax
from consyn_jax.data.preparation.workers.messages import (
    Head,
    WorkerSettings,
    block_from,
    result_head,
)
from consyn_jax.data.preparation.workers.worker import Worker

Answer = tuple[Head, list[np.ndarray]]
"""The result of a block, as `result_head` returns it."""

_workers: dict[str, Worker] = {}


def work(key: str, shared: np.ndarray, head: str, data: bytes) -> Answer:
    """Work on one block; the process keeps its `Worker` for later tasks with the same settings.

    Args:
        key: hash of `shared`.
        shared: JSON with the settings of the main process.
        head: `block_head` of the block, as JSON.
    """
    if key not in _workers:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Ray counts this task as one processor
        _workers.clear()
        _workers[key] = WorkerSettings.from_json(json.loads(shared.tobytes())).worker()
    return result_head(_workers[key].work(block_from(json.loads(head), data)))


def differences(expected: dict[str, str]) -> dict[str, str]:
    """Compare package versions with those of the main process.

    Args:
        expected: version of each package in the main process.

    Returns:
        Name of each package that differs -> both versions as text.
    """
    return {
        name: f"{value} ({expected[name]} is here)"
        for name, value in versions().items()
        if value != expected[name]
    }


@cache
def versions() -> dict[str, str]:
    """Versions of the software that can change the content of a store, by package name.

    Python is included because of its Unicode tables. The entry of this package also has a hash of
    its code, because two checkouts of one version can differ.
    """
    package = Path(consyn_jax.__file__).parent
    code = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(path.relative_to(package).as_posix().encode() + b"\0")
        code.update(path.read_bytes())
    names = ("tokenizers", "jinja2", "numpy", "xxhash")
    return {
        "consyn_jax": f"{consyn_jax.__version__} with code {code.hexdigest()[:12]}",
        "Python": ".".join(platform.python_version_tuple()[:2]),
        **{name: importlib.metadata.version(name) for name in names},
    }
