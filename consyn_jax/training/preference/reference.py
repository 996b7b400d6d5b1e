"""The reference of a DPO run: the log-probability of each answer under the initial model.

It is computed once, before step 1, in the same way as in the training step, and is written to the
run directory. A resumed run reads it from there, because its model is no longer the initial one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float32

from consyn_jax.config import RunConfig
from consyn_jax.data.loader import prefetch
from consyn_jax.data.pairs import PairDataset
from consyn_jax.distributed.mesh import local_rows, placer
from consyn_jax.distributed.process_group import gather, is_first
from consyn_jax.errors import UserError, remedy
from consyn_jax.files import write_whole
from consyn_jax.model.parameters import Params
from consyn_jax.model.pretrained.safetensors_files import open_file
from consyn_jax.training.inputs.batch_source import BatchSource
from consyn_jax.training.inputs.indexed_batches import IndexedBatches
from consyn_jax.training.open_run import RunInputs
from consyn_jax.training.program import BATCH_DTYPES, EVAL_AXES, Program
from consyn_jax.training.step import BASE

FILE = "reference.safetensors"
RESTORE = "Restore it from a good copy, start anew with --overwrite, or name another --output."
Found = dict[str, Float32[np.ndarray, "n 2"]]


def make_ready(
    inputs: RunInputs,
    run: RunConfig,
    path: Path,
    params: Params | None,
    base: Mapping[str, Any],
    before_write: Callable[[], None] | None = None,
    tick: Callable[[], None] = lambda: None,
    note: Callable[[str], None] = lambda text: None,
    splits: Collection[str] = ("train", "validation"),
) -> None:
    """Load the reference log-probabilities of a run's pairs, or compute them.

    Do nothing if the objective is not DPO. Every process of a run must call this function.

    Args:
        inputs: Inputs of the run; `derived` identifies data, tokenizer and initial weights.
        run: Configuration of the run, with micro-batches that fit the devices.
        path: The run directory.
        params: Parameters of the initial model; None for a resumed run.
        base: Frozen weights of the initial model.
        before_write: Function that is called before the file is written; None to write no file.
        tick: Function that is called before every batch.
        note: Function that is called with a message before the first batch.
        splits: Names of the splits whose pairs are needed.

    Raises:
        UserError: The run is resumed, and the file is missing, damaged, or from another run.
    """
    program = inputs.program
    if not program.trains_on_pairs:
        return
    both = {"train": inputs.train_source, "validation": inputs.eval_source}
    given = {name: s for name, s in both.items() if s is not None and name in splits}
    for source in given.values():
        _set(source, None)
    key = _key(program, run, inputs.derived)
    counts = {name: _count(source) for name, source in given.items()}
    found, fault = _look(path / FILE, key, counts)
    if fault and params is None:
        raise UserError(f"{fault} {RESTORE}")
    if fault:
        total = sum(counts.values())
        note(f"Before step 1: log-probabilities of {total:,} pairs under the initial model.")
        found = {n: _compute(program, run, s, params, base, tick) for n, s in given.items()}
        if before_write is not None and is_first():
            before_write()
            _write(path / FILE, key, found)
    for name, source in given.items():
        _set(source, found[name])


def _look(file: Path, key: str, counts: Mapping[str, int]) -> tuple[Found, str]:
    """Read a run's reference file in every process.

    Returns:
        The reference log-probabilities, and the first error of any process ("" if there is none).
    """
    found: Found = {}
    fault = ""
    try:
        found = _read(file, key, counts)
    except UserError as error:
        fault = str(error)
    return found, next(filter(None, gather(fault)), "")


def ready_to_evaluate(inputs: RunInputs, path: Path) -> None:
    """Load the reference log-probabilities of the validation pairs from the run directory.

    If the directory has none, compute them with the current model, and do not write them.

    Raises:
        UserError: The model cannot be read, or the log-probabilities in the directory are those of
            another model.
    """
    if not inputs.program.trains_on_pairs:
        return
    params, base = None, {}
    if not (path / FILE).is_file():
        params, base = inputs.make_parameters(inputs.program.mesh), inputs.make_base()
    make_ready(inputs, inputs.run, path, params, base, splits=["validation"])


def _pairs(source: BatchSource) -> list[PairDataset]:
    """Return a source's datasets of pairs, in the order in which an evaluation reads them."""
    dataset = source.dataset if isinstance(source, IndexedBatches) else None
    mixed = getattr(dataset, "sources", None)
    found = [dataset] if mixed is None else [one.packed for one in mixed.values()]
    return [pairs for pairs in found if isinstance(pairs, PairDataset)]


