import itertools
import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock, Mock, call

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from consyn_jax.distributed import hardware
from consyn_jax.errors import Diverged, Interrupted, UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.arithmetic import train_flops_per_token
from consyn_jax.model.attention import AttentionChoice
from consyn_jax.model.parameters import layout
from consyn_jax.model_config import ModelConfig
from consyn_jax.optimizer_config import OptimizerOptions
from consyn_jax.resolve import preset_architecture, resolve
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training import ConsynTrainer, header
from consyn_jax.training import trainer as trainer_module
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.checkpointing.run_state import Progress
from consyn_jax.training.dataset import get_dataset
from consyn_jax.training.diagnostics.lr_find import Suggestion, rising_rates
from consyn_jax.training.inputs.initial_model import DeferredModel, checked
from consyn_jax.training.logging.metrics import MetricsLog, read_metrics
from consyn_jax.training.optim.schedules import build_schedule
from consyn_jax.training.program import Built
from consyn_jax.training.run import beginning
from consyn_jax.training.run.keywords import resolve_keywords
from consyn_jax.training.run.recording import Lengths
from consyn_jax.training.runtime import signals
from consyn_jax.training.step import TrainState

TOKENIZER = BPETokenizer.bytes()
CONFIG = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    context=64,
    bos_token_id=TOKENIZER.bos_token_id,
    eos_token_id=TOKENIZER.eos_token_id,
    pad_token_id=TOKENIZER.pad_token_id,
)
DOCUMENTS = [
    TOKENIZER.encode(f"{n} and {n} are {2 * n}, and {n} times {n} is {n * n}. ") for n in range(40)
]
STEPS = 12


def model() -> ConsynLMHeadModel:
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray((leaf.ndim < 3) + 0.1 * rng.normal(size=leaf.shape), jnp.float32),
        layout(CONFIG).shapes,
    )
    return ConsynLMHeadModel.from_parameters(CONFIG, params)


def trainer(output: Path, **changes: Any) -> ConsynTrainer:
    """12 steps of 8 x 32 tokens over 42 sequences: an epoch ends inside step 6, and one inside step
    11."""
    settings = {
        "model": model(),
        "train_dataloader": DOCUMENTS[:32],
        "eval_dataloader": DOCUMENTS[32:],
        "output_dir": output,
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "tokenizer": TOKENIZER,
        "max_tokens": 32,
        "mesh": "data=2,fsdp=2,tensor=2",
        "warmup_steps": 2,
        "eval_steps": 4,
        "save_steps": 3,
        "logging_steps": 1,
        "logging_backend": "none",
        "quiet": True,
    }
    return ConsynTrainer(**{**settings, **changes})


@pytest.mark.parametrize(
    "needs",
    [{"early_stopping_patience": 3}, {"load_best_model_at_end": True}, {"scheduler": "plateau"}],
)
def test_what_needs_evaluations_is_refused_without_data_for_them(
    needs: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(
        UserError,
        match=rf"{next(iter(needs))}.* needs evaluations, and there is no evaluation data",
    ):
        trainer(tmp_path / "out", eval_dataloader=None, **needs).train()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (("some/model", None), r"Pass ConsynLMHeadModel\.from_pretrained\('some/model'\)"),
        ((object(), None), r"model is a object, .*Pass ConsynLMHeadModel\.from_pretrained"),
        (
            (DeferredModel(CONFIG, lambda mesh, convert: {}), "some/model"),
            r"tokenizer is a str, .*pass BPETokenizer\.from_file",
        ),
    ],
)
def test_models_and_tokenizers_of_other_kinds_are_answered_with_ours(
    given: tuple[Any, Any], remedy: str
) -> None:
    with pytest.raises(UserError, match=remedy):
        checked(*given)


