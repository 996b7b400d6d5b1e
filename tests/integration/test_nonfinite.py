"""Values that stop being finite in a run: in data, weights, gradients, on one device. The policy is
followed, and the bundle brings the step back."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.cli.train import main
from consyn_jax.model import block_matmuls
from consyn_jax.training.loop import Training
from consyn_jax.training.step import TrainState

from . import nursery as processes
from .conftest import MODEL, Run
from .nursery import Nursery, of_process

# One recipe for all, as each program is compiled once a session.
FLAGS = [
    *MODEL,
    "--num_layers",
    "2",
    "--tie_embeddings",
    "false",
    "--max_steps",
    "26",
    "--max_tokens",
    "32",
    "--batch_size",
    "8",
    "--lr",
    "1e-3",
]
FLAGS += [
    "--validation_fraction",
    "0",
    "--logging_steps",
    "1",
    "--save_steps",
    "2",
    "--logging_backend",
    "none",
]
SKIP = ["--on_nonfinite", "skip", "--max_nonfinite_steps", "3"]
RARE = ord("~")  # a byte is a token

Poison = Callable[[TrainState], TrainState]


@pytest.fixture
def rare(home: Path) -> Path:
    """The documents of `corpus`; one of them has a byte that no other has."""
    file = home / "rare.jsonl"
    file.write_text(
        "".join(
            json.dumps(
                {"text": f"Document {i} says {'~' if i == 33 else 'so ' * (i % 6 + 1)}and ends."}
            )
            + "\n"
            for i in range(70)
        )
    )
    return file


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Poison], None]:
    """Change the state in front of one step of every run that follows."""
    loop = Training._loop

    def arm(step: int, change: Poison) -> None:
        def poisoned(
            self: Training, state: TrainState, train_step: Any, *others: Any
        ) -> TrainState:
            def with_poison(state: TrainState, batch: Any) -> Any:
                return train_step(
                    change(state)
                    if int(state.step) == step - 1 and int(state.nonfinite) == 0
                    else state,
                    batch,
                )

            return loop(self, state, with_poison, *others)

        monkeypatch.setattr(Training, "_loop", poisoned)

    return arm


def with_weight(name: str, index: Any, value: float) -> Poison:
    """Sets an element of a parameter, which stays where it lies."""

    def change(state: TrainState) -> TrainState:
        params: Any = jax.tree.map(lambda leaf: leaf, state.params)
        holder = params if name in params else params["layers"]
        where = holder[name].sharding
        holder[name] = jax.device_put(holder[name].at[index].set(value), where)
        return state._replace(params=params)

    return change


def bundle_of(run: Run, step: int | None = None) -> tuple[Path, dict[str, Any]]:
    """The bundle that a run left, of which the log and the last words speak."""
    event = run.lines[-1]
    assert (event["event"], event["action"]) == ("nonfinite", "halt")
    assert step in (None, event["step"])
    path = run.path / event["bundle"]
    assert run.code == 3, run.said
    assert f"consyn-train: Step {event['step']}: loss " in run.said
    assert run.said.endswith(f"To repeat the step: consyn-train --replay {path}\n")
    record = json.loads((path / "replay.json").read_text())
    assert record["step"] == event["step"]
    return path, record


@pytest.fixture
def replayed(capfd: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    def replay(path: Path, *flags: str) -> str:
        capfd.readouterr()
        assert main(["--replay", str(path), *flags]) == 0
        return capfd.readouterr().out

    return replay


@pytest.mark.slow
def test_data_that_no_finite_loss_comes_from(
    here: Callable[..., Run],
    replayed: Callable[..., str],
    poison: Callable[[int, Poison], None],
    rare: Path,
    tmp_path: Path,
) -> None:
    """A token whose embedding is broken, and which one document has."""
    poison(1, with_weight("embedding", RARE, np.nan))
    flags = [*FLAGS, "--data", rare]
    halted = here(tmp_path / "run", *flags)
    path, record = bundle_of(halted)
    assert 1 < record["step"] < 26
    assert record["began"] == "embedding"
    ids, samples = (
        np.load(path / "batch.npz", allow_pickle=False)["input_ids"],
        np.array(record["samples"]),
    )
    (named,) = re.findall(r"Affected sequences: (\d+) of 8 \((.*)\)\. To repeat", halted.said)
    assert named == (
        str(sum((ids == RARE).any(-1).ravel())),
        ", ".join(samples[(ids == RARE).any(-1)]),
    )

    table = replayed(path)
    assert re.search(r"^loss +nan; in the run nan$", table, re.MULTILINE)
    assert re.search(r"^embedding +\S+ +\S+ +\d+$", table, re.MULTILINE)
    assert "The first non-finite activations are in embedding: " in table

    again = here(tmp_path / "run", *flags)  # from the last checkpoint, into the same step
    assert (again.code, again.lines[-1]["step"], again.events.count("nonfinite")) == (
        3,
        record["step"],
        1,
    )
    skipping = here(tmp_path / "run", *flags, *SKIP)
    assert skipping.code == 0, skipping.said
    whole = here(tmp_path / "whole", *flags, *SKIP)
    assert (skipping.numbers, skipping.weights) == (whole.numbers, whole.weights)
    left_out = [line for line in whole.lines if line.get("event") == "nonfinite"]
    assert [line for line in skipping.lines if line.get("event") == "nonfinite"][-1][
        "step"
    ] == left_out[-1]["step"]
    assert {line["action"] for line in left_out} == {"skip"}
    assert left_out[0]["step"] == record["step"]
    assert (
        f"Step {record['step']}: loss nan, gradient norm nan; the update is skipped. Skipped updates in a row: 1; at 3, the run ends."
        in whole.said
    )
    lines = {line["step"]: line for line in whole.lines if "train/learning_rate" in line}
    assert {step for step, line in lines.items() if "train/loss" not in line} == {
        line["step"] for line in left_out
    }
    assert (
        lines[record["step"]]["train/learning_rate"]
        == lines[record["step"] + 1]["train/learning_rate"]
    )  # the schedule has waited


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A swiglu whose backward pass fails where the gate is very large."""

    @jax.custom_vjp
    def function(gate: jax.Array, up: jax.Array) -> jax.Array:
        return jax.nn.silu(gate) * up

    def backward(kept: Any, dy: jax.Array) -> Any:
        gate, up = kept
        return jnp.where(jnp.max(jnp.abs(gate)) > 1e6, jnp.nan, 1.0) * dy * up, dy * gate

    function.defvjp(lambda gate, up: (function(gate, up), (gate, up)), backward)
    monkeypatch.setattr(block_matmuls, "swiglu", function)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.usefixtures("fragile")
