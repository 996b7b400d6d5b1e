"""Killed while they write, the commands leave nothing that a later one takes for whole."""

import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from consyn_jax.errors import UserError
from consyn_jax.files import refuse_unfinished
from consyn_jax.inference.model_source import find_source
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.pretrained.weights import find_model
from consyn_jax.model_config import ModelConfig
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.run.model_manifest import disagreement

from .nursery import Nursery

KILLS = 6
LATEST = 0.03  # seconds
CONFIG = ModelConfig(
    **{"vocab_size": 259, "hidden_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2},
    **{"head_dim": 8, "mlp_dim": 48, "context": 64, "qk_norm": False},
    **{"bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256},
)
# A moment is a number of file operations (Python's audit events) on paths of a pattern, and a delay
# after it, in which threads of TensorStore and the writes of safetensors go on.
WATCH = """
import atexit, os, re, signal, sys, threading
KINDS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
count, here = 0, os.getcwd()
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def hook(event, args):
    global count
    if event not in KINDS or not isinstance(args[0], (str, bytes, os.PathLike)):
        return
    path = os.path.realpath(os.fsdecode(args[0]))
    if not path.startswith(here + os.sep) or not re.search({part!r}, path[len(here):]):
        return
    count += 1
    if count == {event}:
        threading.Timer({delay}, kill).start() if {delay} else kill()
sys.addaudithook(hook)
atexit.register(lambda: print("events", count, flush=True))
"""


class Commands:
    """Runs commands, one at a time, and kills them at chosen moments.

    Attributes:
        directory: The current directory of the commands.
        part: Only file operations on paths with this regular expression count as moments.
        said: What the last command printed.
    """

    def __init__(self, nursery: Nursery, directory: Path) -> None:
        self._nursery, self.directory, self.part, self.said = nursery, directory, "", ""

    def run(self, command: str, *flags: object, event: int = 0, delay: float = 0.0) -> int:
        """Run `consyn-COMMAND`, and return its exit code; -SIGKILL if it was killed.

        Args:
            event: Kill it before this operation, counted from 1; 0: never.
            delay: Seconds after it, instead of before it.
        """
        before = WATCH.format(part=self.part, event=event, delay=delay)
        chosen = {"command": command, "directory": self.directory, "before": before}
        child = self._nursery.start(*flags, devices=1, **chosen)
        code = child.wait()
        self.said = child.said
        assert code in (0, 2, -signal.SIGKILL), self.said
        return code

    @property
    def events(self) -> int:
        """The file operations of the last command, which came to its end."""
        return int(self.said.split()[-1])


def tree(path: Path) -> dict[str, bytes]:
    """A file or all files of a directory, by name."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.fixture
def commands(nursery: Nursery, tmp_path: Path) -> Commands:
    """In an empty directory."""
    (tmp_path / "place").mkdir()
    return Commands(nursery, tmp_path / "place")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    made = ConsynLMHeadModel.from_config(CONFIG)
    path = tmp_path / "model"
    made.save_pretrained(path, BPETokenizer.bytes())
    return path


def moments(events: int, seed: int) -> list[tuple[int, float]]:
    """Random operations and delays after them; the first half has none, so it is killed for sure."""
    draws = np.random.default_rng(seed)
    chosen = draws.integers(1, events, KILLS - 1, endpoint=True)
    delays = draws.uniform(0, LATEST, KILLS) * (np.arange(KILLS) >= KILLS // 2)
    return list(zip([events, *chosen.tolist()], delays.tolist(), strict=True))


def train(commands: Commands, model: Path, run: Path, *flags: object, event: int = 0) -> int:
    """Two steps from `model`, each with a checkpoint."""
    text = run.with_name("text.txt")
    text.write_text(
        "".join(f"{number} green bottles hang on the wall.\n\n" for number in range(64))
    )
    argv = ["--checkpoint", model, "--data", text, "--output", run, "--max_steps", 2]
    argv += ["--max_tokens", 32, "--batch_size", 4, "--validation_fraction", 0.2, "--lr", 1e-2]
    argv += ["--eval_steps", 1, "--save_steps", 1, "--logging_backend", "none", "--quiet"]
    return commands.run("train", *argv, *flags, event=event)


def source_of(commands: Commands, model: Path, takes: str, run: Path) -> list[object]:
    """The words of `consyn-convert` that name what is converted."""
    if takes == "a directory":
        return [model]
    flags = ["--lora_rank", 4] if takes == "an adapter" else []
    assert train(commands, model, run, *flags) == 0, commands.said
    return [run, "--merge_lora"] if flags else [run, "--average", 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("takes", "to"),
    [
        ("a directory", "hf"),
        ("a directory", "orbax"),
        ("a directory", "gguf"),
        ("checkpoints", "hf"),
        ("an adapter", "hf"),
    ],
)
def test_a_conversion(commands: Commands, model: Path, tmp_path: Path, takes: str, to: str) -> None:
    if to == "gguf":
        pytest.importorskip("gguf")
    place, name = commands.directory, "out.gguf" if to == "gguf" else "out"
    out, unfinished = place / name, place / f".{name}.new"
    # Several shards, so that there is a moment with some of them.
    more = ["--shard_size", "20K"] if to == "hf" else []
    source = source_of(commands, model, takes, tmp_path / "run")
    flags = [*source, "--to", to, *more, "--output", name]
    killed = 0
    commands.part = name
    assert commands.run("convert", *flags) == 0, commands.said
    whole = tree(out)
    shutil.move(out, tmp_path / name)
    for event, delay in moments(commands.events, seed=len(to)):
        code = commands.run("convert", *flags, event=event, delay=delay)
        killed += code == -signal.SIGKILL
        assert {path.name for path in place.iterdir()} <= {out.name, unfinished.name}
        if out.exists():  # the kill came after it got its name
            assert_whole(out, tmp_path / name, to)
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        else:
            assert code == -signal.SIGKILL, commands.said
        if unfinished.is_dir():
            refused(unfinished)
    assert killed >= KILLS // 2
    assert commands.run("convert", *flags) == 0, commands.said
    assert [path.name for path in place.iterdir()] == [name]
    assert tree(out).keys() == whole.keys() or to == "orbax"  # it names files by chance
    assert_whole(out, tmp_path / name, to)


def assert_whole(out: Path, expected: Path, to: str) -> None:
    if to == "gguf":
        assert tree(out) == tree(expected)
        return
    assert disagreement(out) is None
    found, wanted = (find_source(path) for path in (out, expected))
    assert found.tokenizer is not None
    jax.tree.map(np.testing.assert_array_equal, found.parameters(), wanted.parameters())


def refused(path: Path, name: str = "out") -> None:
    """By every way in which commands find a model."""
    for find in (find_source, find_model, ConsynLMHeadModel.from_pretrained):
        with pytest.raises(UserError, match=f"was killed while it wrote or removed {name}"):
            find(str(path))


@pytest.mark.slow
def test_the_exports_of_a_run(commands: Commands, model: Path, tmp_path: Path) -> None:
    """Killed while best/ is written, and again with final/: each is whole or absent, and the same
    command ends as if nothing had been."""
    run, whole = commands.directory / "run", tmp_path / "run"
    assert train(commands, model, run) == 0, commands.said
    shutil.move(run, whole)
    draws = np.random.default_rng(0)
    for name in ("best", "final"):
        commands.part = rf"/run/\.?{name}\b"
        event = int(draws.integers(1, len(tree(whole / name)), endpoint=True))  # each is opened
        assert train(commands, model, run, event=event) == -signal.SIGKILL, commands.said
        exports = [path for path in (run / "best", run / "final") if path.exists()]
        assert [disagreement(path) for path in exports] == [None] * len(exports)
        for unfinished in run.glob(".*.new"):
            refused(unfinished, name)
    assert train(commands, model, run) == 0, commands.said
    assert not [*run.glob(".*.new")]
    for name in ("best", "final"):
        assert_whole(run / name, whole / name, "hf")


@pytest.mark.slow
def test_generated_texts(commands: Commands, model: Path, tmp_path: Path) -> None:
    place = commands.directory
    out, partial = place / "out.jsonl", place / "out.jsonl.partial"
    prompts = [{"prompt": "a" * (1 + n % 7)} for n in range(12)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    flags = [model, "--file", tmp_path / "p.jsonl", "--max_tokens", 6, "--batch_size", 2]
    flags += ["--output", out.name]
    killed = 0
    commands.part = out.name
    assert commands.run("generate", *flags) == 0, commands.said
    whole, events = out.read_bytes(), commands.events
    assert whole.count(b"\n") == len(prompts)
    # after the first one, texts are generated
    kills = [*moments(events, seed=0), (1, 0.1), (1, 0.3), (1, 0.6)]
    for number, (event, delay) in enumerate(kills):
        old = b"old\n" if number % 2 else None
        out.unlink(missing_ok=True)
        if old is not None:
            out.write_bytes(old)
        code = commands.run("generate", *flags, event=event, delay=delay)
        killed += code == -signal.SIGKILL
        content = out.read_bytes() if out.exists() else None
        assert content in (whole, old)
        assert content == whole or code == -signal.SIGKILL
        if partial.exists():
            assert whole.startswith(partial.read_bytes())
    assert killed >= KILLS // 2
    assert commands.run("generate", *flags) == 0, commands.said
    assert tree(place) == {out.name: whole}


def test_no_command_takes_what_is_not_finished(tmp_path: Path) -> None:
    for name in (".out.new", ".out.0123456789abcdef.new", ".out.0123456789abcdef.gone"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        (tmp_path / name).mkdir()
        refused(tmp_path / name)
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / name)
        with pytest.raises(UserError, match="Run that command again"):
            refuse_unfinished(tmp_path / "link")
    refuse_unfinished(tmp_path / ".out.0123456789abcdef.old")  # whole, and replaced
    refuse_unfinished(tmp_path / "new")
