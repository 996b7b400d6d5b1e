"""A run of DPO: its reference is computed once and kept, and nothing depends on mesh or batch."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from consyn_jax.cli.train import main
from consyn_jax.data.store.manifest import BETWEEN, PAIRS_VERSION
from consyn_jax.errors import Diverged, Interrupted, UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model_config import ModelConfig
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training import ConsynTrainer
from consyn_jax.training.dataset import ConsynDataset, get_dataset
from consyn_jax.training.logging.console import Console
from consyn_jax.training.preference import reference
from consyn_jax.training.preference.reference import FILE

TOKENIZER = BPETokenizer.bytes()
MODEL = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    context=32,
    tie_embeddings=False,
    bos_token_id=TOKENIZER.bos_token_id,
    eos_token_id=TOKENIZER.eos_token_id,
    pad_token_id=TOKENIZER.pad_token_id,
)


def model() -> ConsynLMHeadModel:
    params = ConsynLMHeadModel.from_config(MODEL).parameters
    shape = params["output"].shape
    return ConsynLMHeadModel.from_parameters(
        MODEL, params | {"output": 0.3 * jax.random.normal(jax.random.key(0), shape)}
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    pairs = [
        {"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {'no' * (i % 4)}"}
        for i in range(24)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return file


def data(rows: Path, split: str = "train", **options: Any) -> ConsynDataset:
    return get_dataset(
        rows,
        TOKENIZER,
        16,
        split=split,
        row_format="preference",
        validation_fraction=0.3,
        **options,
    )


def trainer(rows: Path, output: Path, **settings: Any) -> ConsynTrainer:
    settings = {"max_steps": 4, "batch_size": 8, "learning_rate": 1e-2, **settings}
    return ConsynTrainer(
        model(),
        data(rows),
        data(rows, "validation"),
        output_dir=output,
        objective="dpo",
        tokenizer=TOKENIZER,
        eval_steps=2,
        logging_steps=1,
        save_steps=2,
        logging_backend="none",
        warmup_ratio=0.0,
        quiet=True,
        **settings,
    )


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, np.ndarray]:
    return load_file(output / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    trainer(rows, output).train()
    return output


@pytest.mark.slow
def test_the_first_step_has_no_rewards_and_training_raises_the_margin(finished: Path) -> None:
    steps = [line for line in lines(finished) if "train/loss" in line]
    assert steps[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert steps[0]["train/rewards/margins"] == pytest.approx(0, abs=1e-5)
    names = ("chosen", "rejected", "margins", "accuracies")
    assert {f"train/rewards/{name}" for name in names} <= steps[0].keys()
    evaluations = [line for line in lines(finished) if "eval/loss" in line and "event" not in line]
    assert evaluations[-1]["eval/rewards/margins"] > evaluations[0]["eval/rewards/margins"] > 0
    assert evaluations[-1]["eval/loss"] < np.log(2)
    assert {"eval/logps/chosen", "eval/pairs", "eval/tokens"} <= evaluations[-1].keys()
    assert (finished / "best" / "config.json").exists()


def test_the_reference_is_that_of_the_model_before_step_1(finished: Path, rows: Path) -> None:
    pairs, stored = data(rows).packed, load_file(finished / FILE)
    assert sorted(stored) == ["train", "validation"]
    row = pairs.rows(np.arange(len(pairs)))
    ids, labels = (row[n].reshape(-1, 16) for n in ("input_ids", "labels"))
    log_probs = jax.nn.log_softmax(model()(jnp.asarray(ids)), -1)
    each = np.take_along_axis(np.asarray(log_probs), labels[..., None], -1)[..., 0]
    expected = np.where(row["loss_mask"].reshape(-1, 16), each, 0).sum(-1).reshape(-1, 2)
    np.testing.assert_allclose(stored["train"], expected, rtol=1e-5, atol=1e-4)


def test_a_resumed_run_reads_the_reference_and_ends_with_the_same_bits(
    finished: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)

    def never(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(reference, "_compute", never)
    trainer(rows, output, resume="2").train()
    assert [line["step"] for line in lines(output) if line.get("event") == "resume"] == [2]
    whole, resumed = weights(finished), weights(output)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value)


@pytest.mark.slow
def test_without_its_file_or_with_a_damaged_one_a_run_is_not_resumed(
    finished: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    file = output / FILE
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(UserError, match=r"reference\.safetensors, with .* is damaged\. Res"):
        trainer(rows, output, resume="2").train()
    file.unlink()
    with pytest.raises(
        UserError, match=r"with the reference log-probabilities of this run, is missing"
    ):
        trainer(rows, output, resume="2").train()


def test_another_model_is_not_evaluated_with_the_reference_of_a_run(
    finished: Path, rows: Path
) -> None:
    at_the_end = ConsynTrainer(
        ConsynLMHeadModel.from_pretrained(finished / "final"),
        data(rows),
        data(rows, "validation"),
        tokenizer=TOKENIZER,
        output_dir=finished,
        objective="dpo",
        batch_size=8,
        quiet=True,
    )
    with pytest.raises(
        UserError, match=r"computed with other data, other initial weights.*--output\."
    ):
        at_the_end.evaluate()


@pytest.mark.slow
def test_a_signal_before_step_1_is_obeyed_at_once(
    finished: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Console, "note", signalled)
        with pytest.raises(Interrupted, match="SIGTERM before step 1: there is nothing to save"):
            trainer(rows, tmp_path).train()
    assert [line["event"] for line in lines(tmp_path)] == ["start", "signal"]
    assert not (tmp_path / FILE).exists()
    trainer(rows, tmp_path).train()
    assert weights(tmp_path).keys() == weights(finished).keys()
    for name, value in weights(finished).items():
        np.testing.assert_array_equal(weights(tmp_path)[name], value)


@pytest.mark.slow
def test_a_diverged_run_leaves_a_step_to_repeat(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Diverged, match="training has diverged"):
        trainer(rows, tmp_path, learning_rate=1e30).train()
    (bundle,) = (tmp_path / "nonfinite").iterdir()
    assert main(["--replay", str(bundle)]) == 0
    assert "not finite" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": "fsdp=2,context=4", "batch_size": 2, "gradient_accumulation_steps": 4},
        {"mesh": "data=2,fsdp=4"},
    ],
)
def test_mesh_batch_and_accumulation_make_no_difference(
    changes: dict[str, Any], finished: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    trainer(rows, output, **changes).train()
    for name, value in weights(finished).items():
        np.testing.assert_allclose(weights(output)[name], value, rtol=2e-3, atol=2e-4)
    before, now = (
        [line for line in lines(path) if "eval/loss" in line and "event" not in line]
        for path in (finished, output)
    )
    assert now[-1]["eval/loss"] == pytest.approx(before[-1]["eval/loss"], rel=1e-3)
    assert now[-1]["eval/pairs"] == before[-1]["eval/pairs"]


def test_pairs_need_the_objective_and_the_objective_needs_pairs(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has pairs of answers\. Pass objective='dpo'"):
        ConsynTrainer(model(), data(rows), output_dir=tmp_path / "run")
    text = get_dataset(rows, TOKENIZER, 16, prompt_key="prompt", completion_key="chosen")
    with pytest.raises(UserError, match="pairs of answers, but the data has none"):
        ConsynTrainer(model(), text, output_dir=tmp_path / "run", objective="dpo")


def test_a_store_of_pairs_says_so(rows: Path) -> None:
    store = data(rows).prepared.store
    assert store.manifest["version"] == PAIRS_VERSION
    assert store.holds_pairs
    split = store.split("train")
    marks = np.empty(split.num_tokens, np.uint8)
    split.read_targets(0, marks)
    assert np.count_nonzero(marks == BETWEEN) == split.num_documents


@pytest.mark.slow
def test_with_an_adapter_the_reference_is_that_of_the_model_under_it(
    finished: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    trainer(rows, output, lora_rank=2, lora_base_dtype="float32").train()
    stored, expected = load_file(output / FILE), load_file(finished / FILE)
    for name, values in expected.items():
        np.testing.assert_allclose(stored[name], values, rtol=1e-5, atol=1e-4)
    steps = [line for line in lines(output) if "train/loss" in line]
    assert steps[0]["train/rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["train/rewards/margins"] > 0