def test_gradients_of_one_layer(
    here: Callable[..., Run],
    replayed: Callable[..., str],
    poison: Callable[[int, Poison], None],
    corpus: Path,
    tmp_path: Path,
) -> None:
    poison(4, with_weight("gate", (0, 0, 0), 1e9))
    path, record = bundle_of(
        here(tmp_path / "run", *FLAGS, "--data", corpus, "--mesh", "data=8"), 4
    )
    assert record["began"] == "layer 0 gate"
    assert math.isfinite(record["metrics"]["loss"])
    table = replayed(path)
    assert (
        f"loss       {record['metrics']['loss']!r}; in the run {record['metrics']['loss']!r}\n"
        in table
    )  # to the last bit
    assert (
        "In the backward pass, the first non-finite gradients are those of layer 0 gate: " in table
    )


def on_one_device(number: int) -> Poison:
    """NaN in what a device holds of a parameter; in its own copy only, where each has one."""

    def change(state: TrainState) -> TrainState:
        params: Any = jax.tree.map(lambda leaf: leaf, state.params)
        leaf = params["layers"]["up"]
        parts = [
            shard.data * (jnp.nan if shard.device.id == number else 1.0)
            for shard in leaf.addressable_shards
        ]
        params["layers"] = {
            **params["layers"],
            "up": jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts),
        }
        return state._replace(params=params)

    return change


@pytest.mark.slow
@pytest.mark.exhaustive
def test_weights_of_one_device(
    here: Callable[..., Run],
    replayed: Callable[..., str],
    poison: Callable[[int, Poison], None],
    corpus: Path,
    tmp_path: Path,
) -> None:
    """A part of the weights that nobody else has, and no step is ever finite again."""
    poison(3, on_one_device(5))
    run = here(tmp_path / "run", *FLAGS, "--data", corpus, *SKIP)
    path, record = bundle_of(run, 5)
    assert [
        (line["step"], line["action"]) for line in run.lines if line.get("event") == "nonfinite"
    ] == [(3, "skip"), (4, "skip"), (5, "halt")]
    assert record["began"] == "layer 0 MLP"
    sentence = "Such weights are on 1 of 8 devices: cpu:5 of process 0."
    assert sentence in run.said
    assert sentence in replayed(path)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.usefixtures("fragile")
def test_one_copy_of_the_weights(
    here: Callable[..., Run],
    replayed: Callable[..., str],
    poison: Callable[[int, Poison], None],
    corpus: Path,
    tmp_path: Path,
) -> None:
    """Every device has all weights, and one has them wrong. It is its sequence that fails; a
    checkpoint is written by all devices, so it has its share."""
    poison(3, on_one_device(5))
    run = here(tmp_path / "run", *FLAGS, "--data", corpus, "--mesh", "data=8")
    path, record = bundle_of(run, 3)
    assert (
        "Such weights are on 1 of 8 devices: cpu:5 of process 0. "
        "Affected sequences: 1 of 8 (sample " in run.said
    )
    assert record["began"] == "layer 0 MLP"
    table = replayed(path)
    assert re.search(r"^loss +nan; in the run nan$", table, re.MULTILINE)
    assert "The first non-finite activations are in layer 0 MLP: " in table


