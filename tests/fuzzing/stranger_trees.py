"""A search for directory trees that make a command touch what lies outside of them.

    python tests/fuzzing/stranger_trees.py --trees 10000 --seed 1 --output record.json

A tree is a run, a finished run, a token store, an unfinished one, a model, an adapter, a study or a
corpus in which a stranger has changed some entries: links to files elsewhere, pipes, sockets, devices, huge files,
names with escapes, hard links, paths inside JSON and YAML. The command that would use the
tree then runs on it. It must end in time, with one of its own exit codes, without a traceback or a
control character; what lies outside must not be opened (inotify sees this, also for libraries in C
and Rust) or changed.

So that a tree takes a third of a second and not four, most commands run one after another in a
process that stays (`warm_process`), and `consyn-train` stops there where it would compile its step:
it reads nothing of the tree after that. Every hundredth tree, or as --to_end says, gets a process
of its own, in which the command goes on to its end. What breaks something in the process that
stays is tried again in one of its own and counts if it breaks something there; otherwise the record
has it under "not_alone".

Left out: adapters, which name their base model wherever it is, and questions to a run that by
design read what the run names (`--verify`, `--documents_of`, `--replay_step`) get no paths to the
outside written into their files, only links.

Several searches with different seeds may go on at once; --merge makes one record of theirs.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stranger_changes import change
from warm_process import Command, Ended, WarmProcess, run_forked

SECRET = "a-secret-that-lies-outside"
WOULD_TRAIN = 99  # exit code of a command that stops before it compiles
CODES = {0, 2, 3, 4, 75, 76, WOULD_TRAIN}
CPU_S = 5.0  # of a command
STARTING_S = 20.0  # more, in a new process that has to start and compile
COMMANDS = 200  # in one process
NAMED = ("--verify", "--documents_of", "--replay_step")  # they read what the run names
MODEL = "--model haiku --hidden_dim 32 --num_heads 2 --num_layers 1 --tokenizer bytes"
TRAIN = (
    f"{MODEL} --max_steps 6 --max_tokens 32 --batch_size 8 --logging_steps 1 --eval_steps 3 "
    "--save_steps 2 --logging_backend none --validation_fraction 0.2 --num_workers 0"
).split()
TUNE = [
    "--search",
    "lr=1e-3,1e-2",
    "--sampler",
    "grid",
    "--pruner",
    "none",
    "--metric",
    "eval/loss",
    "--trials",
    "2",
]
GENERATE = ["--prompt", "Document", "--max_tokens", "4", "--temperature", "0"]
IN_OPEN, IN_ACCESS, IN_MODIFY, IN_ATTRIB, IN_MOVE, IN_CREATE, IN_DELETE = (
    0x20, 0x1, 0x2, 0x4, 0xC0, 0x100, 0x200,
)  # fmt: skip
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass
class Kind:
    """A tree and the commands that use it.

    Attributes:
        seed: the tree as we made it.
        commands: argv of a command, by its name and words that tell it from others; TREE is
            replaced by the tree.
        big: size in bytes of a huge sparse file, which a reader of documents would have to read.
        names_others: whether its files name others that are read.
    """

    seed: Path
    commands: dict[str, list[str]]
    big: int = 1 << 40
    names_others: bool = False


@dataclass
class Broken:
    """What a command did that it must not do."""

    kind: str
    number: int
    changes: list[str]
    what: list[str]
    said: str = field(repr=False)


class Outside:
    """Files that no command may touch, and who has."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        for name in ("secret.txt", "secret.json", "model.safetensors", "config.json"):
            (place / name).write_text(json.dumps({"text": SECRET}) + "\n")
        (place / "directory").mkdir()
        (place / "directory" / "secret.txt").write_text(SECRET)
        libc = ctypes.CDLL(None, use_errno=True)
        self._inotify = libc.inotify_init1(os.O_NONBLOCK)
        mask = IN_OPEN | IN_ACCESS | IN_MODIFY | IN_ATTRIB | IN_MOVE | IN_CREATE | IN_DELETE
        for watched in (place, place / "directory"):
            assert libc.inotify_add_watch(self._inotify, str(watched).encode(), mask) >= 0
        self.before = self._state()
        self.touched()

    def _state(self) -> dict[str, tuple[int, int, str]]:
        found = {}
        for path in sorted(self.place.rglob("*")):
            status = path.stat()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            found[str(path)] = (status.st_mode, status.st_mtime_ns, content)
        return found

    def touched(self) -> list[str]:
        """What was opened or changed since the last call."""
        try:
            events = os.read(self._inotify, 1 << 20)
        except BlockingIOError:
            events = b""
        names, at = set(), 0
        while at < len(events):
            mask, length = (
                int.from_bytes(events[at + i : at + i + 4], sys.byteorder) for i in (4, 12)
            )
            name = events[at + 16 : at + 16 + length].rstrip(b"\0").decode()
            if not (mask & 0x40000000 and not mask & ~0x40000021):  # a directory listed by us
                names.add(f"outside/{name}: event {mask:#x}")
            at += 16 + length
        after = self._state()
        if after != self.before:
            names.add("outside is changed")
            self.before = after
        with suppress(BlockingIOError):
            os.read(self._inotify, 1 << 20)  # our own reading
        return sorted(names)