class Finished(NamedTuple):
    trainer: ConsynTrainer
    result: dict[str, float]
    given: ConsynLMHeadModel
    compiled: dict[int, int]  # programs compiled by the time that a step's first line was written

    @property
    def path(self) -> Path:
        return Path(self.trainer.run.saving.output)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """A run that nobody stopped."""
    count, compiled = 0, {}

    def note(event: str, duration: float, **details: Any) -> None:
        nonlocal count
        count += "backend_compile" in event

    original = MetricsLog.write

    def write(self: MetricsLog, step: int, *rest: Any, **more: Any) -> Any:
        compiled.setdefault(step, count)
        return original(self, step, *rest, **more)

    jax.monitoring.register_event_duration_secs_listener(note)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "write", write)
        given = model()
        run = trainer(tmp_path_factory.mktemp("finished") / "run", model=given)
        result = run.train()
    jax.monitoring.unregister_event_duration_listener(note)
    return Finished(run, result, given, compiled)


def curve(path: Path) -> list[dict[str, Any]]:
    """What the mathematics gave: every line of the log without events and times."""
    lines = [line for line in read_metrics(path / "metrics.jsonl") if "event" not in line]
    return [
        {
            k: v
            for k, v in line.items()
            if k != "time_s" and not k.startswith(("throughput/", "memory/", "time/"))
        }
        for line in lines
    ]


def test_a_run_learns_and_tells_all_of_it(finished: Finished) -> None:
    lines = curve(finished.path)
    training = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    assert training[-1]["train/loss"] < 0.8 * training[0]["train/loss"]
    rate = build_schedule(
        OptimizerOptions(scheduler="cosine", lr=3e-3, warmup_steps=2, min_lr_ratio=0.1), STEPS
    )
    assert [line["train/learning_rate"] for line in training] == pytest.approx(
        [float(rate(s)) for s in range(STEPS)]
    )
    assert [line["step"] for line in lines if "eval/loss" in line] == [4, 8, 12]
    assert finished.result["train/loss"] == training[-1]["train/loss"]
    assert (finished.result["step"], finished.result["tokens"]) == (STEPS, training[-1]["tokens"])
    events = [
        (line["event"], line["step"])
        for line in read_metrics(finished.path / "metrics.jsonl")
        if "event" in line
    ]
    assert {("start", 0), ("save", 3), ("save", 12), ("best", 4), ("finish", 12)} <= set(events)
    assert {path.name for path in finished.path.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "tokenizer",
        "checkpoints",
        "best",
        "final",
        "report.html",
        "samples.jsonl",
        "loss.png",
    }
    page = (finished.path / "report.html").read_text()
    assert "<b>Complete</b>: step 12 of 12 (100%)" in page
    lines_of = (finished.path / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines_of]
    assert {4, 12} <= {sample["step"] for sample in samples} <= {4, 8, 12}
    times = [line for line in read_metrics(finished.path / "metrics.jsonl") if "train/loss" in line]
    for line in times:
        spent = sum(value for name, value in line.items() if name.startswith("time/"))
        assert spent == pytest.approx(line["time_s"], rel=0.02, abs=0.2)
    assert sorted(int(path.name) for path in (finished.path / "checkpoints").iterdir()) == [
        6,
        9,
        12,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["best", "final"])
