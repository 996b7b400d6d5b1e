"""Each reader of foreign files as a function of bytes, and what such a function must never do.

A target may return, or raise a `UserError` of one or two lines. It must not raise anything else,
unpickle, start a process, or open a file outside its own directory, those of Python, and those of
this project, including its cache (CONSYN_CACHE).
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from model_targets import MODEL_TARGETS, model_seeds
from record_targets import RECORD_TARGETS, record_seeds
from row_targets import ROW_TARGETS, row_seeds
from safetensors.numpy import save

from consyn_jax.config_file import read_config_file
from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.data.sources.discovery import find_sources
from consyn_jax.data.store import TokenStore
from consyn_jax.errors import UserError
from consyn_jax.model.pretrained.config_json import read_config, to_hf_config
from consyn_jax.model.pretrained.inspection import read_checkpoint
from consyn_jax.model.pretrained.weights import load_parameters
from consyn_jax.model_config import ModelConfig
from consyn_jax.resolve import resolve
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.checkpointing.checkpoint_files import CHECKSUMS, STATE
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.checkpointing.run_state import Progress
from consyn_jax.training.diagnostics.bundle import BATCH, RECORD, read_bundle
from consyn_jax.training.logging.metrics import read_metrics
from consyn_jax.training.program import BATCH_DTYPES
from consyn_jax.training.run.opening import check_output
from consyn_jax.training.step import TrainState

STATE_LIKE = TrainState(jnp.int32(1), {"w": jnp.arange(6.0).reshape(2, 3)}, {}, jnp.int32(0))
TREE = "_METADATA"  # Orbax's name for it
BUNDLE: dict[str, Any] = {
    "format": 1,
    "step": 3,
    "shape": [1, 2, 4],
    "samples": None,
    "metrics": {"loss": "nan"},
    "total_steps": 9,
    "mesh": {"data": 1},
}
MODEL = ModelConfig(
    vocab_size=32,
    hidden_dim=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=16,
    context=16,
)
BUNDLE["model"] = dataclasses.asdict(MODEL)


def recipe(data: bytes, here: Path) -> None:
    """A file for `--config`."""
    resolve({}, read_config_file(written(here / "recipe.yaml", data)), file_name="recipe.yaml")


def run_config(data: bytes, here: Path) -> None:
    """The config.yaml of a run to resume."""
    written(here / "config.yaml", data)
    (here / "checkpoints" / "5").mkdir(parents=True, exist_ok=True)
    config, _ = resolve({"model": "haiku", "output": str(here), "max_steps": 10})
    check_output(
        config,
        {
            "total_steps": 10,
            "data": "x",
            "validation": None,
            "tokenizer": "y",
            "sequences_per_step": 8,
            "vocab_size": 32,
        },
    )


def metrics(data: bytes, here: Path) -> None:
    """metrics.jsonl."""
    read_metrics(written(here / "metrics.jsonl", data))


def progress(data: bytes, here: Path) -> None:
    """The record of a checkpoint."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return
    Progress.from_json(record)


def checksums(data: bytes, here: Path) -> None:
    """CHECKSUMS of a checkpoint."""
    directory = here / "checkpoints"
    if not directory.exists():
        a_checkpoint(directory)
    written(directory / "1" / CHECKSUMS, data)
    checkpoints = Checkpoints(directory)
    try:
        checkpoints.newest()
    finally:
        checkpoints.close()


def tree(data: bytes, here: Path) -> None:
    """A checkpoint's description of its arrays, with the right checksum."""
    directory = here / "checkpoints"
    if not directory.exists():
        a_checkpoint(directory)
    sums, file = directory / "1" / CHECKSUMS, directory / "1" / STATE / TREE
    others = [line for line in sums.read_text().splitlines() if not line.endswith(TREE)]
    sums.write_text("\n".join([*others, f"{xxhash.xxh3_128_hexdigest(data)}  {STATE}/{TREE}\n"]))
    written(file, data)
    checkpoints = Checkpoints(directory)
    try:
        checkpoints.restore(1, jax.eval_shape(lambda: STATE_LIKE))
    finally:
        checkpoints.close()