# ------------------------------------------------------------------------------------- the commands


def commands() -> dict[str, Command]:
    """The commands by name; all that they import is imported."""
    import gguf  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import PIL.Image

    from consyn_jax.cli import convert, evaluate, generate, prepare, report, train, tune
    from consyn_jax.tuning.optuna_study import import_optuna

    PIL.Image.init()
    import_optuna()
    rooms = (train, prepare, generate, evaluate, convert, report, tune)
    return {room.__name__.rpartition(".")[2]: room.main for room in rooms}


def stop_before_compiling() -> None:
    """Let `consyn-train` end where it would take steps, and compile none."""
    from consyn_jax.training import loop

    def stop(self: object, *_: object) -> None:
        raise SystemExit(WOULD_TRAIN)

    loop.Training._train = stop  # type: ignore[assignment,method-assign]
    loop.compile_to_fit = lambda *_: None  # type: ignore[assignment,return-value]


def killed_at_a_journal(prepare: Command, argv: list[str]) -> int:
    """Prepare, and be killed after the first journal is written."""
    from consyn_jax.data.preparation import build
    from consyn_jax.data.preparation.journal import Journal

    write = Journal.write

    def once(self: Journal, path: Path) -> None:
        write(self, path)
        os.kill(os.getpid(), signal.SIGKILL)

    Journal.write = once  # type: ignore[method-assign]
    build.JOURNAL_SECONDS = 0.0
    return prepare(argv)