def test_others_load_the_model(name: str, finished: Finished) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(finished.path / name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(finished.path / name)
    ids = tokenizer("12 and 12 are 24", return_tensors="np")["input_ids"]
    assert ids[0].tolist()[-16:] == TOKENIZER.encode("12 and 12 are 24")
    assert (tokenizer.eos_token_id, theirs.generation_config.eos_token_id) == (
        TOKENIZER.eos_token_id,
        TOKENIZER.eos_token_id,
    )
    ours = ConsynLMHeadModel.from_pretrained(finished.path / name)(jnp.asarray(ids, jnp.int32))
    with torch.no_grad():
        np.testing.assert_allclose(ours, theirs(torch.tensor(ids)).logits, atol=1e-4)


def test_the_model_that_was_passed_is_the_trained_one(finished: Finished) -> None:
    saved = ConsynLMHeadModel.from_pretrained(finished.path / "final")
    assert finished.trainer.model is finished.given
    assert same_weights(finished.given, saved)
    assert not same_weights(finished.given, model())
    metrics = finished.trainer.evaluate()
    logged = [line for line in curve(finished.path) if "eval/loss" in line][-1]
    assert metrics == pytest.approx(
        {name: value for name, value in logged.items() if name.startswith("eval/")}, rel=1e-6
    )
    assert metrics["eval/tokens"] == sum(len(document) + 1 for document in DOCUMENTS[32:])


def weights(params: dict[str, Any]) -> list[np.ndarray]:
    """All parameters without the padding of the vocabulary, which no file has."""
    padded, vocab_size = CONFIG.padded_vocab_size, CONFIG.vocab_size
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    return [leaf[:vocab_size] if leaf.shape[0] == padded else leaf for leaf in leaves]


def same_weights(one: ConsynLMHeadModel, other: ConsynLMHeadModel) -> bool:
    pairs = zip(weights(one.parameters), weights(other.parameters), strict=True)
    return all(bool((a == b).all()) for a, b in pairs)


@pytest.mark.slow
def test_a_model_of_another_dtype_and_place_keeps_them(tmp_path: Path) -> None:
    """It is trained in float32, and gets the rounded weights."""
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    given = ConsynLMHeadModel.from_parameters(
        CONFIG,
        jax.tree.map(
            lambda p: jax.device_put(jnp.asarray(p, jnp.bfloat16), place), model().parameters
        ),
    )
    trainer(tmp_path / "run", model=given, max_steps=2, eval_dataloader=None).train()
    saved = ConsynLMHeadModel.from_pretrained(tmp_path / "run" / "final").parameters
    assert {(p.dtype, p.sharding) for p in jax.tree.leaves(given.parameters)} == {
        (jnp.dtype(jnp.bfloat16), place)
    }
    for ours, theirs in zip(weights(given.parameters), weights(saved), strict=True):
        np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["signal", "divergence", "deleted", "early stop"])
def test_the_model_that_was_passed_has_the_newest_weights_however_a_run_ends(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, path, original = model(), tmp_path / "run", MetricsLog.write

    def write(self: MetricsLog, step: int, *rest: Any, **more: Any) -> Any:
        if step == 5 and ending == "signal":
            signal.raise_signal(signal.SIGTERM)
        if step == 5 and ending == "deleted":
            shutil.rmtree(path, ignore_errors=True)
        return original(self, step, *rest, **more)

    monkeypatch.setattr(MetricsLog, "write", write)
    changes: dict[str, Any] = {
        "signal": {},
        "deleted": {},
        "divergence": {"learning_rate": 1e30, "warmup_steps": 5},
        "early stop": {
            "learning_rate": 1e-30,
            "eval_steps": 1,
            "early_stopping_patience": 2,
            "load_best_model_at_end": True,
        },
    }[ending]
    run = trainer(path, model=given, **changes)
    errors = {"signal": Interrupted, "divergence": Diverged, "deleted": UserError}
    with pytest.raises(errors[ending]) if ending in errors else nullcontext():
        run.train()
    assert run.model is given
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(given.parameters))
    assert same_weights(given, model()) == (ending == "early stop")
    if ending == "signal":
        state, _ = restored(path, run)
        assert same_weights(given, ConsynLMHeadModel.from_parameters(CONFIG, state.params))
        run.train()  # it goes on
        saved = ConsynLMHeadModel.from_pretrained(path / "final")
        assert same_weights(given, saved)
    if ending == "deleted":
        assert not path.exists(), sorted(path.rglob("*"))


def restored(path: Path, run: ConsynTrainer) -> tuple[TrainState, dict[str, Any]]:
    """The newest checkpoint of a run."""
    checkpoints = Checkpoints(path / "checkpoints")
    with closing(checkpoints):
        return checkpoints.restore(checkpoints.steps()[-1], run.build().program.state_like)


def test_a_call_of_train_with_settings_is_answered(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run")
    with pytest.raises(UserError, match="train\\(\\) with the same output_dir=DIR continues"):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="max_steps is a setting of ConsynTrainer, not of train"):
        run.train(max_steps=3)


def test_nothing_is_compiled_once_the_run_runs(finished: Finished) -> None:
    """The first checkpoint, at step 3, the first model and sample, at step 4, and a sample of
    another length have small programs of their own."""
    assert finished.compiled[1] > 0
    assert finished.compiled[2] == finished.compiled[3]
    assert finished.compiled[5] == finished.compiled[8]
    assert finished.compiled[9] == finished.compiled[STEPS]


