"""Whole commands on tiny models."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from consyn_jax.cli.train import main

from .nursery import MODEL, nursery  # noqa: F401 - a fixture

TINY = [
    *MODEL,
    "--max_steps",
    "6",
    "--max_tokens",
    "32",
    "--batch_size",
    "8",
    "--logging_steps",
    "1",
    "--eval_steps",
    "3",
    "--save_steps",
    "2",
]
TRACKED, TINY = TINY, [*TINY, "--logging_backend", "none"]  # a second one would add to the first
CHANGING = re.compile(r"time_s|time/.*|throughput/.*|memory/.*")


@dataclass
class Run:
    """A run directory and what the command said."""

    path: Path
    code: int
    said: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def numbers(self) -> list[dict[str, Any]]:
        """What two runs of the same mathematics have in common: training and evaluation lines
        without clocks and memory."""
        return [
            {k: v for k, v in line.items() if not CHANGING.fullmatch(k)}
            for line in self.lines
            if "event" not in line
        ]

    @property
    def events(self) -> list[str]:
        return [line["event"] for line in self.lines if "event" in line]

    @property
    def weights(self) -> bytes:
        return (self.path / "final" / "model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where these tests keep token stores; every process that a test starts uses it, too."""
    path = tmp_path_factory.mktemp("integration")
    patch = pytest.MonkeyPatch()
    patch.setenv("CONSYN_CACHE", str(path / "cache"))
    yield path
    patch.undo()


@pytest.fixture(autouse=True)
def own_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSYN_CACHE", str(home / "cache"))


@pytest.fixture(scope="session")
def corpus(home: Path) -> Path:
    """Seventy short documents: an epoch of 7 to 8 steps of 8 x 32 tokens."""
    file = home / "corpus.jsonl"
    file.write_text(
        "".join(
            json.dumps({"text": f"Document {i} says {'so ' * (i % 6 + 1)}and ends."}) + "\n"
            for i in range(70)
        )
    )
    return file


def cannot_run(reason: str, *, is_asked_for: bool = False) -> NoReturn:
    """Skip a test, or fail where it must run: in CI, and where somebody asks for it."""
    if is_asked_for or os.environ.get("CI"):
        pytest.fail(f"{reason}, and this test must run here")
    pytest.skip(reason)


def command(*flags: object) -> list[str]:
    """`consyn-train` as a process."""
    return [sys.executable, "-m", "consyn_jax.cli.train", *map(str, flags)]


def start(flags: list[object], **env: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(*flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )


@pytest.fixture(scope="session")
def process(home: Path) -> Callable[..., Run]:
    """Run the command as a process of its own."""

    def run(path: Path, *flags: object, **env: str) -> Run:
        done = subprocess.run(
            command(*flags, "--output", path),
            capture_output=True,
            text=True,
            env={**os.environ, **env},
            timeout=600,
            check=False,
        )
        assert done.stdout == "", "what a person reads goes to stderr"
        return Run(path, done.returncode, done.stderr)

    return run


@pytest.fixture
def here(home: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Run the command in this process."""

    def run(path: Path, *flags: object) -> Run:
        capfd.readouterr()
        code = main([*map(str, flags), "--output", str(path)])
        return Run(path, code, capfd.readouterr().err)

    return run