def make_kinds(place: Path, call: dict[str, Command]) -> dict[str, Kind]:
    """Make each kind of tree, with the commands themselves."""
    corpus = place / "corpus"
    corpus.mkdir()
    lines = [
        json.dumps({"text": f"Document {i} says {'so ' * (i % 6 + 1)}and ends."}) for i in range(70)
    ]
    (corpus / "a.jsonl").write_text("\n".join(lines) + "\n")
    (corpus / "b.txt").write_text("A text that stands alone.\n" * 20)
    (corpus / "more").mkdir()
    (corpus / "more" / "c.csv").write_text("text,n\n" + "a row of a table,1\n" * 30)

    def made(name: str, *argv: object) -> None:
        words = [*map(str, argv)]
        code, _, said = run_forked(lambda: call[name](words), place / "said", 600)
        assert code == 0, said

    data = corpus / "a.jsonl"
    made("train", *TRAIN, "--data", data, "--output", place / "whole")
    shutil.copytree(place / "whole", place / "stopped")
    for gone in ("final", "report.html", "loss.png", "checkpoints/6"):
        path = place / "stopped" / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    log = place / "stopped" / "metrics.jsonl"
    kept = [line for line in log.read_text().splitlines(True) if json.loads(line)["step"] <= 4]
    log.write_text("".join(kept))
    adapted = ["--checkpoint", place / "whole" / "final", "--lora_rank", "2"]
    made("train", *TRAIN, *adapted, "--data", data, "--output", place / "adapted")
    made("tune", *TRAIN, *TUNE, "--data", data, "--output", place / "study")
    prepared = ["--data", str(data), "--tokenizer", "bytes", "--num_workers", "0"]
    made("prepare", *prepared, "--output", place / "store")
    stopped = run_forked(
        lambda: killed_at_a_journal(call["prepare"], [*prepared, "--output", str(place / "half")]),
        place / "said",
    )
    assert stopped.code == -signal.SIGKILL, stopped.said
    resumed = [*TRAIN, "--data", str(data), "--output", "TREE"]
    fresh = [*TRAIN, "--output", "NEW"]
    return {
        "stopped run": Kind(
            place / "stopped",
            {
                "train": resumed,
                "generate": ["TREE", *GENERATE],
                "convert": ["TREE", "--to", "hf", "--output", "NEW"],
            },
        ),
        "finished run": Kind(
            place / "whole",
            {
                "train": resumed,
                "generate": ["TREE", *GENERATE],
                "convert": ["TREE", "--to", "hf", "--output", "NEW"],
                "report": ["TREE", "--output", "NEW"],
                "train --verify": ["--verify", "TREE"],
                "train --documents_of": ["--output", "TREE", "--documents_of", "2:4"],
                "train --replay_step": ["--output", "TREE", "--replay_step", "5"],
            },
        ),
        "model": Kind(
            place / "whole" / "final",
            {
                "train": [*TRAIN, "--checkpoint", "TREE", "--data", str(data), "--output", "NEW"],
                "generate": ["TREE", *GENERATE],
                "evaluate": ["TREE", "--data", str(data)],
                "convert": ["TREE", "--to", "gguf", "--output", "NEW"],
            },
        ),
        "adapter": Kind(
            place / "adapted" / "final",
            {
                "generate": ["TREE", *GENERATE],
                "convert": ["TREE", "--to", "hf", "--merge_lora", "--output", "NEW"],
            },
            names_others=True,
        ),
        "study": Kind(
            place / "study",
            {"tune": [*TRAIN, *TUNE, "--data", str(data), "--output", "TREE"]},
        ),
        "store": Kind(
            place / "store",
            {
                "train": [*fresh, "--data", "TREE"],
                "prepare": [*prepared, "--output", "TREE"],
            },
        ),
        "unfinished store": Kind(place / "half", {"prepare": [*prepared, "--output", "TREE"]}),
        "corpus": Kind(
            corpus,
            {
                "train": [*fresh, "--data", "TREE"],
                "prepare": [
                    *("--data", "TREE", "--tokenizer", "bytes", "--num_workers", "0"),
                    *("--output", "NEW"),
                ],
            },
            big=1 << 22,
        ),
    }


class Search:
    """Trees one after another, with a record of how the commands ended.

    Attributes:
        ended: how often each command ended with each exit code.
        broken, not_alone: what broke something; the latter only in a process that had run others.
    """

    def __init__(self, place: Path, seed: int, every: int) -> None:
        self.place, self.seed, self.every = place, seed, every
        self.call = commands()
        self.kinds = make_kinds(place, self.call)
        self.outside = Outside(place / "outside")
        self.warm = WarmProcess(self.call, stop_before_compiling, COMMANDS)
        self.ended: Counter[str] = Counter()
        self.broken: list[Broken] = []
        self.not_alone: list[Broken] = []
        self.began = time.monotonic()

    def attempt(self, number: int, alone: bool = False) -> Broken | None:
        """Make one tree, run a command on it, and note how it ended."""
        to_end = number % self.every == 0
        alone = alone or to_end
        name, verb, argv, changes = self._make(number)
        new = verb not in self.warm.known or alone
        self.outside.touched()
        ended = self._run(verb.partition(" ")[0], argv, alone, to_end)
        what = faults(ended, CPU_S + (STARTING_S if new else 0.0)) + self.outside.touched()
        found = Broken(f"{name}: {verb}", number, changes, what, ended.said) if what else None
        if found and not alone:
            again = self.attempt(number, alone=True)
            self.not_alone += [] if again else [found]
            return again
        self.ended[f"{name}: {verb}: exit code {ended.code}"] += 1
        self.broken += [found] if found else []
        return found

    def _make(self, number: int) -> tuple[str, str, list[str], list[str]]:
        """A tree: its kind, the command, its argv, and the changes."""
        draw = random.Random(f"{self.seed}-{number}")
        pairs = [(name, verb) for name, kind in self.kinds.items() for verb in kind.commands]
        name, verb = draw.choice(pairs)
        kind = self.kinds[name]
        for old in self.place.glob("work-*"):
            shutil.rmtree(old)
        work = self.place / f"work-{number}"
        (work / "new").mkdir(parents=True)
        shutil.copytree(kind.seed, work / "tree")
        names = not (verb.endswith(NAMED) or kind.names_others)
        changes = [
            change(work / "tree", self.outside.place, kind.big, names, draw)
            for _ in range(draw.choice([1, 1, 2, 3, 5]))
        ]
        paths = {"TREE": str(work / "tree"), "NEW": str(work / "new" / "output")}
        return name, verb, [paths.get(word, word) for word in kind.commands[verb]], changes

    def _run(self, verb: str, argv: list[str], alone: bool, to_end: bool) -> Ended:
        if not alone:
            return self.warm.run(verb, argv, self.place / "said")

        def run() -> int:
            if not to_end:
                stop_before_compiling()
            return self.call[verb](argv)

        return run_forked(run, self.place / "said")

    def record(self, trees: int) -> dict[str, Any]:
        """What was found so far."""
        return {
            "trees": trees,
            "seed": self.seed,
            "seconds": round(time.monotonic() - self.began),
            "broken": [as_json(each) for each in self.broken],
            "not_alone": [as_json(each) for each in self.not_alone],
            "ended": dict(sorted(self.ended.items())),
        }