class Reported:
    """A number of a step, which tells when it is read."""

    def __init__(self, value: jax.Array, read: Callable[[], None]) -> None:
        self.value, self.read = value, read

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        self.read()
        return np.asarray(self.value)


@pytest.mark.slow
def test_metrics_are_read_while_the_next_step_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[tuple[str, int]] = []

    class Watched:
        def __init__(self, compiled: Any) -> None:
            self.compiled, self.steps = compiled, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.compiled, name)

        def __call__(self, *arguments: Any) -> Any:
            state, metrics = self.compiled(*arguments)
            self.steps += 1
            happened.append(("dispatched", self.steps))
            read = partial(happened.append, ("read", self.steps))
            return state, metrics | {"loss": Reported(metrics["loss"], read)}

    original = ConsynTrainer.compile_train_step
    monkeypatch.setattr(
        ConsynTrainer, "compile_train_step", lambda *a, **k: Watched(original(*a, **k))
    )
    trainer(tmp_path / "run", eval_dataloader=None, max_steps=4, save_steps=100).train()
    order = [("dispatched", 1)]
    order += [event for step in (2, 3, 4) for event in (("dispatched", step), ("read", step - 1))]
    assert happened == [*order, ("read", 4)]


def test_utilisation_is_of_what_is_computed_and_not_of_what_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "GPUS", (hardware.Gpu("cpu", 1e12),))
    rng = np.random.default_rng(0)
    batches = [
        {"input_ids": rng.integers(0, 250, (8, 33)), "loss_mask": rng.random((8, 33)) < 0.1}
    ] * 3
    trainer(
        tmp_path, train_dataloader=batches, eval_dataloader=None, tokenizer=None, max_steps=3
    ).train()
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in line]
    assert 0 < lines[-1]["tokens"] < 0.2 * 3 * 8 * 32
    flops = train_flops_per_token(CONFIG, 32) * 8 * 32 / jax.device_count()
    assert [line["throughput/mfu"] for line in lines] == pytest.approx(
        [flops / line["throughput/step_time_s"] / 1e12 for line in lines]
    )


TRANSFERS = re.compile(
    r" (infeed|outfeed|send|send-done|recv|recv-done)\(|custom_call_target=\"[^\"]*(?:callback|host)[^\"]*\"",
    re.IGNORECASE,
)


def test_a_step_asks_nothing_of_the_host(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run")
    assert not TRANSFERS.findall(run.compile_train_step(run.run).as_text())
    asking = (
        jax.jit(lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), jnp.float32), x))
        .lower(jnp.float32(1))
        .compile()
    )
    assert TRANSFERS.findall(asking.as_text())