# A token whose embedding is broken, in all processes alike.
BROKEN = f"""
import jax
from consyn_jax.training.trainer import ConsynTrainer
made = ConsynTrainer.parameters
def with_a_broken_row(self, mesh):
    params = made(self, mesh)
    table = params["embedding"]
    params["embedding"] = jax.jit(lambda x: x.at[{RARE}].set(float("nan")), out_shardings=table.sharding)(table)
    return params
ConsynTrainer.parameters = with_a_broken_row
"""
# One process reads it, in the second of its sequences of step 10.
READ = f"""
from consyn_jax.data import loader
inner = loader.BatchLoader.batch
def batch(self, step):
    rows = inner(self, step)
    if step == 9: rows["input_ids"][0, 1, 7] = {RARE}
    return rows
loader.BatchLoader.batch = batch
"""
# For process 0, ten seconds go by between two steps.
HURRIED = """
import itertools
from consyn_jax.training.runtime import signals
ticks = itertools.count(0, 10)
signals.monotonic = lambda: next(ticks)
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_data_of_one_of_two_processes(nursery: Nursery, corpus: Path, tmp_path: Path) -> None:
    """They end together, and leave one bundle. The checkpoint of step 7 is made by the clock of
    process 0, by both."""
    path = tmp_path / "run"
    flags = [
        *processes.FLAGS,
        "--tie_embeddings",
        "false",
        "--validation_fraction",
        "0",
        "--save_steps",
        "16",
        "--save_minutes",
        "1",
    ]
    children = nursery.together(
        *flags,
        "--data",
        corpus,
        "--output",
        path,
        before=BROKEN + of_process(0, HURRIED) + of_process(1, READ),
    )
    assert [child.wait(240) for child in children] == [3, 3], [child.said for child in children]
    sentence = re.search(r"^consyn-train: Step 10: loss nan, .*$", children[0].said, re.MULTILINE)
    assert sentence is not None
    assert sentence[0] in children[1].said
    run = Run(path, 3, sentence[0] + "\n")
    bundle, record = bundle_of(run, 10)
    assert [line["step"] for line in run.lines if line.get("event") == "save"] == [7]
    assert [entry.name for entry in (path / "nonfinite").iterdir()] == ["10"]
    assert sorted(entry.name for entry in (path / "checkpoints").iterdir()) == ["7"]
    ids = np.load(bundle / "batch.npz", allow_pickle=False)["input_ids"]
    assert np.argwhere(ids == RARE).tolist() == [[0, 5, 7]]
    named = (
        "The first non-finite activations are in embedding: 32 non-finite values. "
        "Before this step, the weight embedding already had 32 non-finite values"
    )
    assert named in run.said
    one_of_them = f"Affected sequences: 1 of 8 ({record['samples'][0][5]})."
    assert one_of_them in run.said

    replayed = nursery.start("--replay", bundle)  # one process, without what was done to the two
    assert replayed.wait() == 0, replayed.said
    assert re.search(r"^loss +nan; in the run nan$", replayed.said, re.MULTILINE)
    assert named in replayed.said
    assert one_of_them in replayed.said


@pytest.mark.slow
def test_a_disk_without_room_hides_no_divergence(
    here: Callable[..., Run], poison: Callable[[int, Poison], None], corpus: Path, tmp_path: Path
) -> None:
    poison(1, with_weight("q", (1, 0, 0, 0), np.inf))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "nonfinite").write_text("in the way")
    run = here(tmp_path / "run", *FLAGS, "--data", corpus)
    assert run.code == 3
    assert (
        f"warning: The replay bundle {run.path / 'nonfinite' / '1'} could not be written: Not a directory."
        in run.said
    )
    assert "training has diverged. Lower --lr" in run.said
    assert "The first non-finite activations are in layer 1 attention: " in run.said
    assert "--replay" not in run.said


def test_replay_of_what_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--replay", str(tmp_path / "nowhere")]) == 2
    assert "is not a replay bundle" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_loss_that_stands_out_is_an_event(
    here: Callable[..., Run], poison: Callable[[int, Poison], None], corpus: Path, tmp_path: Path
) -> None:
    poison(
        24,
        lambda state: state._replace(
            params={**state.params, "output": state.params["output"] * -5}
        ),
    )
    flags = [*FLAGS, "--data", corpus, "--keep_last", "20"]
    run = here(tmp_path / "run", *flags)
    assert run.code == 0, run.said
    (spike,) = [line for line in run.lines if line.get("event") == "loss_spike"]
    assert spike["step"] == 24
    assert spike["loss"] > 1.1 * spike["usual"]
    again = here(tmp_path / "run", *flags, "--resume", "12")
    assert next(line for line in again.lines if line.get("event") == "loss_spike") | {
        "time_s": 0
    } == spike | {"time_s": 0}
