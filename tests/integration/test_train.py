"""`consyn-train` from text to a model, as a process: what is on disk and on the screen afterwards,
and what a second start does."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from consyn_jax.cli.train import read_arguments
from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError
from consyn_jax.flags import flags
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.logging.advice import LEAST_SECONDS

from .conftest import TINY, TRACKED, Run

TRAIN_KEYS = {
    "train/loss",
    "train/grad_norm",
    "train/learning_rate",
    "train/clipped_fraction",
    "train/epoch",
    "memory/peak_bytes",
}
TRAIN_KEYS |= {"throughput/tokens_per_s", "throughput/step_time_s", "throughput/data_wait_fraction"}
TRAIN_KEYS |= {f"time/{name}_s" for name in ("compute", "data", "evaluation", "saving")}
TRAIN_KEYS |= {"time/compiling_s", "time/other_s"}
EVAL_KEYS = {"eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/accuracy", "eval/tokens"}
EVERY_LINE = {"step", "tokens", "time_s"}


@pytest.fixture(scope="module")
def finished(
    process: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory, corpus: Path
) -> Run:
    """A run with both trackers, begun and ended."""
    path = tmp_path_factory.mktemp("finished") / "run"
    flags = [*TRACKED, "--data", corpus, "--validation_fraction", "0.2"]
    flags += ["--logging_backend", "both"]
    return process(path, *flags, WANDB_MODE="offline", WANDB_SILENT="true")


def test_it_ends_well_and_says_where_everything_is(finished: Run) -> None:
    assert finished.code == 0, finished.said
    said = finished.said.splitlines()
    assert (
        said[-1]
        == f"Everything is in {finished.path}: final/ (the model), report.html, loss.png, metrics.jsonl."
    )
    best = rf"best eval loss \d\.\d{{4}} at step 6: {finished.path / 'best'}"
    following = said.index("Next:")
    assert re.fullmatch(best, said[following - 1])
    begins = [line.split()[0] for line in said[following + 1 : -1] if line.startswith("  consyn")]
    assert begins == [
        "consyn-generate",
        "consyn-evaluate",
        "consyn-train",
    ]
    assert any(re.fullmatch(r"Compiling since \d\d:\d\d:\d\d\.", line) for line in said)
    assert "sample:" in said
    assert (
        sum(bool(re.match(r"step \d/6  loss \d\.\d{4}  .* tokens/s", line)) for line in said) == 6
    )
    header = finished.said.partition("step 1/6")[0]
    for name in ("model", "devices", "attention", "precision", "data", "budget", "output"):
        assert re.search(rf"^  {name} +\S", header, re.MULTILINE), name
    assert "warning" not in finished.said


def test_the_run_directory_is_complete(finished: Run) -> None:
    path = finished.path
    found = {entry.name for entry in path.iterdir()}
    assert found == {
        "config.yaml",
        "run.json",
        "provenance.json",
        "metrics.jsonl",
        "tokenizer",
        "checkpoints",
        "best",
        "final",
        "logs",
        "wandb",
        "report.html",
        "samples.jsonl",
        "loss.png",
    }
    assert sorted(entry.name for entry in (path / "checkpoints").iterdir()) == ["2", "4", "6"]
    assert {entry.name for entry in (path / "tokenizer").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for model in ("best", "final"):
        assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= {
            entry.name for entry in (path / model).iterdir()
        }
    assert (path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (path / "report.html").read_text()
    assert not re.search(r'(src|href)="?(https?:)?//', (path / "report.html").read_text())
    assert any(entry.name.startswith("events") for entry in (path / "logs").iterdir())
    assert list((path / "wandb").glob("offline-run-*"))


def test_metrics_have_the_names_of_the_contract(finished: Run) -> None:
    lines = finished.lines
    training = [line for line in lines if "train/loss" in line]
    evaluations = [line for line in lines if "eval/loss" in line and "event" not in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    assert all(set(line) == EVERY_LINE | TRAIN_KEYS for line in training)
    assert [line["step"] for line in evaluations] == [3, 6]
    assert all(set(line) == EVERY_LINE | EVAL_KEYS for line in evaluations)
    assert all(set(line) >= EVERY_LINE for line in lines)
    slow = lines[-1]["time_s"] >= LEAST_SECONDS  # beside other load: there is advice on time then
    events = [event for event in finished.events if not (slow and event == "advice")]
    assert events == ["start", "save", "best", "save", "best", "save", "finish"]
    assert [line["time_s"] for line in lines] == sorted(line["time_s"] for line in lines)
    assert training[-1]["tokens"] > training[0]["tokens"] > 100
    assert training[-1]["train/loss"] < training[0]["train/loss"]
    last = evaluations[-1]
    assert last["eval/perplexity"] == pytest.approx(np.exp(last["eval/loss"]))


def test_config_yaml_is_a_recipe_for_the_run(finished: Run) -> None:
    text = (finished.path / "config.yaml").read_text()
    content = yaml.safe_load(text)
    assert set(flags(RunConfig)) < set(content)
    assert re.search(r"^hidden_dim: 32 +# flag$", text, re.MULTILINE)
    assert re.search(r"^mlp_dim: 384 +# preset haiku$", text, re.MULTILINE)
    assert content["derived"]["total_steps"] == 6
    config, _, _ = read_arguments(["--config", str(finished.path / "config.yaml")])
    assert (config.model.hidden_dim, config.budget.max_steps, config.saving.output) == (
        32,
        6,
        str(finished.path),
    )


@pytest.mark.users_compiler
def test_the_model_loads_here_and_in_transformers(finished: Run) -> None:
    ids = np.array([[256, 68, 111, 99, 117, 109]])
    for model in ("best", "final"):
        own = ConsynLMHeadModel.from_pretrained(str(finished.path / model))
        theirs = AutoModelForCausalLM.from_pretrained(finished.path / model)
        tokenizer = AutoTokenizer.from_pretrained(finished.path / model)
        assert (
            tokenizer("Docum", add_special_tokens=False)["input_ids"]
            == BPETokenizer.from_file(finished.path / model).encode("Docum")
            == [68, 111, 99, 117, 109]
        )
        import torch

        np.testing.assert_allclose(
            own(jnp.asarray(ids)), theirs(torch.tensor(ids)).logits.detach().numpy(), atol=1e-4
        )


def test_the_same_command_again_says_that_it_is_complete(
    finished: Run, here: Callable[..., Run], corpus: Path
) -> None:
    before = {file: file.read_bytes() for file in finished.path.rglob("*") if file.is_file()}
    again = here(finished.path, *TINY, "--data", corpus, "--validation_fraction", "0.2")
    assert again.code == 0
    assert (
        again.said.splitlines()[-1]
        == f"This run is complete: 6 steps. Its model is in {finished.path / 'final'}."
    )
    assert {
        file: file.read_bytes() for file in finished.path.rglob("*") if file.is_file()
    } == before


def test_another_learning_rate_is_another_run(
    finished: Run, here: Callable[..., Run], corpus: Path
) -> None:
    other = here(
        finished.path, *TINY, "--data", corpus, "--validation_fraction", "0.2", "--lr", "1e-4"
    )
    assert other.code == 2
    assert (
        f"--output {finished.path} holds a run with another schedule: --lr was 0.003 and is 0.0001;"
        in other.said
    )


def test_other_data_are_another_run(finished: Run, here: Callable[..., Run], corpus: Path) -> None:
    other = here(
        finished.path, *TINY, "--data", corpus, "--validation_fraction", "0.3", "--batch_size", "16"
    )
    assert other.code == 2
    for part in (
        "the training data changed",
        "batch_size x gradient_accumulation_steps was 8 and is 16",
    ):
        assert part in other.said


@pytest.mark.slow
@pytest.mark.exhaustive
def test_bad_rows_are_skipped_counted_and_reported(
    here: Callable[..., Run], corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": broken}\n{"body": "x"}\n' + corpus.read_text())
    run = here(
        tmp_path / "run",
        *TINY,
        "--data",
        tmp_path / "rows.jsonl",
        "--on_bad_rows",
        "skip",
        "--max_steps",
        "1",
    )
    assert run.code == 0
    assert re.search(
        r"^  bad rows +2 skipped, the first: .*rows\.jsonl:1 is broken JSON", run.said, re.MULTILINE
    )


@pytest.mark.slow
def test_without_validation_data_it_says_so_and_trains(
    here: Callable[..., Run], corpus: Path, tmp_path: Path
) -> None:
    run = here(
        tmp_path / "run", *TINY, "--data", corpus, "--validation_fraction", "0", "--max_steps", "1"
    )
    assert run.code == 0
    assert re.search(
        r"^  validation +none: the validation split has no document; give --validation PATH",
        run.said,
        re.MULTILINE,
    )
    assert not any("eval/loss" in line for line in run.lines)
    assert not (run.path / "best").exists()


@pytest.mark.slow
def test_a_run_that_diverges_exits_with_3(
    here: Callable[..., Run], corpus: Path, tmp_path: Path
) -> None:
    run = here(
        tmp_path / "run",
        *TINY,
        "--data",
        corpus,
        "--lr",
        "1e9",
        "--max_grad_norm",
        "0",
        "--warmup_steps",
        "0",
    )
    assert run.code == 3
    assert re.search(r"consyn-train: Step \d: .*; training has diverged\. Lower --lr", run.said)
    event = run.lines[-1]
    assert (event["event"], "final" in {entry.name for entry in run.path.iterdir()}) == (
        "nonfinite",
        False,
    )
    assert event["tokens"] > run.lines[1]["tokens"]


class TestOverwrite:
    @pytest.mark.parametrize(
        ("function", "flags", "again"),
        [
            ("loop.write_beginning", ["--overwrite"], "again without --overwrite"),
            ("loop.write_beginning", [], "again"),
            ("open_run.open_run_directory", ["--overwrite"], "again"),
        ],
    )
    def test_advice_leaves_it_out_once_the_old_run_is_deleted(
        self,
        here: Callable[..., Run],
        corpus: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        function: str,
        flags: list[str],
        again: str,
    ) -> None:
        errors: list[Exception] = [
            UserError("The disk is full. Free space, and run the same command again with room."),
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory."),
        ]
        for error in errors:
            monkeypatch.setattr(f"consyn_jax.training.{function}", Mock(side_effect=error))
            run = here(tmp_path / "run", *TINY, "--data", corpus, *flags)
            assert run.code == 2
            advice = run.said.splitlines()[-1].rpartition("same command ")[2]
            assert advice.startswith(f"{again} with ")

    @pytest.mark.slow
    def test_the_run_goes_and_what_is_not_of_it_stays(
        self, here: Callable[..., Run], corpus: Path, tmp_path: Path
    ) -> None:
        flags = [*TINY, "--data", corpus, "--max_steps", "1"]
        first = here(tmp_path / "run", *flags)
        (first.path / "notes.txt").write_text("mine")
        second = here(first.path, *flags, "--seed", "3", "--overwrite")
        assert (first.code, second.code) == (0, 0)
        assert (first.path / "notes.txt").read_text() == "mine"
        assert second.events.count("start") == 1
        assert second.lines[-1]["step"] == 1
        stored = yaml.safe_load((first.path / "config.yaml").read_text())
        assert (stored["seed"], stored["overwrite"]) == (3, False)

    @pytest.mark.slow
    def test_a_run_without_a_checkpoint_needs_no_overwrite(
        self, here: Callable[..., Run], corpus: Path, tmp_path: Path
    ) -> None:
        flags = [*TINY, "--data", corpus, "--max_steps", "1", "--save_steps", "2"]
        failed = here(
            tmp_path / "run",
            *flags,
            "--lr",
            "1e9",
            "--max_grad_norm",
            "0",
            "--warmup_steps",
            "0",
            "--max_steps",
            "6",
            "--save_steps",
            "6",
        )
        assert (failed.code, (failed.path / "config.yaml").exists()) == (3, True)
        assert here(tmp_path / "run", *flags).code == 0
        assert [line["step"] for line in failed.numbers if "train/loss" in line] == [1]


class TestStartingFromWeights:
    @pytest.mark.slow
    def test_those_of_a_run(
        self, finished: Run, here: Callable[..., Run], corpus: Path, tmp_path: Path
    ) -> None:
        run = here(
            tmp_path / "run",
            "--checkpoint",
            finished.path / "final",
            "--data",
            corpus,
            "--max_steps",
            "1",
            "--max_tokens",
            "32",
            "--eval_steps",
            "1",
        )
        assert run.code == 0, run.said
        assert (
            yaml.safe_load((run.path / "config.yaml").read_text())["derived"]["vocab_size"] == 259
        )
        assert run.numbers[0]["train/loss"] < finished.numbers[0]["train/loss"] - 0.2

    @pytest.mark.slow
    def test_the_architecture_alone(
        self, finished: Run, here: Callable[..., Run], corpus: Path, tmp_path: Path
    ) -> None:
        flags = [
            "--model",
            finished.path / "final" / "config.json",
            "--tokenizer",
            "bytes",
            "--data",
            corpus,
            "--max_steps",
            "1",
            "--max_tokens",
            "32",
        ]
        run = here(tmp_path / "run", *flags)
        assert run.code == 0, run.said
        made = json.loads((run.path / "final" / "config.json").read_text())
        assert made == json.loads((finished.path / "final" / "config.json").read_text())
        assert run.numbers[0]["train/loss"] == pytest.approx(
            finished.numbers[0]["train/loss"], abs=0.2
        )

    @pytest.mark.slow
    @pytest.mark.exhaustive
    def test_a_hugging_face_model_without_a_tokenizer(
        self, here: Callable[..., Run], shared_data: Path, corpus: Path, tmp_path: Path
    ) -> None:
        flags = [
            "--checkpoint",
            shared_data / "parity" / "stories260K" / "hf",
            "--data",
            corpus,
            "--max_steps",
            "1",
            "--max_tokens",
            "32",
        ]
        refused = here(tmp_path / "run", *flags)
        assert refused.code == 2
        assert "has no tokenizer (its files: config.json, model.safetensors)" in refused.said
        run = here(tmp_path / "run", *flags, "--tokenizer", "bytes")
        assert run.code == 0, run.said
        assert json.loads((run.path / "final" / "config.json").read_text())["vocab_size"] == 512


@pytest.mark.slow
def test_steps_are_profiled_and_learn_the_same(
    finished: Run, here: Callable[..., Run], corpus: Path, tmp_path: Path
) -> None:
    run = here(
        tmp_path / "run",
        *TINY,
        "--data",
        corpus,
        "--validation_fraction",
        "0.2",
        "--profile_steps",
        "2:3",
    )
    assert run.code == 0
    assert run.numbers == finished.numbers
    page = (run.path / "profile" / "summary.txt").read_text()
    assert page.startswith("Steps 2 to 3 on ")
    assert all(
        re.search(rf"^  {part} +[\d.]+%", page, re.MULTILINE)
        for part in ("attention", "mlp", "head", "optimizer")
    )
    assert page.splitlines()[0] in run.said
    assert next((run.path / "profile").rglob("*.trace.json.gz"))
