"""The replay bundle of a step that ended a run, and the repetition of that step.

    OUTPUT/nonfinite/STEP/
      replay.json         what happened, where it began, which samples, which versions; written last: without it there is no bundle
      config.yaml         the run
      batch.npz           input_ids, labels, segment_ids, loss_mask, each [A, B, T]
      checkpoints/STEP/   the state in front of the step, laid out as any checkpoint

A bundle stands alone: it can be moved, and needs neither the data nor the run directory. What is read from it is checked, never unpickled.
"""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from consyn_jax.config import ModelConfig, RunConfig, UserError, with_flags
from consyn_jax.data.loader import Order, Shuffled
from consyn_jax.data.mixture import Mixture, part_seed
from consyn_jax.data.order import ids_at
from consyn_jax.distributed.mesh import sharding
from consyn_jax.distributed.peers import current_peers
from consyn_jax.training.checkpoint import Checkpoints
from consyn_jax.training.diagnosis import Diagnosis, began, diagnose
from consyn_jax.training.inputs import HostBatch
from consyn_jax.training.program import BATCH_DTYPES, TRAIN_AXES, Program, build_program
from consyn_jax.training.progress import checked
from consyn_jax.training.scheduler import configured_schedule
from consyn_jax.training.step import Batch, TrainState, dropout_keys