def faults(ended: Ended, limit_s: float) -> list[str]:
    """What is wrong about how a command ended."""
    checks = {
        "no end": ended.code == -signal.SIGKILL,
        f"exit code {ended.code}": ended.code not in {*CODES, -signal.SIGKILL},
        "traceback": "Traceback" in ended.said,
        "control character": CONTROL.search(ended.said) is not None,
        "secret told": SECRET in ended.said,
        f"{ended.cpu_s:.0f} s of processor time": ended.cpu_s > limit_s,
    }
    return [what for what, is_so in checks.items() if is_so]


def as_json(broken: Broken) -> dict[str, Any]:
    """What a record says of it."""
    said = broken.said[-1000:].encode(errors="backslashreplace").decode()
    names = [change.encode(errors="backslashreplace").decode() for change in broken.changes]
    about = {"kind": broken.kind, "number": broken.number, "changes": names}
    return {**about, "what": broken.what, "said": said}


def merged(files: list[Path]) -> dict[str, Any]:
    """One record of several searches."""
    parts = [json.loads(file.read_text()) for file in files]
    ended: Counter[str] = Counter()
    for part in parts:
        ended.update(part["ended"])
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "jax": version("jax"),
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "trees": sum(part["trees"] for part in parts),
        "seeds": [part["seed"] for part in parts],
        "seconds": [part["seconds"] for part in parts],
        **{key: [each for part in parts for each in part[key]] for key in ("broken", "not_alone")},
        "ended": dict(sorted(ended.items())),
    }


def main() -> int:
    """Search, and return 1 if something broke."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trees", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to_end", type=int, default=100, help="one tree of so many to the end")
    parser.add_argument("--only", type=int, help="the number of one tree, whose output is shown")
    parser.add_argument("--output", type=Path, help="a JSON file for the record")
    parser.add_argument("--merge", type=Path, nargs="+", help="records of which to make one")
    arguments = parser.parse_args()
    if arguments.merge:
        arguments.output.write_text(json.dumps(merged(arguments.merge), indent=1) + "\n")
        return 0
    os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="1")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        place = Path(folder)
        os.environ["CONSYN_CACHE"] = str(place / "cache")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(place / "programs")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        search = Search(place, arguments.seed, arguments.to_end)
        numbers = range(arguments.trees) if arguments.only is None else [arguments.only]
        for done, number in enumerate(numbers, 1):
            found = search.attempt(number, alone=arguments.only is not None)
            if found:
                print(number, found.kind, found.what, *found.changes, sep="\n  ", flush=True)
            if found or arguments.only is not None:
                said = (place / "said").read_text(errors="backslashreplace")
                print("   ", said[-1500:].replace("\n", "\n    "), flush=True)
            if arguments.output and (done % 50 == 0 or done == len(numbers)):
                arguments.output.write_text(json.dumps(search.record(done), indent=1) + "\n")
        search.warm.close()
    count = len(search.broken)
    print(f"{count} of {len(numbers)} broke something, in {time.monotonic() - began:.0f} s.")
    for each in search.not_alone:
        print("only after other commands in the same process:", as_json(each))
    return bool(count)


if __name__ == "__main__":
    sys.exit(main())
