"""The commands and the Python of README and docs, run page by page on tiny stand-ins.

Each page's commands run in its order, in a directory that has what the page assumes: folders of
text, rows, runs. Flags are added that make the model and the run small; the page's own remain. What
cannot run here is listed with the test that covers it.
"""

import csv
import dataclasses
import fcntl
import gzip
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "tokenization"))
from documented_commands import FENCE, PAGES, ROOT, Command, commands, filled_in
from published import chat_model

from consyn_jax.config import RunConfig
from consyn_jax.flags import flags
from consyn_jax.model_config import ModelConfig
from consyn_jax.resolve import preset_architecture
from consyn_jax.training import dataset as datasets
from consyn_jax.training.run import ending

pytestmark = [pytest.mark.slow, pytest.mark.torch]

SMALL = ["--hidden_dim", "32", "--num_layers", "1", "--num_heads", "2", "--num_kv_heads", "2"]
SMALL += ["--head_dim", "16", "--mlp_dim", "64"]
SHORT = ["--max_steps", "5", "--max_tokens", "64", "--batch_size", "8", "--warmup_steps", "1"]
SHORT += ["--gradient_accumulation_steps", "1", "--save_steps", "1", "--keep_last", "5", "--quiet"]
STAND_INS = {"Qwen/Qwen3-0.6B": "qwen3", "gpt2/tokenizer.json": "qwen3/tokenizer.json"}
STAND_INS |= {"120": "2", "20:24": "2:3", "epic-64xh200": "epic-64xh200"}

# Commands that do not run here, by a part of them: what they need, and the test that covers them.
ELSEWHERE = {
    "roneneldan/TinyStories": "the Hub: tests/data/sources/huggingface/test_hub.py",
    "Salesforce/wikitext": "the Hub: tests/data/sources/huggingface/test_hub.py",
    "allenai/c4": "the Hub: tests/data/sources/huggingface/test_hub.py",
    "--push_to_hub": "the Hub: tests/inference/conversion/test_hub_upload.py",
    "--distributed": "several processes: tests/integration/test_processes.py",
    "--engine ray": "Ray: tests/integration/test_ray.py",
    "s3://": "buckets: tests/integration/test_buckets.py",
    "--watch": "a server that does not end: tests/reporting/test_runs_page.py",
    "OUTPUT/nonfinite": "a diverged run: tests/integration/test_nonfinite.py",
    "my_trackers": "MLflow and Aim: tests/integration/test_documented_trackers.py",
    "consyn-tune": "many runs: tests/integration/test_tune.py",
    "runs/study/recipe.yaml": "the result of a study: tests/integration/test_tune.py",
    "--to gguf": "the package gguf: tests/inference/conversion/test_gguf.py",
}
PYTHON_ELSEWHERE = {
    "import mlflow": "tests/integration/test_documented_trackers.py",
    "import aim": "tests/integration/test_documented_trackers.py",
    "llama_cpp": "tests/inference/conversion/test_gguf.py",
}