def bundle(data: bytes, here: Path) -> None:
    """replay.json of a bundle."""
    written(here / BATCH, npz())
    written(here / RECORD, data)
    read_bundle(here)


def bundle_batch(data: bytes, here: Path) -> None:
    """batch.npz of a bundle."""
    written(here / RECORD, json.dumps(BUNDLE).encode())
    written(here / BATCH, data)
    read_bundle(here)


def manifest(data: bytes, here: Path) -> None:
    """The manifest of a token store."""
    directory = here / "store"
    if not directory.exists():
        a_store(directory)
    written(directory / "manifest.json", data)
    store = TokenStore(directory)
    for name in ("train", "validation"):
        split = store.split(name)
        split.read(0, np.zeros(min(split.num_tokens, 100), np.int32))


def model_config(data: bytes, here: Path) -> None:
    """config.json of a model."""
    written(here / "config.json", data)
    read_config(here)


def weights(data: bytes, here: Path) -> None:
    """model.safetensors."""
    written(here / "config.json", json.dumps(to_hf_config(MODEL)).encode())
    written(here / "model.safetensors", data)
    read_checkpoint(here)
    load_parameters(here, MODEL)


def weights_index(data: bytes, here: Path) -> None:
    """model.safetensors.index.json."""
    written(here / "config.json", json.dumps(to_hf_config(MODEL)).encode())
    written(here / "model.safetensors.index.json", data)
    read_checkpoint(here)
    load_parameters(here, MODEL)


def tokenizer(data: bytes, here: Path) -> None:
    """tokenizer.json."""
    loaded = BPETokenizer.from_file(written(here / "tokenizer.json", data))
    loaded.decode(loaded.encode("some text"))


def rows(data: bytes, here: Path) -> None:
    """JSON Lines to train on."""
    corpus(written(here / "rows.jsonl", data), here)


def text(data: bytes, here: Path) -> None:
    """Text to train on."""
    corpus(written(here / "text.txt", data), here)


def tokens(data: bytes, here: Path) -> None:
    """A token file as NumPy writes it."""
    find_sources([str(written(here / "train.npy", data))])


def corpus(file: Path, here: Path) -> None:
    """Look at a file of documents, and prepare it."""
    config, _ = resolve(
        {
            "model": "haiku",
            "data": [str(file)],
            "tokenizer": "bytes",
            "num_workers": 0,
            "validation_fraction": 0.0,
        }
    )
    output = Path(tempfile.mkdtemp(dir=here))
    try:
        prepare(config.data, output=output / "tokens")
    finally:
        shutil.rmtree(output)


def a_store(directory: Path) -> bytes:
    """A token store of two documents; its manifest."""
    rows = written(
        directory.with_name("seed.jsonl"), b'{"text": "one"}\n{"text": "two and a bit"}\n'
    )
    config, _ = resolve(
        {
            "model": "haiku",
            "data": [str(rows)],
            "tokenizer": "bytes",
            "num_workers": 0,
            "validation_fraction": 0.0,
        }
    )
    prepare(config.data, output=directory)
    return (directory / "manifest.json").read_bytes()


def a_checkpoint(directory: Path) -> Path:
    """A checkpoint of step 1."""
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, STATE_LIKE, {"step": 1})
    checkpoints.close()
    return directory / "1"


def npz() -> bytes:
    """The batch of a bundle."""
    file = io.BytesIO()
    np.savez(
        file, **{name: np.zeros(BUNDLE["shape"], dtype) for name, dtype in BATCH_DTYPES.items()}
    )
    return file.getvalue()


def written(file: Path, data: bytes) -> Path:
    """Write `data` to `file`, and return it."""
    file.write_bytes(data)
    return file


