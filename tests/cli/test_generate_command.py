"""`consyn-generate` from the command line."""

import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from consyn_jax.cli.generate import main
from consyn_jax.config import ModelConfig
from consyn_jax.inference.text_generation import chat_session
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.parameters import layout
from consyn_jax.tokenization import BPETokenizer

CONFIG = ModelConfig(
    vocab_size=259,
    hidden_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=16,
    context=48,
    bos_token_id=257,
    eos_token_id=258,
    pad_token_id=256,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape), jax.numpy.float32),
        layout(CONFIG).shapes,
    )
    directory = tmp_path_factory.mktemp("model")
    made = ConsynLMHeadModel.from_parameters(CONFIG, params)
    made.save_pretrained(directory, BPETokenizer.bytes())
    return directory


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capfd: pytest.CaptureFixture[str], *argv: str) -> str:
    """Check that the command refuses `argv` with one line and exit code 2; return the line."""
    capfd.readouterr()
    assert main(argv) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err.removeprefix("consyn-generate: ").rstrip("\n")


@pytest.mark.slow
def test_texts_of_a_file_and_the_same_from_python(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("rows.jsonl").write_text(
        '{"prompt": "ab", "id": 7}\n{"messages": [{"role": "user", "content": "x"}], "id": 8}\n'
    )
    given = [str(model), "--prompt", "c", "--file", "rows.jsonl", "--max-tokens", "60", "--n", "2"]
    assert main([*given, "--output", "out.jsonl", "--top_k", "50", "--batch_size", "4"]) == 0
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row.get("prompt") for row in rows] == ["c", "c", "ab", "ab", None, None]
    assert [row["sequence"] for row in rows] == [0, 1] * 3
    assert {row["ends"] for row in rows} <= {"eos", "context"}
    assert rows[0]["text"] != rows[1]["text"]
    out, err = capfd.readouterr()
    assert out == ""
    assert "6 texts with " in err
    assert "temperature 1, top_k 50" in err
    assert "no chat template" in err
    assert "unread keys, and the number of rows with each: id (2)" in err
    alone = ConsynLMHeadModel.from_pretrained(model).generate(
        "c", CONFIG.context - 2, temperature=1.0, top_k=50
    )
    assert alone == "c" + rows[0]["text"]


def test_texts_are_printed(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = [str(model), "--max_tokens", "5", "--include_prompt"]
    assert main([*given, "--prompt", "ab"]) == 0
    one = capfd.readouterr().out
    assert one.startswith("ab")
    assert main([*given, "--prompt", "ab", "cd", "--stream", "true"]) == 0
    out = capfd.readouterr().out
    assert out.startswith(f"--- --prompt 1\n{one}--- --prompt 2\ncd")


def test_a_conversation(
    model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["hi", "", "x" * 60, "/reset", "hi", "/exit", "never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["--model", str(model), "--interactive", "--max_tokens", "4"]) == 0
    out, err = capfd.readouterr()
    first, second = out.splitlines()
    assert first == second
    assert "the model's context is 48. Start a new" in err
    assert "The answer was cut off by --max_tokens." in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_ctrl_c_stops_the_answer_and_other_signals_the_conversation(
    number: signal.Signals,
    code: int,
    model: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = chat_session.continuations

    def signalled(*args: Any) -> Iterator[Any]:
        for update in whole(*args):
            yield update
            os.kill(os.getpid(), number)

    monkeypatch.setattr(chat_session, "continuations", signalled)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/exit\n"))
    assert main(["--model", str(model), "--interactive", "--max_tokens", "4"]) == code
    assert ("The answer was cut off by Ctrl-C." in capfd.readouterr().err) == (code == 0)


def test_mistakes_are_one_line(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = str(model)
    assert "--model is missing" in refused(capfd, "--prompt", "x")
    assert "There is no prompt" in refused(capfd, name)
    assert "Leave --prompt and --file out" in refused(capfd, name, "--interactive", "--prompt", "x")
    assert "'Once' belongs to no flag; give texts to continue with --prompt." in refused(
        capfd, name, "Once"
    )
    assert "--stop has an empty text" in refused(capfd, name, "--prompt", "x", "--stop", "a", "")
    assert "did you mean --temperature" in refused(capfd, name, "--temperatur", "1")
    assert "has 61 tokens, and the model's context is 48" in refused(
        capfd, name, "--prompt", "x" * 60
    )
    Path("empty.txt").touch()
    assert "has no prompts" in refused(capfd, name, "--file", "empty.txt")
    assert "--temperature must be at least 0" in refused(
        capfd, name, "--prompt", "x", "--temperature", "-1"
    )
    assert "--mesh tensor=3 is for 3 devices" in refused(
        capfd, name, "--prompt", "x", "--mesh", "tensor=3"
    )
    assert "Use the axis tensor or fsdp" in refused(
        capfd, name, "--prompt", "x", "--mesh", "context=8"
    )
    assert "nowhere" in refused(capfd, "nowhere", "--prompt", "x")
    own = ["--prompt", "x", "--output", f"{name}/model.safetensors"]
    assert "is a file of the model" in refused(capfd, name, *own)
    own[-1] = name
    assert "is the directory of the model" in refused(capfd, name, *own)
    capfd.readouterr()
    opens = Path.open

    def full(path: Path, *given: Any, **named: Any) -> Any:
        if path.name == "out.partial":
            return opens(Path("/dev/full"), "w", encoding="utf-8")
        return opens(path, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", full)
        assert main([name, "--prompt", "x", "--max_tokens", "2", "--output", "out"]) == 2
    assert "No space left on device" in capfd.readouterr().err
    assert not Path("out").exists()