def rows(path: Path, lines: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def text(i: int) -> str:
    return f"Page {i} says that the run {'goes on and ' * (i % 5 + 1)}ends well.\n"


def chat(i: int) -> list[dict[str, str]]:
    said = {"user": f"Where is my parcel {i}?", "assistant": f"Number {i} is on its way."}
    return [{"role": role, "content": content} for role, content in said.items()]


def write_inputs(here: Path) -> None:
    """What the pages assume that the reader has."""
    for folder in ("notes", "corpus", "books", "web", "held-out", "dumps/a"):
        for i in range(40 if folder in ("notes", "corpus", "web", "books") else 4):
            (here / folder).mkdir(parents=True, exist_ok=True)
            (here / folder / f"{i}.md").write_text(f"# {folder} {i}\n\n" + text(i) * 20)
    for page in (ROOT / "docs").glob("*.md"):  # enough text for a vocabulary of its own
        shutil.copy(page, here / "notes")
    with gzip.open(here / "dumps" / "a" / "b.txt.gz", "wt") as file:
        file.write(text(1) * 9)
    with gzip.open(here / "enwik8.gz", "wt") as file:
        file.write("</page>".join(text(i) * 5 for i in range(30)))
    (here / "stories.txt").write_text("\n\n\n".join(text(i) for i in range(30)))
    (here / "wikitext").mkdir()
    (here / "wikitext" / "test.txt").write_text(text(3) * 30)
    rows(here / "pages.jsonl", [{"page": {"body": text(i)}} for i in range(30)])
    asked = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(40)]
    rows(here / "gsm8k_train.jsonl", asked)
    alpaca = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(40)]
    (here / "alpaca.json").write_text(json.dumps(alpaca))
    with (here / "answers.csv").open("w", newline="") as table:
        writer = csv.DictWriter(table, ["question", "answer"])
        writer.writeheader()
        writer.writerows(asked)
    chats = [chat(i) for i in range(300)]
    rows(here / "chats.jsonl", [{"messages": chat} for chat in chats])
    other = [{"role": "assistant", "content": "No idea."}]
    pairs = [{"prompt": c[:1], "chosen": c[1:], "rejected": other} for c in chats[:60]]
    rows(here / "pairs.jsonl", pairs)
    choices = {"context": "The sky is", "choices": [" blue", " late"], "gold": 0}
    for name in ("arc", "lambada"):
        rows(here / f"{name}.jsonl", [choices] * 4)
    rows(here / "gsm8k.jsonl", [{"prompt": "What is 1 + 1?", "answer": "#### 2"}] * 2)
    (here / "prompts.txt").write_text("The run\nA page\n")
    rows(here / "questions.jsonl", [{"messages": chats[0][:1]}, {"prompt": "The run"}])
    import numpy as np
    from datasets import Dataset

    Dataset.from_dict({"text": [text(i) for i in range(30)]}).save_to_disk(here / "saved")
    (here / "data" / "openwebtext").mkdir(parents=True)
    for name, count in (("train", 4000), ("val", 400)):
        ids = np.random.default_rng(0).integers(0, 300, count).astype(np.uint16)
        ids.tofile(here / "data" / "openwebtext" / f"{name}.bin")
    (here / "configs").symlink_to(ROOT / "configs")
    for kind in ("qwen3", "llama-8b"):
        (here / kind).mkdir()
        chat_model(here / kind, "Qwen3" if kind == "qwen3" else "Llama")
        config = json.loads((here / kind / "config.json").read_text())
        config["max_position_embeddings"] = 4096
        (here / kind / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def world(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Inputs, and runs that pages speak of without training them: one for all workers of pytest."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        with (place / "documented.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (place / "documented.made").exists():
                make_world(place / "documented")
                (place / "documented.made").touch()
        yield place / "documented"


def make_world(here: Path) -> None:
    shutil.rmtree(here, ignore_errors=True)  # of a worker that failed
    here.mkdir()
    write_inputs(here)
    from consyn_jax.cli import prepare, train

    def run(command: Any, *words: str) -> None:
        assert command.main(list(words)) == 0, words

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(ending, "sample", lambda *_: "A sample that no model generated.")
        run(prepare, "--data", "corpus", "--tokenizer", "bytes", "--output", "tokens")
        plain = ["--logging_backend", "none", *SHORT]
        run(train, "--data", "tokens", "--output", "runs/verse", *SMALL, *plain)
        tuned = ["--checkpoint", "qwen3", "--data", "chats.jsonl", *plain]
        run(train, *tuned, "--output", "runs/support")
        run(train, *tuned, "--lora_rank", "16", "--output", "runs/adapter")
        for name in ("notes", "stanza", "a", "b"):
            shutil.copytree("runs/verse", f"runs/{name}")
        shutil.copytree("runs/support", "runs/chat")
        shutil.copytree("runs/verse", "output")


def is_elsewhere(command: Command) -> bool:
    words = f"{command.name} {' '.join(command.arguments)}"
    return any(part in words for part in ELSEWHERE)


def reduced(command: Command, number: int) -> list[str]:
    """The arguments of a command, with flags that make it small."""
    words = [STAND_INS.get(word, word) for word in command.arguments]
    words = filled_in(tuple(words), flags(RunConfig)) if command.name == "consyn-train" else words
    if command.name == "consyn-generate":
        return [*words, "--max_tokens", "4"]
    if command.name == "consyn-prepare" and "--num_workers" not in words:
        return [*words, "--num_workers", "0"]
    if command.name == "consyn-doctor":
        return [*words, "--quick"]
    if command.name == "consyn-report":
        return [
            str(p) for word in words for p in (sorted(Path().glob(word)) if "*" in word else [word])
        ]
    if command.name != "consyn-train" or {"--print_config", "--documents_of", "--verify"} & {
        *words
    }:
        return words
    if "--dry_run" in words and "--topology" in words:
        return words
    is_new = not ({"--checkpoint", "qwen3"} & {*words})
    short = SHORT[2:] if "--lr_find" in words else SHORT
    text = "notes" if "--config" in words else "tokens"
    more = [] if "--data" in words else ["--data", text]
    more += ["--validation", "held-out"] if "--eval_requests" in words else []
    more += [] if "--output" in words else ["--output", f"runs/unnamed-{number}"]
    return [*words, *more, *(SMALL if is_new else []), *short]


def python_blocks(page: Path) -> Iterator[str]:
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        if match["language"] == "python" and not any(p in match["text"] for p in PYTHON_ELSEWHERE):
            yield match["text"]


RUN = [
    page
    for page in PAGES
    if any(True for _ in python_blocks(page)) or any(not is_elsewhere(c) for c in commands(page))
]


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(
    page: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    shutil.copytree(world, here, symlinks=True)
    monkeypatch.chdir(here)
    for number, command in enumerate(commands(page)):
        if is_elsewhere(command):
            continue
        words = reduced(command, number)
        _clear(command)
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/exit\n"))
        code = command.module.main(words)
        assert code == 0, f"{command.place}: {command.name} {' '.join(words)}"
    names: dict[str, Any] = {}
    for block in python_blocks(page):
        run_python(block, names, monkeypatch)


def _clear(command: Command) -> None:
    """Remove what the world or an earlier command of the page has where this one writes."""
    words = command.arguments
    if {"--documents_of", "--verify", "--dry_run"} & {*words} or "--output" not in words:
        return
    if command.name in ("consyn-prepare", "consyn-train", "consyn-convert"):
        made = Path(words[words.index("--output") + 1])
        shutil.rmtree(made, ignore_errors=True)


def run_python(block: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a block of a page with what the blocks before it have defined, in small."""
    from consyn_jax.model import ConsynLMHeadModel
    from consyn_jax.tokenization import BPETokenizer
    from consyn_jax.training import ConsynTrainer

    train, build = ConsynTrainer.__init__, ConsynLMHeadModel.from_config

    def short(self: Any, *args: Any, **more: Any) -> None:
        more = {"max_steps": 2, "batch_size": 8, **more, "quiet": True, "overwrite": True}
        train(self, *args, **more)

    if "train_dataloader=dataset" in block and "dataset" not in names:
        names["ConsynTrainer"] = ConsynTrainer
        for name, split in (("dataset", "train"), ("held_out", "validation")):
            names[name] = datasets.get_dataset(
                "corpus", BPETokenizer.bytes(), 32, split=split, validation_fraction=0.1
            )
        names["model"] = small_model(ConsynLMHeadModel.from_config, 259)
    with monkeypatch.context() as patch:
        patch.setattr(ConsynTrainer, "__init__", short)
        patch.setattr(ConsynLMHeadModel, "from_config", lambda _: small_model(build))
        small = re.sub(r"\b(256|512)\b", "64", block.replace("/path/to/data", "corpus"))
        exec(compile(small, "a page", "exec"), names)


def small_model(build: Callable[[ModelConfig], Any], vocab_size: int = 49_152) -> Any:
    return build(
        dataclasses.replace(
            preset_architecture("haiku", vocab_size),
            hidden_dim=32,
            num_layers=1,
            num_heads=2,
            num_kv_heads=2,
            head_dim=16,
            mlp_dim=64,
        )
    )


def test_what_does_not_run_here_is_covered_by_a_test_that_exists() -> None:
    places = [said.rpartition(": ")[2] for said in ELSEWHERE.values()]
    missing = [
        place for place in [*places, *PYTHON_ELSEWHERE.values()] if not (ROOT / place).is_file()
    ]
    assert missing == []
    found = {
        part
        for page in PAGES
        for c in commands(page)
        for part in ELSEWHERE
        if part in f"{c.name} {' '.join(c.arguments)}"
    }
    assert found == {*ELSEWHERE}
