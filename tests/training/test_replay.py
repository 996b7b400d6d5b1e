"""Where a step stopped being finite, and the bundle that brings it back."""

import io
import json
import math
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh

from consyn_jax.config import ModelConfig, RegularisationOptions, UserError
from consyn_jax.data.loader import BatchLoader, Shuffled
from consyn_jax.data.mixture import Mixture
from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.model.dropout import Dropout
from consyn_jax.model.parameters import Params, initial_parameters, layout
from consyn_jax.model.transformer import Compute
from consyn_jax.resolve import resolve
from consyn_jax.training import diagnosis
from consyn_jax.training.diagnosis import BLOCK_PARAMETERS, Diagnosis, Row, began, diagnose, statistics
from consyn_jax.training.optimizer import configured_optimizer
from consyn_jax.training.program import TRAIN_AXES, Program
from consyn_jax.training.replay import Incident, leave_bundle, read_bundle, repeat, sample_names
from consyn_jax.training.step import TrainState, dropout_keys

CONFIG = ModelConfig(vocab_size=259, hidden_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, context=64, tie_embeddings=False)
A, B, T = 2, 8, 8
RUN, _ = resolve({"model": "haiku", "max_tokens": T, "mesh": "data=2,fsdp=4", "optimizer": "sgd", "lr": 1.0, "momentum": 0})


def program(dtype: Any = jnp.float32, dropout: float = 0.0, **axes: int) -> Program:
    mesh = build_mesh(dict.fromkeys(AXES, 1) | axes, jax.devices()[: math.prod(axes.values())])
    rule = configured_optimizer(RUN.optimizer, optax.constant_schedule(1.0), layout(CONFIG).logical_axes)
    return Program(CONFIG, Compute(dtype), rule, 1.0, mesh, RegularisationOptions(dropout=dropout), seed=5)


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, 200, (A, B, T + 1)).astype(np.int32)
    segments = np.broadcast_to(np.where(np.arange(T) < 5, 1, 2), (A, B, T)).astype(np.int32)
    return {"input_ids": ids[..., :-1], "labels": ids[..., 1:], "segment_ids": segments, "loss_mask": np.ones((A, B, T), bool)}