def seeds(here: Path) -> dict[str, list[bytes]]:
    """Valid inputs for each target."""
    array = (
        np.lib.format.magic(1, 0)
        + b"\x76\x00{'descr': '<u2', 'fortran_order': False, 'shape': (3,), }"
        + b" " * 60
        + b"\n"
        + bytes(6)
    )
    checkpoint = a_checkpoint(here / "checkpoints")
    model = {
        "model.embed_tokens.weight": np.zeros((32, 8), np.float32),
        "model.norm.weight": np.ones(8, np.float32),
    }
    return {
        "recipe": [
            b"model: haiku\nlr: 1.0e-3\ndata: [a.txt, b]\n",
            b"epochs: 2\nbatch_size: 8 # eight\n",
        ],
        "run_config": [
            b"model: haiku\nlr: 0.003\n"
            b"derived: {total_steps: 10, data: x, sequences_per_step: 8, vocab_size: 32}\n"
        ],
        "metrics": [
            b'{"step": 1, "tokens": 8, "time_s": 0.1, "train/loss": 2.5}\n'
            b'{"step": 2, "tokens": 16, "time_s": 0.2, "event": "save"}\n'
        ],
        "progress": [
            json.dumps(
                {"step": 3, "tokens": 96, "selection": {}, "plateau": None, "tracker_id": None}
            ).encode()
        ],
        "checksums": [(checkpoint / CHECKSUMS).read_bytes()],
        "tree": [(checkpoint / STATE / TREE).read_bytes()],
        "bundle": [json.dumps(BUNDLE).encode()],
        "bundle_batch": [npz()],
        "manifest": [a_store(here / "seed")],
        "model_config": [json.dumps(to_hf_config(MODEL)).encode()],
        "weights": [save(model)],
        "weights_index": [
            b'{"metadata": {}, "weight_map": '
            b'{"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}'
        ],
        "tokenizer": [BPETokenizer.bytes().to_json().encode()],
        "rows": [
            b'{"text": "one"}\n{"text": "two"}\n',
            b'{"prompt": "a", "completion": "b"}\n',
            b'{"messages": [{"role": "assistant", "content": "x"}]}\n',
        ],
        "text": [b"One line.\n\nAnother.\n", gzip.compress(b"One line.\n", mtime=0)],
        "tokens": [array],
        **model_seeds(here),
        **record_seeds(here),
        **row_seeds(here),
    }


READERS = (
    recipe,
    run_config,
    metrics,
    progress,
    checksums,
    tree,
    bundle,
    bundle_batch,
    manifest,
    model_config,
    weights,
    weights_index,
)
TARGETS: dict[str, Callable[[bytes, Path], None]] = (
    {f.__name__: f for f in (*READERS, tokenizer, rows, text, tokens)}
    | MODEL_TARGETS
    | RECORD_TARGETS
    | ROW_TARGETS
)

# ----------------------------------------------------------------------------- what must not happen

FORBIDDEN = {
    "pickle.find_class",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "ctypes.dlopen",
    "socket.connect",
}
_allowed: list[str] | None = None


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _allowed is None:
        return
    if event in FORBIDDEN:
        raise AssertionError(f"{event} {args} because of what a file said")
    if event == "open" and isinstance(args[0], str):
        # Without resolving links, which would be another event.
        path = PurePath(os.path.normpath(args[0]))
        if ".." in path.parts or (
            path.is_absolute() and not any(path.is_relative_to(place) for place in _allowed)
        ):
            raise AssertionError(f"opened {args[0]}, outside {_allowed}")


sys.addaudithook(_watch)


@contextmanager
def watched(here: Path) -> Iterator[None]:
    """Fail on anything forbidden, and on opening a file outside `here` that is not allowed."""
    global _allowed
    _allowed = [
        str(here),
        sys.prefix,
        sys.base_prefix,
        *filter(os.path.isabs, sys.path),
        str(Path(__file__).parents[2]),
        "/proc/",
        "/sys/",
        "/dev/",
        "/usr/share/zoneinfo/",
    ]
    _allowed.append(os.environ["CONSYN_CACHE"])
    try:
        yield
    finally:
        _allowed = None


def attempt(name: str, data: bytes, here: Path) -> str | None:
    """Run one target, and return its error message, or None if it took the data."""
    with watched(here):
        try:
            TARGETS[name](data, here)
        except UserError as answer:
            said = str(answer)
            assert 0 < len(said) < 2000, said
            assert "Traceback" not in said
            return said
    return None
