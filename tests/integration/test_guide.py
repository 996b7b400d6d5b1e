"""The training guide: its command lines and its example script, run as written on a model that a
CPU trains in seconds."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from consyn_jax.cli.train import main, read_arguments

from .conftest import Run

COMMANDS = r"""
# Train different model variants
consyn-train --model verse
consyn-train --model stanza
consyn-train --model epic

# Specify training data
consyn-train --data /path/to/dataset
consyn-train --dataset_type jsonl

# Customize training parameters
consyn-train --lr 3e-5 \
             --batch_size 16 \
             --gradient_accumulation_steps 2 \
             --max_tokens 2048
"""

SCRIPT = """
from consyn.training import ConsynTrainer
from consyn.model import ConsynLMHeadModel
from consyn.tokenization import BPETokenizer
from consyn.training.dataset import get_dataset

# Load model and tokenizer
model = ConsynLMHeadModel.from_pretrained('verse')
tokenizer = BPETokenizer()

# Prepare dataset
train_dataset = get_dataset(
    data_path='/path/to/data',
    tokenizer=tokenizer,
    block_size=2048
)

# Initialize trainer
trainer = ConsynTrainer(
    model=model,
    train_dataloader=train_dataset,
    output_dir='./output',
    num_epochs=3,
    learning_rate=5e-5
)

# Start training
trainer.train()
"""

LINES = [
    shlex.split(line)[1:]
    for line in COMMANDS.replace("\\\n", " ").splitlines()
    if line.startswith("consyn-train")
]
SMALL = [
    "--model",
    "haiku",
    "--tokenizer",
    "bytes",
    "--hidden_dim",
    "32",
    "--num_heads",
    "1",
    "--num_layers",
    "1",
    "--max_steps",
    "1",
]


def test_all_its_commands_are_here() -> None:
    assert len(LINES) == 6


@pytest.mark.parametrize("argv", LINES, ids=" ".join)
def test_a_command_is_understood(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv, "--print_config"]) == 0
    printed = capsys.readouterr().out
    settings = yaml.safe_load(printed)
    for flag, value in zip(argv[::2], argv[1::2], strict=True):
        assert re.search(rf"^{flag[2:]}: .* # flag$", printed, re.MULTILINE)
        assert settings[flag[2:]] in (
            value,
            [value],
            yaml.safe_load(value),
            float(value) if flag == "--lr" else None,
        )


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("argv", LINES, ids=" ".join)
def test_a_command_runs(
    argv: list[str], here: Callable[..., Run], corpus: Path, tmp_path: Path
) -> None:
    data = {"/path/to/dataset": str(corpus)}
    argv = [data.get(word, word) for word in argv]
    small = [*SMALL, *([] if "--max_tokens" in argv else ["--max_tokens", "32"])]
    if "--data" not in argv:
        small += ["--data", str(corpus) if "jsonl" in argv else "sample"]
    run = here(tmp_path / "run", *argv, *small)
    assert run.code == 0, run.said
    assert (run.path / "final" / "model.safetensors").is_file()
    config = read_arguments(["--config", str(run.path / "config.yaml")])[0]
    assert config.data.max_tokens == (2048 if "--max_tokens" in argv else 32)
    assert run.lines[1]["step"] == 1


def run_script(text: str, folder: Path, corpus: Path) -> Run:
    """The script in `folder`, on little data and for two steps of one short sequence."""
    changed = text.replace("learning_rate=5e-5", "learning_rate=5e-5, max_steps=2, batch_size=1")
    changed = changed.replace("block_size=2048", "block_size=64")
    (folder / "script.py").write_text(
        changed.replace("'verse'", "'haiku'").replace('"verse"', '"haiku"')
    )
    command = [sys.executable, "script.py", str(corpus)]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=env, timeout=600, check=False
    )
    return Run(folder / "output", done.returncode, done.stderr)


@pytest.mark.slow
def test_its_script_runs(corpus: Path, tmp_path: Path, home: Path) -> None:
    run = run_script(
        SCRIPT.replace("from consyn.", "from consyn_jax.").replace("/path/to/data", str(corpus)),
        tmp_path,
        corpus,
    )
    assert run.code == 0, run.said
    assert next(line["train/learning_rate"] for line in run.numbers if "train/loss" in line) <= 5e-5
    assert run.lines[-1]["event"] == "finish"
    assert {"config.yaml", "final", "checkpoints", "tokenizer", "report.html", "loss.png"} <= {
        entry.name for entry in run.path.iterdir()
    }


def test_the_script_in_the_repository_is_the_guides() -> None:
    text = (Path(__file__).parents[2] / "scripts" / "train_example.py").read_text()

    def statements(script: str) -> set[str]:
        plain = (
            script.replace("'", '"')
            .replace("from consyn.", "from consyn_jax.")
            .replace(",\n", "\n")
        )
        return {
            line.strip() for line in plain.splitlines() if line.strip() and "data_path" not in line
        }

    assert statements(SCRIPT) <= statements(text)
