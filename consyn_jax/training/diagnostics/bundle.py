"""The replay bundle: everything needed to repeat the step at which a run diverged.

    OUTPUT/nonfinite/STEP/
      replay.json         metrics, first non-finite value, samples, versions; written last, so a
                          directory without it is not a bundle
      config.yaml         configuration of the run
      batch.npz           input_ids, labels, segment_ids, loss_mask, each [A, B, T]; for pairs also
                          chosen_reference, rejected_reference [A, B]
      checkpoints/STEP/   the state before the step, as a checkpoint

A bundle can be moved, and works without the data and the run directory. All files are checked when
they are read, and nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from consyn_jax.data.loader import Batch as HostBatch
from consyn_jax.data.loader import Order, Shuffled
from consyn_jax.data.mixture import Mixture, part_seed
from consyn_jax.data.order import ids_at
from consyn_jax.distributed.process_group import gather, is_first
from consyn_jax.errors import UserError
from consyn_jax.files import irregular
from consyn_jax.model_config import ModelConfig
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.checkpointing.run_state import checked
from consyn_jax.training.diagnostics.first_nonfinite import diagnose, locate_first_nonfinite
from consyn_jax.training.program import BATCH_DTYPES, PAIR_DTYPES, Program
from consyn_jax.training.step import Batch, TrainState, dropout_keys

BUNDLES = "nonfinite"  # directory in a run directory; it has one bundle per step
RECORD, CONFIG, BATCH, STATES = "replay.json", "config.yaml", "batch.npz", "checkpoints"
FORMAT = 1
ENCRYPTED = 1  # flag bit of an encrypted file in a zip archive
LARGEST_RECORD = 1 << 26  # bytes; enough for the sample names of a million sequences
VERSIONS = ("consyn_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

# ------------------------------------------------------------------------------------------ writing


@dataclass(frozen=True)
class Incident:
    """The step at which a run diverged.

    Attributes:
        step: Number of the step, counted from 1. The state before it includes the updates of all
            earlier steps, except those that `--on_nonfinite skip` skipped.
        metrics: Metrics of the step.
        total_steps: Number of steps of the run, on which the learning-rate schedule depends.
        samples: Name of each sequence of the batch, [A, B]; None if sequences have no names.
    """

    step: int
    metrics: dict[str, float]
    total_steps: int
    samples: list[list[str]] | None


def write_bundle(
    place: Path,
    program: Program,
    state: TrainState,
    batch: Batch,
    incident: Incident,
    config: Path,
    warn: Callable[[str], None],
) -> str:
    """Write the bundle of a step, and locate its first non-finite value.

    Every process of a run must call this function. A full disk, or too little device memory to
    repeat the step, raises no error here, because such an error would hide the divergence.

    Args:
        place: Directory to write; an older bundle in it is replaced.
        state: State before the step; it is not changed.
        batch: Arrays named in `Program.batch_dtypes`, and the frozen weights of an adapter run.
        config: Path of the run's config.yaml.
        warn: Function that shows a warning if the bundle could not be written.

    Returns:
        Sentences that say where the first non-finite value is (if known), and how to repeat the
        step.
    """
    kept = {name: batch[name] for name in program.batch_dtypes}
    state = state._replace(nonfinite=jax.device_put(np.int32(0), state.nonfinite.sharding))
    everywhere = NamedSharding(program.mesh, PartitionSpec())
    replicated = jax.jit(lambda b: b, out_shardings=everywhere)(kept)
    arrays: dict[str, Any] = {name: np.asarray(values) for name, values in replicated.items()}
    record = _record(program, batch, incident)
    refused = (
        _on_first_process(partial(_make_empty, place))
        or _save_state(place / STATES, state, incident.step)
        or _on_first_process(partial(_write_files, place, record, arrays, config))
    )
    where = None
    try:
        where, text = locate_first_nonfinite(diagnose(program, state, batch), incident.samples)
    except jax.errors.JaxRuntimeError as error:
        reason = f"{str(error).splitlines()[0]:.200}"
        text = (
            f"The first non-finite value is unknown: a device could not repeat the step ({reason})."
        )
    refused = refused or _on_first_process(partial(_write_record, place, record, where, text))
    if refused:
        _on_first_process(lambda: shutil.rmtree(place, ignore_errors=True))
        warn(f"The replay bundle {place} could not be written: {refused}.")
        return text
    return f"{text} To repeat the step: consyn-train --replay {place}"


def _record(program: Program, batch: Batch, incident: Incident) -> dict[str, Any]:
    """Return the content of replay.json, except for the diagnosis."""
    A, before = batch["labels"].shape[0], incident.step - 1
    keys = (
        jax.random.key_data(dropout_keys(program.seed, before, A)).tolist()
        if program.draws
        else None
    )
    return {
        "format": FORMAT,
        "step": incident.step,
        "metrics": {
            name: value if math.isfinite(value) else str(value)
            for name, value in incident.metrics.items()
        },
        "total_steps": incident.total_steps,
        "samples": incident.samples,
        "seed": program.seed,
        "dropout_keys": keys,
        "shape": list(batch["labels"].shape),
        "mesh": dict(program.mesh.shape),
        "devices": [str(device) for device in program.mesh.devices.flat],
        "versions": {name: version(name) for name in VERSIONS},
        "model": asdict(program.config),
    }


def _make_empty(place: Path) -> None:
    if place.exists():
        shutil.rmtree(place)
    place.mkdir(parents=True)


def _write_files(place: Path, record: dict[str, Any], arrays: dict[str, Any], config: Path) -> None:
    shutil.copyfile(config, place / CONFIG)
    np.savez(place / BATCH, **arrays)
    _write_record(place, record, None, "unknown")


def _write_record(place: Path, record: dict[str, Any], where: str | None, text: str) -> None:
    content = record | {"began": where, "diagnosis": text}
    (place / RECORD).write_text(
        json.dumps(content, allow_nan=False, indent=1) + "\n", encoding="utf-8"
    )


def _save_state(directory: Path, state: TrainState, step: int) -> str | None:
    """Save the state. Return to all processes why saving failed; None after success."""
    warnings: list[str] = []
    try:
        checkpoints = Checkpoints(directory, warn=warnings.append)
    except UserError as refused:
        return str(refused)
    try:
        checkpoints.save(step, state, {})
    finally:
        checkpoints.close()
    return None if checkpoints.steps() else warnings[0]


def _on_first_process(work: Callable[[], None]) -> str | None:
    """Call `work` in process 0. Return to all processes why `work` failed; None after success."""
    reason = ""
    if is_first():
        try:
            work()
        except OSError as error:
            reason = error.strerror or str(error)
    return gather(reason)[0] or None


def sample_names(
    order: Order | None, step: int, accumulation: int, batch_size: int
) -> list[list[str]] | None:
    """Name the sequences of a step's batch, [A, B].

    A name contains the index of the sequence in its dataset; in a mixture, also the source's name.
    Return None if the data has no fixed order, or is a corpus that is still being prepared.

    Args:
        step: Number of the step, counted from 1.
    """
    count = accumulation * batch_size
    positions = np.arange((step - 1) * count, step * count, dtype=np.int64)
    if isinstance(order, Shuffled):
        names = [
            f"sample {i}" for i in ids_at(order.seed, positions, len(order.dataset), order.shuffle)
        ]
    elif isinstance(order, Mixture):
        names, sources = [], list(order.datasets.items())
        for source, index in zip(*order.places(positions), strict=True):
            name, dataset = sources[source]
            seed = part_seed(order.seed, int(source) + 1)
            (i,) = ids_at(seed, np.array([index]), len(dataset))
            names.append(f"sample {i} of {name}")
    else:
        return None
    return [names[a * batch_size : (a + 1) * batch_size] for a in range(accumulation)]


# ------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Bundle:
    """The content of a replay bundle, without the state."""

    path: Path
    step: int
    metrics: dict[str, float]
    total_steps: int
    samples: list[list[str]] | None
    mesh: dict[str, int]
    model: ModelConfig
    batch: HostBatch


def read_bundle(path: Path) -> Bundle:
    """Read and check a bundle.

    Raises:
        UserError: The directory is not a bundle, is damaged, or contains anything but regular files
            and directories.
    """
    if not (path / RECORD).is_file():
        raise UserError(
            f"--replay {path} is not a replay bundle: it has no {RECORD}. Give a directory under "
            f"{BUNDLES}/ of a run."
        )
    if found := irregular(path):
        raise UserError(
            f"--replay {path} is not read: {found[0]} is {found[1]}. Replace it with the file "
            "itself."
        )
    try:
        return _read_bundle(path)
    except OSError as error:
        raise UserError(f"--replay {path} cannot be read: {error.strerror or error}.") from error
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        EOFError,
        NotImplementedError,
        zipfile.BadZipFile,
    ) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.100}"
        raise UserError(
            f"--replay {path} is damaged ({reason}). Restore it from a good copy."
        ) from error


def _read_bundle(path: Path) -> Bundle:
    if (path / RECORD).stat().st_size > LARGEST_RECORD:
        raise ValueError(f"{RECORD} is too large")
    record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']!r:.50}, but this version reads {FORMAT}")
    A, B, T = (_positive(size) for size in record["shape"])
    samples = record["samples"]
    if samples is not None and not (
        len(samples) == A
        and all(len(row) == B and all(isinstance(name, str) for name in row) for row in samples)
    ):
        raise ValueError("the samples do not match the batch")
    return Bundle(
        path,
        step=_positive(record["step"]),
        metrics={str(name): float(value) for name, value in record["metrics"].items()},
        total_steps=_positive(record["total_steps"]),
        samples=samples,
        mesh={str(axis): _positive(size) for axis, size in record["mesh"].items()},
        model=checked(ModelConfig, record["model"]),
        batch=_read_batch(path / BATCH, (A, B, T)),
    )


def _positive(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r:.50} is not a positive integer")
    return value


def _read_batch(file: Path, of_tokens: tuple[int, ...]) -> HostBatch:
    """Read the arrays of a batch without unpickling, and without more memory than the file's size.

    Compressed arrays are refused, because they could expand to any size.
    """
    batch = {}
    with zipfile.ZipFile(file) as archive:
        are_pairs = any(f"{name}.npy" in archive.namelist() for name in PAIR_DTYPES)
        for name, of in (BATCH_DTYPES | (PAIR_DTYPES if are_pairs else {})).items():
            shape = of_tokens[:-1] if name in PAIR_DTYPES else of_tokens
            dtype, size = np.dtype(of), math.prod(shape) * np.dtype(of).itemsize
            about = archive.getinfo(f"{name}.npy")
            if about.compress_type != zipfile.ZIP_STORED or about.flag_bits & ENCRYPTED:
                raise ValueError(f"{name} is compressed or encrypted")
            with archive.open(about) as member:
                is_first_version = np.lib.format.read_magic(member) == (1, 0)
                if (
                    not is_first_version
                    or np.lib.format.read_array_header_1_0(member) != (shape, False, dtype)
                    or len(data := member.read(size)) != size
                ):
                    raise ValueError(f"{name} is not {dtype} {list(shape)}")
                batch[name] = (
                    np.frombuffer(data, np.uint8 if dtype.kind == "b" else dtype)
                    .reshape(shape)
                    .astype(dtype)
                )
    return batch
