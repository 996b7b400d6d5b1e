"""`--eval_requests`: the same scores as consyn-evaluate, the best model by them, and mistakes."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consyn_jax.config import EvaluationOptions
from consyn_jax.errors import UserError
from consyn_jax.inference.model_source import find_source
from consyn_jax.inference.scoring.ready_scorer import load_scorer
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model_config import ModelConfig
from consyn_jax.scoring.scorer import Scorer, Scores, Wanted
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training import ConsynTrainer
from consyn_jax.training.inputs.batch_source import described
from consyn_jax.training.inputs.request_evaluation import EvalRequests, read_eval_requests

CONFIG = ModelConfig(
    vocab_size=259,
    hidden_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=16,
    context=32,
    bos_token_id=257,
    eos_token_id=258,
    pad_token_id=256,
)
ROWS = [[(i * n) % 250 for i in range(17)] for n in range(16)]
REQUESTS = [
    {"context": f"{a} + {b} =", "choices": [f" {a + b + n}" for n in range(3)], "gold": 0}
    for a in range(3)
    for b in range(4)
] + [{"context": "one two", "continuation": " three", "task": "next"}]


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trainer(path: Path, requests: str, **settings: Any) -> ConsynTrainer:
    options = {"max_steps": 4, "eval_steps": 1, "save_steps": 2, "batch_size": 8} | settings
    return ConsynTrainer(
        ConsynLMHeadModel.from_config(CONFIG),
        ROWS,
        ROWS[:8],
        output_dir=path,
        tokenizer=BPETokenizer.bytes(),
        eval_requests=[requests],
        metric_for_best_model="eval/sums/accuracy_per_byte",
        learning_rate=0.02,
        warmup_steps=0,
        logging_backend="none",
        quiet=True,
        **options,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_an_evaluation_has_the_scores_of_consyn_evaluate(tmp_path: Path) -> None:
    file = written(tmp_path / "sums.jsonl", REQUESTS)
    path = tmp_path / "run"
    metrics = trainer(path, file).train()
    requests = read_eval_requests(
        EvaluationOptions(eval_requests=(file,)), BPETokenizer.bytes(), CONFIG
    )
    assert isinstance(requests, EvalRequests)
    scorer = load_scorer(find_source(path), "float32", "data=4,tensor=2", 8)
    again = requests.scores(scorer)
    assert again.keys() == {name for name in metrics if name.count("/") == 2}
    for name, value in again.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    values = [line["eval/sums/accuracy_per_byte"] for line in lines(path) if "eval/loss" in line]
    assert len(values) == 4
    best = [i + 1 for i, v in enumerate(values) if all(v > other for other in values[:i])]
    assert [line["step"] for line in lines(path) if line.get("event") == "best"] == best
    written(tmp_path / "sums.jsonl", [*REQUESTS, REQUESTS[0]])
    with pytest.raises(
        UserError, match="the requests of --eval_requests, by which the best model is selected"
    ):
        trainer(path, file, max_steps=6, overwrite_schedule=True).train()


class Scoring(Scorer):
    """Scores without a model: each token of an answer has the log-likelihood -1."""

    def __init__(self) -> None:
        pass

    def score(self, sequences: Sequence[Wanted], tick: Any = None) -> list[Scores]:
        sizes = [len(sequence.ids) - sequence.first for sequence in sequences]
        return [Scores(np.full(n, -1.0), np.zeros(n, bool)) for n in sizes]


def test_requests_are_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = EvaluationOptions(eval_requests=(written(tmp_path / "sums.jsonl", REQUESTS),))
    requests = read_eval_requests(options, BPETokenizer.bytes(), CONFIG)
    assert requests is not None
    monkeypatch.delattr(BPETokenizer, "encode_batch")
    first, second = (requests.scores(Scoring()) for _ in range(2))
    assert first == second
    assert first["eval/next/perplexity"] == pytest.approx(math.e)


def test_a_run_says_what_is_not_read_and_what_is_cut(tmp_path: Path) -> None:
    rows = [*REQUESTS, {"context": "a" * 99, "continuation": " b", "id": 3, "task": "next"}]
    made = trainer(tmp_path / "run", written(tmp_path / "sums.jsonl", rows))
    said = "14 requests in 2 tasks; next: 1 of 2 contexts truncated on the left to the model's 32 "
    said += "tokens; next: unread keys, and the number of rows with each: id (1)"
    assert ("requests", said) in described(evaluation=made.eval_source)


@pytest.mark.slow
def test_a_resumed_run_evaluates_as_one_that_was_not_interrupted(tmp_path: Path) -> None:
    file = written(tmp_path / "sums.jsonl", REQUESTS)
    trainer(tmp_path / "whole", file).train()
    parts = {"scheduler": "constant", "overwrite_schedule": True}
    trainer(tmp_path / "whole2", file, **parts).train()
    trainer(tmp_path / "part", file, max_steps=2, **parts).train()
    trainer(tmp_path / "part", file, **parts).train()

    def scores(name: str) -> list[Any]:
        found = [line for line in lines(tmp_path / name) if "eval/loss" in line]
        return [{k: v for k, v in line.items() if k.startswith("eval/")} for line in found]

    assert scores("part") == scores("whole2")


@pytest.mark.parametrize(
    ("row", "metric", "message"),
    [
        ({"context": "a", "choices": ["b"]}, "eval/loss", r"sums.jsonl:14 has choices but no gold"),
        ({"context": "a", "continuation": "b" * 40}, "eval/loss", r"sums.jsonl:14 has a contin"),
        ({"prompt": "a", "answer": "b"}, "eval/loss", r"sums.jsonl:14 asks for a text"),
        (REQUESTS[0], "eval/sums/perplexity", "is not a metric of --eval_requests"),
        (REQUESTS[0], "eval/sum/accuracy", "did you mean eval/sums/accuracy?"),
        ({**REQUESTS[0], "task": "sums"}, "eval/loss", "two tasks named sums"),
    ],
)
def test_mistakes(row: dict[str, Any], metric: str, message: str, tmp_path: Path) -> None:
    file = written(tmp_path / "sums.jsonl", [*REQUESTS, row])
    options = EvaluationOptions(eval_requests=(file,), metric_for_best_model=metric)
    with pytest.raises(UserError, match=message):
        read_eval_requests(options, BPETokenizer.bytes(), CONFIG)


def test_a_run_on_token_ids_has_no_requests(tmp_path: Path) -> None:
    options = EvaluationOptions(eval_requests=(written(tmp_path / "a.jsonl", REQUESTS),))
    with pytest.raises(UserError, match="needs a tokenizer"):
        read_eval_requests(options, None, CONFIG)
