"""Runs with mixtures, streaming, packing and fine-tuning rows: their data, counts and reports, and
that a stop changes nothing."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from consyn_jax.data import streaming
from consyn_jax.data.loader import Shuffled
from consyn_jax.data.mixture import Mixture
from consyn_jax.data.preparation import cached_store
from consyn_jax.data.preparation.cached_store import Prepared
from consyn_jax.data.store.shards import MemoryShard
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.dataset import get_dataset
from consyn_jax.training.loop import Training

from .conftest import MODEL, Run

STEPS, BATCH, LENGTH = 20, 8, 32
FLAGS = [
    *MODEL,
    "--max_steps",
    STEPS,
    "--max_tokens",
    LENGTH,
    "--batch_size",
    BATCH,
    "--validation_fraction",
    "0.2",
]
FLAGS += [
    "--logging_steps",
    "1",
    "--eval_steps",
    "6",
    "--save_steps",
    "5",
    "--logging_backend",
    "none",
]
TOKENIZER = BPETokenizer.bytes()


def rows(path: Path, word: str, count: int) -> Path:
    path.write_text(
        "".join(
            json.dumps({"text": f"{word.title()} {i} says {'so ' * (i % 6 + 1)}and ends."}) + "\n"
            for i in range(count)
        )
    )
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("corpora")
    return {
        word: rows(directory / f"{word}.jsonl", word, count)
        for word, count in (("few", 20), ("many", 100))
    }


@contextmanager
def stop_at(step: int) -> Iterator[None]:
    """Send SIGTERM when a step has been recorded."""
    record = Training._record

    def and_signal(self: Training, *args: Any) -> None:
        record(self, *args)
        if self.progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_record", and_signal)
        yield


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k not in ("time_s", "event", "tokens")}
        for line in run.lines
        if line.get("event") == kind
    ]


def ends(order: Any, name: str | None = None) -> list[dict[str, Any]]:
    """The events `end_of_data` of a run over an order, computed step by step."""
    found = []
    for step in range(1, STEPS + 1):
        before, after = order.passes((step - 1) * BATCH), order.passes(step * BATCH)
        found += [
            {"step": step, "epoch": e, **({"source": s} if s else {})}
            for s in after
            for e in range(before[s] + 1, after[s] + 1)
        ]
    return found


# ----------------------------------------------------------------------------------------- mixtures


def mixed(files: dict[str, Path]) -> list[object]:
    return [*FLAGS, "--data", *files.values(), "--data_weights", "1", "3"]


@pytest.fixture
def order(files: dict[str, Path]) -> Mixture:
    sets = {
        str(path): get_dataset(path, TOKENIZER, LENGTH, validation_fraction=0.2).packed
        for path in files.values()
    }
    return Mixture(sets, [1, 3], seed=42)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_mixture_counts_its_sequences_and_reports_the_end_of_a_source(
    files: dict[str, Path], order: Mixture, here: Callable[..., Run], tmp_path: Path
) -> None:
    run = here(tmp_path / "run", *mixed(files))
    assert run.code == 0, run.said
    assert events(run, "save") == [
        {"step": s, "sources": order.counts(s * BATCH)} for s in (5, 10, 15, 20)
    ]
    (finish,) = events(run, "finish")
    counts = order.counts(STEPS * BATCH)
    assert finish["sources"] == counts
    assert sum(counts.values()) == STEPS * BATCH
    assert events(run, "end_of_data") == ends(order)
    assert {event["source"] for event in ends(order)} == set(map(str, files.values())), (
        "both sources ended at least once"
    )
    few, many = map(str, files.values())
    epochs = {
        name: f"{counts[name] / len(order.datasets[name]):.3g} epochs" for name in (few, many)
    }
    taken = [
        f"{name} {counts[name]} ({counts[name] / 160:.1%}, {epochs[name]})" for name in (few, many)
    ]
    assert ", ".join(taken) in run.said
    assert f"End of {few}: epoch 1 is over at step" in run.said
    held_out = sum(
        get_dataset(path, TOKENIZER, LENGTH, split="validation", validation_fraction=0.2).num_tokens
        for path in files.values()
    )
    assert {line["eval/tokens"] for line in run.numbers if "eval/loss" in line} == {held_out}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_stopped_mixture_resumes_exactly(
    files: dict[str, Path], order: Mixture, here: Callable[..., Run], tmp_path: Path
) -> None:
    whole = here(tmp_path / "whole", *mixed(files))
    for number, step in enumerate(sorted({end["step"] for end in ends(order)})[:2]):
        with stop_at(step):
            stopped = here(tmp_path / f"run{number}", *mixed(files))
        assert stopped.code == 75, stopped.said
        (sign,) = events(stopped, "signal")
        assert sign["sources"] == order.counts(sign["step"] * BATCH)
        resumed = here(stopped.path, *mixed(files))
        assert resumed.code == 0, resumed.said
        assert (resumed.numbers, resumed.weights) == (whole.numbers, whole.weights)
        assert sorted(map(str, events(resumed, "end_of_data"))) == sorted(
            map(str, events(whole, "end_of_data"))
        ), "no event is lost or repeated"
        assert events(resumed, "finish") == events(whole, "finish")
    back = here(tmp_path / "run0", *mixed(files), "--resume", "10")
    assert (back.numbers, events(back, "end_of_data")) == (
        whole.numbers,
        events(whole, "end_of_data"),
    )
    other = here(tmp_path / "whole", *mixed(files)[:-2], "2", "3")
    assert other.code == 2
    assert "--data_weights was [1.0, 3.0] and is " in other.said


@pytest.mark.slow
def test_invalid_mixtures_are_refused(
    files: dict[str, Path], here: Callable[..., Run], tmp_path: Path
) -> None:
    few, many = files.values()
    BPETokenizer.train_from_iterator(["other words"], 262).save(tmp_path / "other")
    options = CorpusOptions(
        data=(str(many),), tokenizer=str(tmp_path / "other"), validation_fraction=0.2
    )
    cached_store.prepare(options, output=tmp_path / "store")
    flags = [flag for flag in FLAGS if flag not in ("--tokenizer", "bytes")]
    refused = here(
        tmp_path / "run", *flags, "--data", few, tmp_path / "store", "--data_weights", "1", "1"
    )
    assert (refused.code, refused.said.count("\n")) == (2, 1)
    assert f"{few} and {tmp_path / 'store'} were made with different tokenizers" in refused.said
    twice = here(tmp_path / "run", *FLAGS, "--data", few, few, "--data_weights", "1", "1")
    assert (twice.code, f"--data names {few} twice" in twice.said) == (2, True)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------- streaming


class Slow:
    """Stands in for `cached_store.Growing`: grows by a few documents at a time."""

    instances: ClassVar[list["Slow"]] = []
    most = 200

    def __init__(self, prepared: Prepared, whole: cached_store.Growing) -> None:
        self.store, self.whole = prepared.store, whole
        self.documents = {name: self._documents(name) for name in ("train", "validation")}
        self.shown, self.closed, self.changed = 0, False, threading.Condition()
        self.thread = threading.Thread(target=self._grow, daemon=True)
        self.instances.append(self)

    def __getattr__(self, name: str) -> Any:
        """All but the documents is as in the whole corpus."""
        return getattr(self.whole, name)

    def _documents(self, name: str) -> list[np.ndarray]:
        split = self.store.split(name)
        labels, begins, _ = split.windows(np.array([0]), split.num_tokens)
        return np.split(labels[0, 1:], np.flatnonzero(begins[0])[1:])

    def _grow(self) -> None:
        while not self.closed and self.shown < 200:
            time.sleep(0.02)
            with self.changed:
                self.shown = min(self.shown + 4, self.most)
                self.changed.notify_all()

    def split(self, name: str, tokens: int | None) -> tuple[StoreSplit, bool]:
        with self.changed:
            if self.thread.ident is None:
                self.thread.start()
            while True:
                if self.shown >= 200:
                    return self.store.split(name), True
                documents = self.documents[name][
                    : self.shown if name == "train" else self.shown // 4
                ]
                found = StoreSplit(
                    [MemoryShard(documents, TOKENIZER.eos_token_id)] if documents else []
                )
                if tokens is not None and found.num_tokens >= tokens:
                    return found, False
                if self.closed:
                    raise RuntimeError("closed")
                self.changed.wait()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        if self.thread.ident is not None:
            self.thread.join()


@contextmanager
def slowly() -> Iterator[None]:
    start = cached_store.start

    def slow(options: CorpusOptions, *args: Any, **more: Any) -> Slow:
        with closing(start(options, *args, **more)) as corpus:
            corpus.split("train", None)
            corpus.beginning()
        return Slow(cached_store.prepare(options, *args, **more), corpus)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cached_store, "start", slow)
        yield


@pytest.mark.slow
@pytest.mark.exhaustive
def test_streaming_equals_a_run_on_the_complete_store(
    files: dict[str, Path],
    here: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(streaming, "BLOCK_WINDOWS", 10)
    monkeypatch.setattr(streaming, "VALIDATION_WINDOWS", 3)
    flags = [*FLAGS, "--data", files["many"], "--streaming"]
    with slowly():
        run = here(tmp_path / "run", *flags)
        assert run.code == 0, run.said
        with stop_at(7):
            stopped = here(tmp_path / "stopped", *flags)
        assert stopped.code == 75, stopped.said
        resumed = here(tmp_path / "stopped", *flags)
        assert resumed.code == 0, resumed.said
    assert [slow.closed for slow in Slow.instances] == [True] * 3
    complete = here(tmp_path / "complete", *flags)
    assert complete.code == 0, complete.said
    for other in (run, resumed):
        assert (other.numbers, other.weights) == (complete.numbers, complete.weights)
        assert events(other, "end_of_data") == events(complete, "end_of_data")
    windows = len(get_dataset(files["many"], TOKENIZER, LENGTH, validation_fraction=0.2))
    assert [event["step"] for event in events(run, "end_of_data")] == [
        -(-windows * e // BATCH) for e in range(1, STEPS * BATCH // windows + 1)
    ]
    assert all(line["eval/tokens"] == 3 * LENGTH for line in run.numbers if "eval/loss" in line)
    waits = [
        line["throughput/data_wait_fraction"]
        for line in run.lines
        if line["step"] <= 5 and "train/loss" in line
    ]
    assert max(waits) > 0.2, "waiting for the corpus is waiting for data"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_streaming_during_a_real_preparation(
    here: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(streaming, "VALIDATION_WINDOWS", 3)
    flags = [*FLAGS, "--data", rows(tmp_path / "large.jsonl", "word", 30_000), "--streaming"]
    first, second = here(tmp_path / "first", *flags), here(tmp_path / "second", *flags)
    assert (first.code, second.code) == (0, 0), first.said + second.said
    assert (first.numbers, first.weights) == (second.numbers, second.weights)
    assert "tokenised during the run" in first.said
    third = here(tmp_path / "first", *flags[:-1])
    assert "--streaming was True and is False" in third.said


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("most", "save_steps", "at"),
    [
        pytest.param(0, 5, 0, marks=pytest.mark.exhaustive),
        pytest.param(40, 5, 5, marks=pytest.mark.exhaustive),
        (40, 3, 5),
    ],
)
def test_a_signal_while_waiting_for_the_corpus(
    most: int,
    save_steps: int,
    at: int,
    files: dict[str, Path],
    here: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(streaming, "BLOCK_WINDOWS", 10)
    monkeypatch.setattr(Slow, "most", most)
    flags = [
        *FLAGS,
        "--data",
        files["many"],
        "--streaming",
        "--save_steps",
        save_steps,
        "--eval_steps",
        "50",
    ]
    started = Slow.split

    def then_signal(self: Slow, name: str, tokens: int | None) -> tuple[StoreSplit, bool]:
        if self.shown >= most:
            threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGTERM]).start()
        return started(self, name, tokens)

    monkeypatch.setattr(Slow, "split", then_signal)
    with slowly():
        stopped = here(tmp_path / "run", *flags)
    assert stopped.code == 75, stopped.said
    end = stopped.lines[-1]
    assert (end["event"], end["step"]) == ("signal", at)
    assert here(tmp_path / "run", *flags).numbers == here(tmp_path / "whole", *flags).numbers


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_error_in_the_data_stops_the_run(here: Callable[..., Run], tmp_path: Path) -> None:
    broken = rows(tmp_path / "broken.jsonl", "word", 3000)
    broken.write_text(broken.read_text() + '{"text": \n' + broken.read_text())
    run = here(tmp_path / "run", *FLAGS, "--data", broken, "--streaming", "--quiet")
    assert (run.code, run.said.count("\n")) == (2, 1), run.said
    assert f"{broken}:3001 " in run.said


# ------------------------------------------------------------------------------ packing and targets


@pytest.mark.slow
def test_fine_tuning_rows_are_trained_on_at_their_targets_only(
    here: Callable[..., Run], tmp_path: Path
) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(
        "".join(
            json.dumps({"prompt": f"What is {i} and {i}?", "completion": str(2 * i)}) + "\n"
            for i in range(150)
        )
    )
    dataset = get_dataset(file, TOKENIZER, LENGTH, validation_fraction=0.2, packing="whole")
    run = here(tmp_path / "run", *FLAGS, "--data", file, "--packing", "whole")
    assert run.code == 0, run.said
    order = Shuffled(dataset.packed, 42)
    taken = np.concatenate(
        [
            order.at(np.arange(s * BATCH, (s + 1) * BATCH))["loss_mask"]
            .sum(keepdims=True)
            .reshape(1)
            for s in range(STEPS)
        ]
    )
    assert [line["tokens"] for line in run.numbers if "train/loss" in line] == np.cumsum(
        taken
    ).tolist()
    epoch = dataset.packed.rows(np.arange(len(dataset)))["loss_mask"].sum()
    assert epoch == dataset.packed.num_targets < dataset.num_tokens / 2
    held_out = get_dataset(
        file, TOKENIZER, LENGTH, split="validation", validation_fraction=0.2, packing="whole"
    )
    assert {line["eval/tokens"] for line in run.numbers if "eval/loss" in line} == {
        held_out.packed.num_targets
    }
    assert events(run, "end_of_data") == ends(order)
    assert re.search(
        r"packing +sequences consist of whole documents, with "
        rf"{dataset.packed.padding_fraction:.1%} padding",
        run.said,
    )