def stop_when_logged(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM once the line of `step` is written."""
    original = MetricsLog.write

    def write(self: MetricsLog, at: int, tokens: int, values: Any = None, **more: Any) -> Any:
        line = original(self, at, tokens, values, **more)
        if at == step and values and "train/loss" in values:
            signal.raise_signal(signal.SIGTERM)
        return line

    monkeypatch.setattr(MetricsLog, "write", write)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_stopped_run_goes_on_as_if_nothing_had_been(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped inside the second epoch; what remains goes across its end."""
    with monkeypatch.context() as patch:
        stop_when_logged(patch, 6)
        with pytest.raises(Interrupted, match=r"SIGTERM at step 6: the state is saved"):
            trainer(tmp_path, tokenizer=None).train()
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert (last["event"], last["step"], last["signal"]) == ("signal", 6, "SIGTERM")
    assert "<b>Stopped by SIGTERM</b>: step 6 of 12" in (tmp_path / "report.html").read_text()
    ticks = itertools.count(
        0, 30
    )  # seconds: between two steps, as the time is looked at once in each
    monkeypatch.setattr(signals, "monotonic", lambda: next(ticks))
    result = trainer(tmp_path, tokenizer=None, save_minutes=1).train()
    assert curve(tmp_path) == curve(finished.path)
    assert [
        line["step"]
        for line in read_metrics(tmp_path / "metrics.jsonl")
        if line.get("event") == "save"
    ] == [3, 6, 8, 9, 11, 12]
    for name in ("final", "best"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == (
            finished.path / name / "model.safetensors"
        ).read_bytes()
    assert {k: result[k] for k in ("train/loss", "eval/loss", "tokens")} == {
        k: finished.result[k] for k in ("train/loss", "eval/loss", "tokens")
    }
    events = [line["event"] for line in read_metrics(tmp_path / "metrics.jsonl") if "event" in line]
    assert (events.count("start"), events.count("resume")) == (1, 1)


def test_a_complete_run_is_not_run_again(finished: Finished) -> None:
    before = (finished.path / "final" / "model.safetensors").stat().st_mtime_ns
    assert trainer(finished.path).train()["step"] == STEPS
    assert (finished.path / "final" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_best_model_is_none_of_steps_that_were_taken_back(
    finished: Finished, tmp_path: Path
) -> None:
    """The run was at its best at step 12. It goes on from step 6 in another way, on which it only
    gets worse."""
    path = Path(shutil.copytree(finished.path, tmp_path / "run"))
    trainer(
        path, resume="6", overwrite_schedule=True, learning_rate=10.0, load_best_model_at_end=True
    ).train()
    losses = {line["step"]: line["eval/loss"] for line in curve(path) if "eval/loss" in line}
    assert losses[4] < min(losses[8], losses[12])
    assert read_metrics(path / "metrics.jsonl")[-1]["best_step"] == min(
        (8, 12), key=lambda step: losses[step]
    )
    best, final, before = (
        load_file(run / "model.safetensors")
        for run in (path / "best", path / "final", finished.path / "best")
    )
    for name in best:
        np.testing.assert_array_equal(best[name], final[name])
    assert any((best[name] != before[name]).any() for name in best)


def test_another_run_is_kept_out_of_the_directory(finished: Finished) -> None:
    with pytest.raises(
        UserError, match=r"holds a run with another schedule: --lr was 0\.003 and is 0\.1;"
    ):
        trainer(finished.path, learning_rate=0.1).train()
    with pytest.raises(UserError, match="the training data changed"):
        trainer(finished.path, train_dataloader=DOCUMENTS[1:33]).train()
    with pytest.raises(UserError, match="already holds a run"):
        trainer(finished.path, resume="never").train()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_divergence_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"training has diverged\. Lower --lr"):
        trainer(
            tmp_path, learning_rate=1e30, warmup_steps=0, eval_dataloader=None, mesh="auto"
        ).train()
    (event,) = [
        line
        for line in read_metrics(tmp_path / "metrics.jsonl")
        if line.get("event") == "nonfinite"
    ]
    assert event["step"] <= 3
    assert not (tmp_path / "final").exists()


@pytest.mark.slow
def test_data_that_ends_ends_the_run_in_order(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 250, (2, 8, 33))
    batches = ({"input_ids": batch} for batch in ids)
    run = trainer(
        tmp_path, train_dataloader=batches, eval_dataloader=None, tokenizer=None, mesh="auto"
    )
    assert run.train()["step"] == 2
    assert [
        line["step"]
        for line in read_metrics(tmp_path / "metrics.jsonl")
        if line.get("event") == "end_of_data"
    ] == [2]
    assert json.loads((tmp_path / "final" / "config.json").read_text())["hidden_size"] == 32


def test_a_decay_only_reads_the_run_that_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That run is writing a checkpoint; one is damaged, and of one there are remains."""
    state = TrainState(jnp.int32(2), {"w": jnp.arange(5.0)}, {}, jnp.int32(0))
    of_run = Checkpoints(tmp_path)
    for step in (2, 3):
        of_run.save(step, state, asdict(Progress(step=step, tokens=50 * step, left_out=1)))
        of_run.wait()
    (tmp_path / "3" / "run.json").write_text("{}")
    may_end = threading.Event()
    finish = Checkpoints._finish
    monkeypatch.setattr(Checkpoints, "_finish", lambda *about: (may_end.wait(60), finish(*about)))
    of_run.save(4, state, {})
    while not list(tmp_path.glob("4.*/state/*/d")):  # its arrays are written
        time.sleep(0.01)
    (tmp_path / "1.orbax-checkpoint-tmp-7").mkdir()

    def there() -> dict[str, tuple[int, int]]:
        return {
            str(path): (path.stat().st_mtime_ns, path.stat().st_size)
            for path in [tmp_path, *tmp_path.rglob("*")]
            if "4." not in str(path)
        }

    before, like = (
        there(),
        jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
        ),
    )
    restored, progress = beginning.branch(tmp_path, 2, like, Progress())
    np.testing.assert_array_equal(restored.params["w"], state.params["w"])
    assert (progress.step, progress.tokens, progress.left_out) == (2, 100, 1)
    with pytest.raises(UserError, match=r"3 is damaged: run\.json is not what was written\."):
        beginning.branch(tmp_path, 3, like, Progress())
    assert there() == before
    may_end.set()
    of_run.wait()
    assert of_run.steps() == [2, 3, 4]
    of_run.close()


# ----------------------------------------------------------------------------------- before it runs


def test_a_run_is_what_its_data_and_tokenizer_are(tmp_path: Path) -> None:
    """config.yaml has these values, and a resumed run must have the same."""
    run = trainer(tmp_path / "run")
    derived = run.derived()
    assert run.eval_source is not None
    assert derived["data"] == run.train_source.fingerprint != run.eval_source.fingerprint
    assert derived["validation"] == run.eval_source.fingerprint
    assert derived["tokenizer"] == TOKENIZER.sha256
    assert (derived["sequences_per_step"], derived["total_steps"]) == (8, STEPS)
    assert derived["weights"] == run._weights is not None
    alone = trainer(tmp_path / "run", eval_dataloader=None, tokenizer=None).derived()
    assert (alone["validation"], alone["tokenizer"]) == (None, None)
    decay = trainer(tmp_path / "run", scheduler="wsd", decay_from=3)
    assert "weights" not in decay.derived(), "it begins with those of a checkpoint"


def test_the_time_of_a_run_counts_from_the_start_of_its_command(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run")
    before = time.perf_counter()
    assert before <= run.run_inputs().began <= time.perf_counter()
    run.began = 2.5
    inputs = run.run_inputs()
    assert (inputs.began, inputs.is_trial, inputs.exports_model) == (2.5, False, True)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """What a trainer calls to look ahead, none of which does anything."""
    parts = Mock()
    for name in ("Console", "show_rates", "check_output", "make_ready", "measure_curve"):
        monkeypatch.setattr(trainer_module, name, getattr(parts, name))
    parts.console = MagicMock()
    parts.Console.return_value.__enter__ = lambda _: parts.console
    parts.Console.return_value.__exit__ = Mock(return_value=None)
    for name in ("build", "_header", "run_inputs", "_base", "parameters"):
        monkeypatch.setattr(ConsynTrainer, name, getattr(parts, name))
    return parts


def test_a_look_ahead_shows_warnings_and_compares_the_run_with_the_directory(
    parts: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "warnings", lambda *about: [str(about[2].total_steps)])
    run = trainer(tmp_path / "run")
    run.describe()
    parts.Console.assert_called_once_with(quiet=False)
    parts.check_output.assert_called_once_with(run.run, run.derived())
    parts.console.header.assert_called_once_with(parts._header.return_value)
    parts.console.warn.assert_called_once_with(str(STEPS))
    ((schedule, *about),) = [call.args for call in parts.show_rates.call_args_list]
    assert about == [STEPS, tmp_path / "run"]
    assert float(schedule(2)) == pytest.approx(3e-3)


@pytest.mark.parametrize(
    ("quiet", "writes", "is_quiet"),
    [(False, True, False), (True, True, True), (False, False, True)],
)
def test_a_range_test_is_told_the_settings_of_the_run(
    quiet: bool,
    writes: bool,
    is_quiet: bool,
    parts: Mock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of pairs, it reads those for training only."""
    written = Mock()
    for name in ("write_results", "draw_curve", "show"):
        monkeypatch.setattr(trainer_module, name, getattr(written, name))
    suggestion, parts._base.return_value = Mock(spec=Suggestion), {}
    monkeypatch.setattr(trainer_module, "suggest", lambda curve: suggestion)
    monkeypatch.setattr(trainer_module.jax, "process_index", lambda: 0 if writes else 1)
    run = trainer(tmp_path / "run", quiet=quiet, logging_steps=7, gradient_accumulation_steps=2)
    compiled, fitted = Mock(), replace(run.run, budget=replace(run.run.budget, batch_size=4))
    monkeypatch.setattr(trainer_module, "compile_to_fit", lambda *_: (fitted, compiled))
    assert run.find_rate() is suggestion
    parts.Console.assert_called_once_with(quiet=is_quiet, logging_steps=7)
    program = parts.build.return_value.program
    state, base = program.initial_state.return_value, parts._base.return_value
    told = parts.run_inputs.return_value, fitted, tmp_path / "run", state.params, base
    parts.make_ready.assert_called_once_with(*told, splits=["train"])
    step, *about = parts.measure_curve.call_args.args
    rates = rising_rates("adamw")
    about[4] = list(about[4])
    parts.console.start.assert_called_once_with(len(rates))
    shape = 2, 4, 32
    assert about == [state, run.train_source, shape, program.mesh, list(rates), parts.console.step]
    curve = parts.measure_curve.return_value
    expected = [call.write_results(tmp_path / "run", curve, suggestion)]
    expected += [call.draw_curve(curve, suggestion)]
    assert written.mock_calls[:2] == (expected if writes else [])
    parts._base.return_value |= {"base": 1}
    step("state", {"labels": 2})
    compiled.assert_called_once_with("state", {"labels": 2, "base": 1})


@pytest.mark.parametrize(
    ("flags", "epoch", "warns"),
    [
        ({"lr": 1e-4}, None, False),
        ({"lr": 1.1e-4}, None, True),
        ({"lr": 1e-3, "lora_rank": 1}, None, False),
        ({"lr": 1.1e-3, "lora_rank": 1}, None, True),
        ({"batch_size": 8}, 8, False),
        ({"batch_size": 9}, 8, True),
        ({"batch_size": 9}, None, False),
        ({"batch_size": 9, "total_tokens": 100}, 8, False),
    ],
    ids=str,
)
def test_settings_that_are_rarely_intended_are_warned_of(
    flags: dict[str, Any], epoch: int | None, warns: bool
) -> None:
    """The rates of an adapter may be ten times as high."""
    run, _ = resolve({"checkpoint": "there", "lr": 2e-5} | flags)
    program = Mock(config=CONFIG)
    built = Built(program, AttentionChoice("splash", ""), Mock(), Mock())
    assert bool(list(header.warnings(run, built, Lengths(10, 1, 8, epoch, None)))) == warns


def test_the_guides_call(tmp_path: Path) -> None:
    dataset = get_dataset(data_path="sample", tokenizer=TOKENIZER, block_size=32)
    run = ConsynTrainer(
        model=model(),
        train_dataloader=dataset,
        output_dir=str(tmp_path),
        num_epochs=3,
        learning_rate=5e-5,
    )
    assert run.total_steps == -(-3 * len(dataset) // 8)
    assert (run.run.data.max_tokens, run.run.optimizer.lr, run.tokenizer.sha256) == (
        32,
        5e-5,
        TOKENIZER.sha256,
    )


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"max_steps": None}, 16),  # 3 epochs of 42 sequences
        ({"max_steps": None, "num_epochs": 0.5}, 3),
        ({"max_steps": 20, "num_epochs": 3}, 16),
        ({"max_steps": 20, "epochs": 3}, 16),
        ({"max_steps": 20}, 20),
        ({"max_steps": 100}, 100),
        ({"max_steps": None, "total_tokens": 256 * 50}, 50),
        ({"max_steps": 7}, 7),
        ({"max_steps": 7, "total_tokens": 1000}, 4),
        ({"max_steps": None, "gradient_accumulation_steps": 2}, 8),
    ],
)
def test_the_smallest_budget_wins(budget: dict[str, Any], steps: int, tmp_path: Path) -> None:
    assert trainer(tmp_path, **budget).total_steps == steps


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rates": 1.0}, r"learning_rates is not a setting; did you mean learning_rate\?"),
        ({"learning_rate": 1e-3, "lr": 1e-4}, r"^learning_rate and lr are the same setting\. Give"),
        ({"num_epochs": 2, "epochs": 1}, r"^num_epochs and epochs are the same setting\. Give"),
        ({"num_train_epochs": 1}, r"num_train_epochs is not a setting; write epochs=1\."),
        ({"optimizer": "sgd", "learning_rate": None}, "--optimizer sgd needs a much higher"),
        ({"max_tokens": 65}, "--max_tokens 65 is above the model's context of 64"),
        (
            {
                "train_dataloader": iter([{"input_ids": np.ones((8, 33), int)}]),
                "max_steps": None,
            },
            "give max_steps or total_tokens",
        ),
        ({"train_dataloader": iter([])}, "train_dataloader is empty"),
        ({"train_dataloader": None}, r"has no data\. Pass it as train_dataloader="),
        ({"eval_dataloader": []}, "eval_dataloader is empty"),
        ({"batch_size": 6}, r"--batch_size 6 does not divide over 4 devices.*Use 4 or 8\."),
        ({"mesh": "tensor=8"}, "--mesh tensor=8 does not divide --num_heads 4"),
        (
            {"tokenizer": BPETokenizer()},
            r"The tokenizer has \d+ tokens, more than the model's vocabulary of 259",
        ),
        ({"resume": "3"}, "--resume 3"),
        (
            {"profile_steps": "5:3"},
            "--profile_steps must be the first and the last step to trace, such as 10:12, not '5:3'",
        ),
        (
            {"profile_steps": "13:14"},
            "--profile_steps 13:14 begins after the end of the run, which has 12 steps",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        trainer(tmp_path / "run", **changes).train()
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_default_rate_is_adapted_to_the_optimizer_and_a_given_one_is_not(tmp_path: Path) -> None:
    lion = trainer(tmp_path, optimizer="lion", learning_rate=None)
    assert lion.run.optimizer.lr == pytest.approx(1e-5)  # a fifth of adamw's 5e-5
    assert trainer(tmp_path, optimizer="lion", learning_rate=5e-5).run.optimizer.lr == 5e-5
    assert trainer(tmp_path, learning_rate=None).run.optimizer.lr == 5e-5


def test_the_configuration_of_a_run_from_python_has_the_models_own_dimensions(
    tmp_path: Path,
) -> None:
    run = trainer(tmp_path)
    assert (run.run.model.hidden_dim, run.run.model.num_kv_heads) == (32, 2)
    assert run.origins["hidden_dim"] == run.origins["lr_multipliers"] == "default"
    verse = preset_architecture("verse", vocab_size=300)
    resolved = resolve_keywords(verse, ([[1]], None), {"max_steps": 1})[0]
    assert (resolved.model.model, resolved.optimizer.beta2) == ("verse", 0.95)


def test_there_is_no_evaluation_without_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pass eval_dataloader"):
        trainer(tmp_path, eval_dataloader=None).evaluate()


def test_a_loaded_model_keeps_its_own_tokenizer(tmp_path: Path) -> None:
    """It never meets the ids of another one unasked, and brings its own where the data has none."""
    model().save_pretrained(tmp_path / "model", TOKENIZER)
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    loaded = ConsynLMHeadModel.from_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("some words of text. " * 100)
    other = BPETokenizer.train_from_iterator(["some words"], 259)
    data = get_dataset(tmp_path / "text.txt", other, block_size=32)
    with pytest.raises(UserError, match=r"model in .* different tokenizers\..*tokenizer=model"):
        trainer(tmp_path / "run", model=loaded, train_dataloader=data, tokenizer=None)
    asked = trainer(tmp_path / "run", model=loaded, train_dataloader=data, tokenizer=other)
    assert asked.tokenizer is other
    brought = trainer(tmp_path / "run", model=loaded, tokenizer=None).tokenizer
    assert brought is not None
    brought.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == "{{ messages }}"
    own = get_dataset(tmp_path / "text.txt", loaded.tokenizer, block_size=32)
    assert trainer(tmp_path / "run", model=loaded, train_dataloader=own, tokenizer=None)