def _count(source: BatchSource) -> int:
    return sum(map(len, _pairs(source)))


def _set(source: BatchSource, reference: Float32[np.ndarray, "n 2"] | None) -> None:
    start = 0
    for pairs in _pairs(source):
        stop = start + len(pairs)
        pairs.reference, start = None if reference is None else reference[start:stop], stop


def _key(program: Program, run: RunConfig, derived: Mapping[str, Any]) -> str:
    """Hash everything that determines the reference log-probabilities.

    Settings that only change the order of additions are left out, because they only change
    rounding errors.
    """
    content = {name: derived.get(name) for name in ("data", "validation", "tokenizer", "weights")}
    content |= {
        "length": run.length,
        "on_long_rows": run.data.on_long_rows,
        "precision": [np.dtype(program.compute.dtype).name, program.compute.fp8],
        "base": run.lora.lora_base_dtype if run.lora.is_used else None,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _compute(
    program: Program,
    run: RunConfig,
    source: BatchSource,
    params: Params | None,
    base: Mapping[str, Any],
    tick: Callable[[], None],
) -> Float32[np.ndarray, "n 2"]:
    batch_size, found = run.budget.batch_size, []
    like = program.batch_like((batch_size, run.row_length), EVAL_AXES)
    step = program.lower_forward(
        lambda params, batch: program.log_probs(params, batch, batch.get(BASE)),
        {name: like[name] for name in BATCH_DTYPES},
        NamedSharding(program.mesh, PartitionSpec()),  # every process gets all results
    ).compile()
    gather("compiled")  # otherwise collectives could time out while a process compiles
    batches = source.evaluation(batch_size, local_rows(program.mesh, batch_size))
    with prefetch(batches, transform=placer(program.mesh, EVAL_AXES)) as ready:
        for batch in ready:
            tick()
            found.append(np.asarray(step(params, {**batch, **base})))
    return np.concatenate(found)[: _count(source)]


def _digest(found: Found) -> str:
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(found[name].astype("<f4").tobytes())
    return digest.hexdigest()


def _write(file: Path, key: str, found: Found) -> None:
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(values) for name, values in found.items()}
    try:
        write_whole(file, save(arrays, {"key": key, "sha256": _digest(found)}))
    except OSError as error:
        raise UserError(
            f"{file} cannot be written: {error.strerror or error}. {remedy(error)}, or name "
            "another --output."
        ) from error


def _read(file: Path, key: str, counts: Mapping[str, int]) -> Found:
    """Read the reference log-probabilities from a run's file.

    Raises:
        UserError: The file is missing or damaged, or was computed with other data, weights, lengths
            or precision.
    """
    from safetensors import SafetensorError

    about = "the reference log-probabilities of this run"
    if not file.is_file():
        raise UserError(f"{file}, with {about}, is missing.")
    try:
        with open_file(file) as opened:
            record = opened.metadata() or {}
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}, with {about}, cannot be read ({error}).") from error
    if record.get("key") != key:
        raise UserError(
            f"{file} was computed with other data, other initial weights, or another --max_tokens "
            "or --mixed_precision than this run has."
        )
    shapes = {name: (values.shape, values.dtype.name) for name, values in found.items()}
    wanted = {name: ((count, 2), "float32") for name, count in counts.items()}
    if {n: shapes.get(n) for n in wanted} != wanted or record.get("sha256") != _digest(found):
        raise UserError(f"{file}, with {about}, is damaged.")
    return found