def place(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    return {name: jax.device_put(values, sharding(mesh, TRAIN_AXES)) for name, values in batch.items()}


FIRST = cache(lambda: initial_parameters(CONFIG, 0))


def params_with(change: Callable[[Any], None] = lambda params: None) -> Params:
    """First values, the head's not zero, with a change."""
    params: Any = jax.tree.map(np.array, FIRST())
    params["output"] = np.random.default_rng(1).normal(size=params["output"].shape).astype(np.float32)
    change(params)
    return params


def state_of(p: Program, change: Callable[[Any], None] = lambda params: None) -> TrainState:
    params = jax.tree.map(jax.device_put, params_with(change), p.layout.shardings(p.mesh))
    return p.initial_state(params)


# ---------------------------------------------------------------------------------------------------------------------- statistics


SIX = jax.jit(statistics)


@given(st.lists(st.floats(width=32, allow_subnormal=False), min_size=6, max_size=6))
def test_statistics_are_numpys_over_what_is_finite(values: list[float]) -> None:
    x = np.array(values, np.float32)
    finite = x[np.isfinite(x)].astype(np.float64)
    found = SIX(x)
    assert int(found.nonfinite) == len(x) - len(finite)
    assert float(found.largest) == (np.abs(finite).max() if len(finite) else 0)
    assert float(found.rms) == pytest.approx(np.sqrt(np.mean(finite**2)) if len(finite) else 0, rel=1e-5, abs=1e-37)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_what_is_seen_is_what_the_step_computes(batch: dict[str, np.ndarray]) -> None:
    """With everything that is composed around a step: dropout, the scale of the loss, micro-batches."""
    p = program(jnp.float16, 0.3, data=2)
    state, parts = state_of(p), place(batch, p.mesh)
    found = diagnose(p, state, parts)
    assert [row.place for row in found.activations[:5]] == ["embedding", "layer 0 attention", "layer 0 MLP", "layer 0 residual stream", "layer 1 attention"]
    assert not any(row.nonfinite for row in found.activations + found.gradients + found.weights)

    def hidden(params: Params, batch: Any, a: jax.Array) -> jax.Array:
        model = nnx.merge(p.layout.graphdef, params)
        return model.hidden(batch["input_ids"][a], batch["segment_ids"][a], p.compute, Dropout(dropout_keys(5, 0, A)[a], 0.3))

    with jax.set_mesh(p.mesh), jax.threefry_partitionable(True):
        step = jax.jit(hidden)
        whole = np.stack([np.asarray(step(state.params, parts, jnp.int32(a)), np.float64) for a in range(A)])
    logits = whole @ np.asarray(state.params["output"], np.float64)[: CONFIG.vocab_size].T
    for row, expected in zip(found.activations[-2:], (whole, logits), strict=True):
        assert (row.rms, row.largest) == pytest.approx((np.sqrt(np.mean(expected**2)), np.abs(expected).max()), rel=2e-3)
    shapes: Any = layout(CONFIG).shapes
    sizes = [math.prod(shapes["layers"][row.place.split()[-1]].shape[1:] if "layer" in row.place else shapes[row.place].shape) for row in found.gradients]
    assert math.sqrt(sum(n * row.rms**2 for n, row in zip(sizes, found.gradients, strict=True))) == pytest.approx(found.grad_norm, rel=1e-4)


def test_every_parameter_has_its_place_in_the_forward_pass() -> None:
    assert set(BLOCK_PARAMETERS) == set(layout(CONFIG).shapes["layers"])
    assert set(layout(CONFIG).shapes) == {"embedding", "layers", "norm", "output"}


# ----------------------------------------------------------------------------------------------------------------- where it began


@pytest.fixture(scope="module")
def seen_once() -> Iterator[Program]:
    """A program whose observation is compiled once."""
    p, patch = program(fsdp=4), pytest.MonkeyPatch()
    observe, lower = diagnosis.lower_observation(p, A, B, T).compile(), diagnosis.lower_observation
    patch.setattr(diagnosis, "lower_observation", lambda program, *shape: SimpleNamespace(compile=lambda: observe) if program is p else lower(program, *shape))
    yield p
    patch.undo()


@pytest.fixture
def looked_at(seen_once: Program, batch: dict[str, np.ndarray]) -> Callable[..., Diagnosis]:
    """What the step shows with changed weights."""
    return lambda change: diagnose(seen_once, state_of(seen_once, change), place(batch, seen_once.mesh))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_weight_in_a_layer(looked_at: Callable[..., Diagnosis]) -> None:
    def change(params: Any) -> None:
        params["layers"]["up"][1, 3, 4] = np.inf

    found = looked_at(change)
    where, text = began(found)
    assert where == "layer 1 MLP"
    assert text.startswith("It began in the forward pass: layer 1 MLP has ")
    assert text.endswith("The weight layer 1 up came to this step with 1 value that is not finite. Of 4 devices, such weights are on cpu:0 of process 0."), text
    assert [row.nonfinite > 0 for row in found.activations] == [False] * 5 + [True] * 4


def test_a_row_of_the_embedding_that_few_sequences_read(looked_at: Callable[..., Diagnosis], batch: dict[str, np.ndarray]) -> None:
    token = int(batch["input_ids"][1, 2, 3])
    samples = [[f"sample {a}{b}" for b in range(B)] for a in range(A)]
    holders = [(a, b) for a in range(A) for b in range(B) if token in batch["input_ids"][a, b]]

    def change(params: Any) -> None:
        params["embedding"][token] = np.nan

    found = looked_at(change)
    assert found.sequences == tuple(holders)
    where, text = began(found, samples)
    assert where == "embedding"
    assert f"Of 16 sequences, {len(holders)} ha" in text
    assert "sample 12" in text
    unread = sorted(set(range(200)) - set(batch["input_ids"].ravel().tolist()))[0]

    def change_unread(params: Any) -> None:
        params["embedding"][unread] = np.nan

    assert began(looked_at(change_unread))[1].startswith("Nothing that this step computes comes by it, but the weight embedding has 16 values")


def test_gradients_beyond_float32_and_a_step_that_is_fine(looked_at: Callable[..., Diagnosis]) -> None:
    def change(params: Any) -> None:
        params["output"] *= 1e24  # large logits, and gradients whose squares overflow

    found = looked_at(change)
    assert not any(row.nonfinite for row in found.activations + found.gradients)
    assert began(found)[0] == "gradient norm"
    where, text = began(looked_at(lambda params: None))
    assert where is None
    assert "suspect the device" in text


def test_the_backward_pass_is_followed_to_its_source() -> None:
    def rows(*bad: str) -> tuple[Row, ...]:
        return tuple(Row(place, 1.0, 2.0, int(place in bad)) for place in ("embedding", "layer 0 q", "layer 0 up", "layer 1 q", "layer 1 up", "norm"))

    found = Diagnosis(1.0, math.nan, rows(), rows("embedding", "layer 0 q", "layer 0 up", "layer 1 q"), rows(), (), 8, (), 4)
    assert began(found) == ("layer 1 q", "The forward pass is finite; it began in the backward pass: the gradient of layer 1 q has 1 value that is not finite.")


# ---------------------------------------------------------------------------------------------------------------------- the bundle


@pytest.fixture(scope="module")
def bundle(seen_once: Program, batch: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, p = tmp_path_factory.mktemp("run"), seen_once
    (path / "config.yaml").write_text("model: haiku\nmax_tokens: 8\n")

    def change(params: Any) -> None:
        params["layers"]["q"][1, 0, 0, 0] = np.nan

    incident = Incident(7, {"loss": math.nan, "grad_norm": -math.inf, "tokens": 64.0}, 20, [[f"sample {b}" for b in range(B)]] * A)
    said = leave_bundle(path / "nonfinite" / "7", p, state_of(p, change), place(batch, p.mesh), incident, path / "config.yaml", pytest.fail)
    assert said.startswith("It began in the forward pass: layer 1 attention has")
    assert said.endswith(f"To see the step again: consyn-train --replay {path / 'nonfinite' / '7'}")
    return path / "nonfinite" / "7"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_bundle_stands_alone_and_replays_on_another_mesh(bundle: Path, batch: dict[str, np.ndarray], tmp_path: Path) -> None:
    bundle = shutil.copytree(bundle, tmp_path / "moved")
    read = read_bundle(bundle)
    assert (read.step, read.total_steps, read.model) == (7, 20, CONFIG)
    assert math.isnan(read.metrics["loss"])
    assert read.metrics["grad_norm"] == -math.inf
    for name, values in batch.items():
        assert read.batch[name].dtype == values.dtype
        np.testing.assert_array_equal(read.batch[name], values)
    record = json.loads((bundle / "replay.json").read_text())
    assert record["began"] == "layer 1 attention"
    assert set(record["versions"]) >= {"consyn_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"}
    again = repeat(read, RUN)
    assert math.isnan(again.metrics["loss"])
    assert again.text.startswith("It began in the forward pass: layer 1 attention has")
    assert again.mesh["data"] == 2 != read.mesh["data"]


def damaged(bundle: Path, to: Path, **changes: bytes) -> str:
    """What is said of a bundle some of whose files are others."""
    to.mkdir(parents=True)
    for name in ("replay.json", "batch.npz"):
        (to / name).write_bytes(changes.get(name.partition(".")[0], (bundle / name).read_bytes()))
    with pytest.raises(UserError) as error:
        read_bundle(to)
    assert "\n" not in str(error.value)
    return str(error.value)


def npz(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def npy(values: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


def test_what_is_no_bundle_is_told(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no replay bundle: it has no replay\.json\. Name a directory below nonfinite/ of a run\."):
        read_bundle(tmp_path)
    record = json.loads((bundle / "replay.json").read_text())
    for number, change in enumerate(
        [
            {"format": 2},
            {"shape": [2, 4]},
            {"shape": [2, 4, 10**12]},
            {"shape": [2, -4, 8]},
            {"step": "7"},
            {"samples": [["a"]]},
            {"model": {"vocab_size": 3}},
            {"model": record["model"] | {"hidden_dim": "16"}},
            {"model": record["model"] | {"num_heads": 0}},
            {"metrics": {"loss": []}},
        ]
    ):
        assert "is damaged" in damaged(bundle, tmp_path / str(number), replay=json.dumps(record | change).encode()), change
    for number, content in enumerate([b"", b"[]", b"\xff", b"[" * 100_000, b'{"format": 1}']):
        assert "is damaged" in damaged(bundle, tmp_path / f"json{number}", replay=content)


def test_a_batch_is_never_unpickled(bundle: Path, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("unpickled",))

    ids = np.zeros((A, B, T), np.int32)
    others = {"labels": npy(ids), "segment_ids": npy(ids), "loss_mask": npy(ids.astype(bool))}
    objects = npy(np.array([Harm()], object), allow_pickle=True)
    whole = npy(ids)
    contents = [npz(input_ids=bad, **others) for bad in (objects, pickle.dumps(Harm()), npy(ids[:1]), npy(ids.astype(np.int64)), whole[:-4], b"")]
    for number, content in enumerate([*contents, npz(), b"PK", (bundle / "batch.npz").read_bytes()[:-30]]):
        assert "is damaged" in damaged(bundle, tmp_path / str(number), batch=content)


def test_a_bundle_that_cannot_be_written_hides_nothing(batch: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p, told = program(fsdp=4), []
    monkeypatch.setattr(diagnosis, "_activations", lambda *_: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")))
    (tmp_path / "file").write_text("")
    state, parts = state_of(p), place(batch, p.mesh)
    for where in (tmp_path / "file" / "7", tmp_path / "7"):  # no directory; no config.yaml to copy
        said = leave_bundle(where, p, state, parts, Incident(7, {"loss": math.nan}, 20, None), tmp_path / "none.yaml", told.append)
        assert said == "Where it began is not known: a device refused a second look (RESOURCE_EXHAUSTED: out of memory)."
        assert not where.exists()
    assert told == [
        f"The replay bundle {tmp_path / 'file' / '7'} could not be written: Not a directory.",
        f"The replay bundle {tmp_path / '7'} could not be written: No such file or directory.",
    ]


# ----------------------------------------------------------------------------------------------------------------------- samples


class Numbers:
    """Sequences that say which they are."""

    def __init__(self, size: int, first: int) -> None:
        self.size, self.first = size, first

    def __len__(self) -> int:
        return self.size

    def rows(self, indices: Any) -> dict[str, np.ndarray]:
        return {"input_ids": self.first + np.asarray(indices, np.int32)[:, None]}


@pytest.mark.parametrize("step", [1, 4, 9])
def test_samples_are_named_as_they_are_read(step: int) -> None:
    shuffled, mixture = Shuffled(Numbers(13, 0), 3), Mixture({"a": Numbers(13, 1000), "b": Numbers(5, 2000)}, [0.7, 0.3], 3)
    read = BatchLoader(shuffled, 4, 2).batch(step - 1)["input_ids"][..., 0]
    assert sample_names(shuffled, step, 2, 4) == [[f"sample {i}" for i in row] for row in read]
    read = BatchLoader(mixture, 4, 2).batch(step - 1)["input_ids"][..., 0]
    assert sample_names(mixture, step, 2, 4) == [[f"sample {i % 1000} of {'ab'[i // 1000 - 1]}" for i in row] for row in read]
    assert sample_names(None, step, 2, 4) is None
