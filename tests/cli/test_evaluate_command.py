"""`consyn-evaluate` as a command: one sentence for a mistake, a table and a whole file otherwise."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from consyn_jax.cli.evaluate import main
from consyn_jax.inference.scoring import evaluate_models
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model_config import ModelConfig
from consyn_jax.scoring.request_scores import TaskScores
from consyn_jax.tokenization import BPETokenizer

CONFIG = ModelConfig(
    vocab_size=259,
    hidden_dim=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    context=64,
    bos_token_id=257,
    eos_token_id=258,
    pad_token_id=256,
)
ROWS = [
    {"context": "2 + 2 =", "choices": [" 4", " 5"], "gold": 0, "id": 7},
    {"context": "2 + 3 =", "choices": [" 4", " 5"], "gold": 1},
    {"context": "a" * 100, "continuation": "bc"},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two models that differ."""
    names = []
    for seed in (1, 2):
        path = tmp_path_factory.mktemp("models") / f"model{seed}"
        model = ConsynLMHeadModel.from_config(CONFIG, seed)
        model.save_pretrained(path, BPETokenizer.bytes())
        names.append(str(path))
    return names


def written(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
def test_two_models_side_by_side(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = written(tmp_path / "sums.jsonl", [*ROWS])
    (tmp_path / "text.txt").write_text("Some text that is longer than a single window is. " * 3)
    output = tmp_path / "scores.json"
    data, rows = ["--data", str(tmp_path / "text.txt")], ["--requests", requests]
    more = ["--stride", "32", "--bootstrap", "50", "--output", str(output)]
    assert main([*models, *data, *rows, *more]) == 0
    printed = capsys.readouterr()
    assert "sums.jsonl (3 requests)" in printed.out
    assert "of answers changed" in printed.out
    assert "1 of 5 contexts truncated on the left to the model's 64 tokens" in printed.out
    assert "unread keys, and the number of rows with each: id (1)" in printed.out
    assert "150 tokens scored in windows of 64, stride 32" in printed.out
    content = json.loads(output.read_text())
    text, sums = content["sections"]
    one, other = text["metrics"]["bits_per_byte"]
    assert one["value"] != other["value"] == pytest.approx(one["value"] + other["difference"])
    assert one["value"] == pytest.approx(text["metrics"]["bits_per_token"][0]["value"])
    assert len(sums["metrics"]["accuracy"]) == 2
    assert [len(a["log_likelihood"]) for a in content["answers"][0]["sums.jsonl"]] == [2, 2, 1]
    assert list(tmp_path.glob(".*")) == []


QUESTIONS = [
    {"prompt": "2 + 2 =", "answer": "#### 4", "max_tokens": 3, "task": "sums"},
    {"messages": [{"role": "user", "content": "hi"}], "answers": ["hi", "ho"], "task": "talk"},
]


@pytest.mark.slow
def test_questions_and_a_page(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = written(tmp_path / "rows.jsonl", [*QUESTIONS, {**ROWS[0], "task": "<sums>"}])
    output, page = tmp_path / "scores.json", tmp_path / "scores.html"
    files = ["--output", str(output), "--page", str(page)]
    answers = ["--max_tokens", "5", "--stop", "Question:", "--bootstrap", "20"]
    assert main([*models, "--requests", requests, *files, *answers]) == 0
    printed = capsys.readouterr().out
    assert "sums (1 request)" in printed
    assert "number_flexible" in printed
    assert "1 of 1 answers ended by max_tokens" in printed
    assert "the model has no chat template" in printed
    content = json.loads(output.read_text())
    sums, talk = content["answers"][0]["sums"], content["answers"][0]["talk"]
    assert len(sums[0]["text"].encode()) <= 3 * 3  # broken bytes are three in UTF-8
    assert sums[0]["right"].keys() == {"exact_match", "number_strict", "number_flexible"}
    assert talk[0]["right"].keys() == {"exact_match"}
    html = page.read_text()
    assert "&lt;sums&gt; (1 request)" in html
    assert "of answers changed" in html
    assert "<script" not in html
    assert "http" not in html.split("</style>")[1].replace("http-equiv", "")


def test_keys_that_are_not_read_are_counted_for_questions_alone(
    models: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def silent(scores: TaskScores, *_: object) -> TaskScores:
        return replace(scores, texts=("",) * len(scores.task.questions))

    monkeypatch.setattr(evaluate_models, "load_runtime", lambda *_: SimpleNamespace(description=""))
    monkeypatch.setattr(evaluate_models, "with_texts", silent)
    more = dict.fromkeys(["id", "level", "note", "source", "split", "topic"], 0)
    rows = [{**QUESTIONS[0], **more}, {**QUESTIONS[0], "id": 1}, QUESTIONS[1]]
    flags = ["--requests", written(tmp_path / "rows.jsonl", rows)]
    assert main([models[0], *flags, "--bootstrap", "0"]) == 0
    said = capsys.readouterr().out
    assert said.count("unread keys") == 1
    assert "unread keys, and the number of rows with each: id (2)" in said
    assert " and 1 more" in said


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"context": "a"},
            "must have one of continuation, continuations, choices, or prompt and answer, but has",
        ),
        ({"context": "a", "choices": ["b", "c"]}, "has choices but no gold"),
        ({"context": "a", "choices": ["b", "c"], "gold": 2}, "have the numbers 0 to 1"),
        ({"context": "a", "choices": ["b", "c"], "gold": True}, "under the key 'gold'"),
        ({"context": "a", "choices": "b", "gold": 0}, "holds a string under the key 'choices'"),
        ({"context": 3, "continuation": "b"}, "holds a number under the key 'context'"),
        ({"context": "a", "continuation": ""}, "has an empty text"),
        ({"continuation": "b"}, "must have context or contexts, but has neither"),
        (
            {"context": "a", "continuation": "b" * 65},
            "65 tokens, more than the model's context of 64",
        ),
        ([1], "holds an array, not an object"),
        ({"prompt": "a"}, "has a prompt without an answer"),
        ({"prompt": "a" * 63, "answer": "b"}, "has 64 tokens, and the model's context is 64"),
    ],
)
def test_a_wrong_row_is_named(
    models: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    row: object,
    message: str,
) -> None:
    requests = written(tmp_path / "rows.jsonl", [ROWS[0], row])
    assert main([models[0], "--requests", requests]) == 2
    error = capsys.readouterr().err
    assert f"{requests}:2 " in error
    assert "Traceback" not in error
    assert message in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "There is no model to evaluate"),
        (["m"], "There is no data to evaluate on"),
        (["m", "m", "--data", "x"], "m is given twice"),
        (["m", "--data", "x", "--window", "1"], "--window must be at least 2, not 1"),
        (["m", "--data", "x", "--window", "8", "--stride", "9"], "--stride 9 is more than"),
        (["m", "--data", "x", "--output", "a.txt"], "must be a file whose name ends in .json"),
        (["m", "--data", "x", "--output", "no/a.json"], "in a directory that does not exist"),
        (["m", "--requests", "none.jsonl"], "none.jsonl in --requests does not exist"),
        (["nothing", "--data", "sample"], "nothing is not a model"),
        (["m", "--requests", "x", "--page", "a.json"], "must be a file whose name ends in .html"),
        (["m", "--requests", "x", "--max_tokens", "0"], "--max_tokens must be at least 1, not 0"),
        (["m", "--requests", "x", "--temperature", "-1"], "--temperature must not be negative"),
        (["m", "--strid", "8"], "did you mean --stride?"),
        (["m", "--requests", "x", "--stride", "8"], "--stride is for --data, which is not given"),
        (["m", "--data", "x", "--stop", "a"], "--stop is for --requests, which is not given"),
        (["m", "--requests", "x", "--stop", ""], "--stop has an empty text"),
        (
            ["m", "--requests", "rows.jsonl", "--max_tokens", "5"],
            "--max_tokens is for rows with prompt and answer, but --requests has no such",
        ),
        (["m", "--requests", "rows.jsonl", "rows.jsonl"], "rows.jsonl is given twice"),
    ],
)
def test_mistakes(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "rows.jsonl", ROWS)
    assert main(words) == 2
    assert message in capsys.readouterr().err