BUNDLES = "nonfinite"  # of a run directory: the bundles by step
RECORD, CONFIG, BATCH, STATES = "replay.json", "config.yaml", "batch.npz", "checkpoints"
FORMAT = 1
ENCRYPTED = 1  # among the flags of a member of a zip file
LARGEST_RECORD = 1 << 26  # bytes: the sample ids of a batch of a million sequences
VERSIONS = ("consyn_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

# ------------------------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Incident:
    """The step that ended a run.

    Attributes:
        step: its number; the state has seen one less, and those that --on_nonfinite skip left out.
        metrics: what it computed.
        total_steps: of the run, which its schedule follows.
        samples: what each sequence of its batch is called, [A, B]; None where sequences have no names.
    """

    step: int
    metrics: dict[str, float]
    total_steps: int
    samples: list[list[str]] | None


def leave_bundle(place: Path, program: Program, state: TrainState, batch: Batch, incident: Incident, config: Path, warn: Callable[[str], None]) -> str:
    """Write the bundle, and find out where it began. Every process of a run must call this.

    Neither a full disk nor a device without memory for the second look is an error here: the run has diverged, and that is what must be said.

    Args:
        place: its directory; a bundle that is there is replaced.
        state: in front of the step; it stays as it is.
        batch: with the arrays of `BATCH_DTYPES`, and perhaps others.
        config: the run's config.yaml.
        warn: is told in a sentence what could not be written.

    Returns:
        Sentences for people: where it began, as far as that is known, and how to see it again.
    """
    batch = {name: batch[name] for name in BATCH_DTYPES}
    state = state._replace(nonfinite=jax.device_put(np.int32(0), state.nonfinite.sharding))
    everywhere = NamedSharding(program.mesh, PartitionSpec())
    arrays: dict[str, Any] = {name: np.asarray(values) for name, values in jax.jit(lambda b: b, out_shardings=everywhere)(batch).items()}
    record = _record(program, batch, incident)

    def write(where: str | None, text: str) -> None:
        (place / RECORD).write_text(json.dumps(record | {"began": where, "diagnosis": text}, allow_nan=False, indent=1) + "\n", encoding="utf-8")

    def prepare() -> None:
        if place.exists():
            shutil.rmtree(place)
        place.mkdir(parents=True)

    def finish() -> None:
        shutil.copyfile(config, place / CONFIG)
        np.savez(place / BATCH, **arrays)
        write(None, "unknown")

    refused = _first(prepare) or _save(place / STATES, state, incident.step) or _first(finish)
    try:
        where, text = began(diagnose(program, state, batch), incident.samples)
    except jax.errors.JaxRuntimeError as error:
        where, text = None, f"Where it began is not known: a device refused a second look ({str(error).splitlines()[0]:.200})."
    refused = refused or _first(lambda: write(where, text))
    if refused:
        _first(lambda: shutil.rmtree(place, ignore_errors=True))
        warn(f"The replay bundle {place} could not be written: {refused}.")
        return text
    return f"{text} To see the step again: consyn-train --replay {place}"


def _record(program: Program, batch: Batch, incident: Incident) -> dict[str, Any]:
    """All of replay.json but where it began."""
    A, before = batch["labels"].shape[0], incident.step - 1
    keys = jax.random.key_data(dropout_keys(program.seed, before, A)).tolist() if program.regularisation.dropout else None
    return {
        "format": FORMAT,
        "step": incident.step,
        "metrics": {name: value if math.isfinite(value) else str(value) for name, value in incident.metrics.items()},
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


def _save(directory: Path, state: TrainState, step: int) -> str | None:
    """Save the state; what was refused, in every process the same."""
    said: list[str] = []
    try:
        checkpoints = Checkpoints(directory, warn=said.append)
    except UserError as refused:
        return str(refused)
    try:
        checkpoints.save(step, state, {})
    finally:
        checkpoints.close()
    return None if checkpoints.steps() else said[0]


def _first(work: Callable[[], None]) -> str | None:
    """Do `work` in the first process; what the operating system refused there, if anything, in every process."""
    peers, reason = current_peers(), ""
    if peers is None or peers.process_id == 0:
        try:
            work()
        except OSError as error:
            reason = error.strerror or str(error)
    return (reason if peers is None else peers.gather(reason)[0]) or None


def sample_names(order: Order | None, step: int, accumulation: int, batch_size: int) -> list[list[str]] | None:
    """What the sequences of a step's batch are called, [A, B]: the index in the dataset, behind the name of the source where there are several.

    None where nothing is known of them: of batches that somebody else made, and of a corpus that is still growing.

    Args:
        step: counted from 1.
    """
    count = accumulation * batch_size
    positions = np.arange((step - 1) * count, step * count, dtype=np.int64)
    if isinstance(order, Shuffled):
        names = [f"sample {i}" for i in ids_at(order.seed, positions, len(order.dataset), order.shuffle)]
    elif isinstance(order, Mixture):
        names, sources = [], list(order.datasets.items())
        for source, index in zip(*order.places(positions), strict=True):
            name, dataset = sources[source]
            names.append(f"sample {ids_at(part_seed(order.seed, int(source) + 1), np.array([index]), len(dataset))[0]} of {name}")
    else:
        return None
    return [names[a * batch_size : (a + 1) * batch_size] for a in range(accumulation)]


# ----------------------------------------------------------------------------------------------------------------------- repeating


@dataclass(frozen=True)
class Bundle:
    """A bundle as it was read, without its state."""

    path: Path
    step: int
    metrics: dict[str, float]
    total_steps: int
    samples: list[list[str]] | None
    mesh: dict[str, int]
    model: ModelConfig
    batch: HostBatch


def read_bundle(path: Path) -> Bundle:
    """What is in a bundle.

    Raises:
        UserError: it is none, or damaged.
    """
    if not (path / RECORD).is_file():
        raise UserError(f"--replay {path} is no replay bundle: it has no {RECORD}. Name a directory below {BUNDLES}/ of a run.")
    try:
        return _read_bundle(path)
    except OSError as error:
        raise UserError(f"--replay {path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(f"--replay {path} is damaged ({type(error).__name__}: {' '.join(str(error).split()):.100}). Bring a good copy back.") from error


def _read_bundle(path: Path) -> Bundle:
    if (path / RECORD).stat().st_size > LARGEST_RECORD:
        raise ValueError(f"{RECORD} is too large")
    record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']!r:.50}, where this version reads {FORMAT}")
    A, B, T = (_whole(size) for size in record["shape"])
    samples = record["samples"]
    if samples is not None and not (len(samples) == A and all(len(row) == B and all(isinstance(name, str) for name in row) for row in samples)):
        raise ValueError("the samples are not those of the batch")
    return Bundle(
        path,
        step=_whole(record["step"]),
        metrics={str(name): float(value) for name, value in record["metrics"].items()},
        total_steps=_whole(record["total_steps"]),
        samples=samples,
        mesh={str(axis): _whole(size) for axis, size in record["mesh"].items()},
        model=checked(ModelConfig, record["model"]),
        batch=_read_batch(path / BATCH, (A, B, T)),
    )


def _whole(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r:.50} is no number of things")
    return value


def _read_batch(file: Path, shape: tuple[int, ...]) -> HostBatch:
    """The arrays of a batch. Nothing is unpickled, and no more is read than the file is large."""
    batch = {}
    with zipfile.ZipFile(file) as archive:
        for name, of in BATCH_DTYPES.items():
            dtype, size = np.dtype(of), math.prod(shape) * np.dtype(of).itemsize
            about = archive.getinfo(f"{name}.npy")
            if about.compress_type != zipfile.ZIP_STORED or about.flag_bits & ENCRYPTED:
                raise ValueError(f"{name} is not stored as it is")
            with archive.open(about) as member:
                is_first_version = np.lib.format.read_magic(member) == (1, 0)
                if not is_first_version or np.lib.format.read_array_header_1_0(member) != (shape, False, dtype) or len(data := member.read(size)) != size:
                    raise ValueError(f"{name} is not {dtype} {list(shape)}")
                batch[name] = np.frombuffer(data, np.uint8 if dtype.kind == "b" else dtype).reshape(shape).astype(dtype)
    return batch


@dataclass(frozen=True)
class Repeated:
    """A step once more.

    Attributes:
        metrics: of the train step itself, compiled as in the run.
        mesh: on which it ran; on another than the run's, the last digits differ.
        text: where it began, in sentences.
    """

    metrics: dict[str, float]
    diagnosis: Diagnosis
    mesh: dict[str, int]
    text: str


def repeat(bundle: Bundle, run: RunConfig) -> Repeated:
    """Repeat the step of a bundle on the devices that are here.

    Args:
        run: as the run was told, or with another mesh or precision.

    Raises:
        UserError: the state is damaged or of another model, or these devices do not fit.
    """
    A, B, T = bundle.batch["labels"].shape
    run = with_flags(run, {"batch_size": B, "gradient_accumulation_steps": A, "max_tokens": T})
    program = build_program(bundle.model, run, configured_schedule(run.optimizer, bundle.total_steps), jax.devices()).program
    checkpoints = Checkpoints(bundle.path / STATES)
    try:
        state, _ = checkpoints.restore(bundle.step, program.state_like)
    finally:
        checkpoints.close()
    where = sharding(program.mesh, TRAIN_AXES)
    batch: Batch = {name: jax.make_array_from_callback(values.shape, where, values.__getitem__) for name, values in bundle.batch.items()}
    found = diagnose(program, state, batch)
    _, metrics = program.lower_train_step(A, B, T).compile()(state, batch)  # last, as it takes the state
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    return Repeated(values, found, dict(program.mesh.shape), began(found, bundle.samples)[1])
