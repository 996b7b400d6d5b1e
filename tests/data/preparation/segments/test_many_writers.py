"""Many writers make the bytes of one writer, whatever the data and wherever they were stopped."""

import csv
import gzip
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from consyn_jax.data.preparation import build
from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.data.preparation.segments import duplicates, engines, many_writers, phases, spans
from consyn_jax.data.preparation.segments.job import Job
from consyn_jax.data.preparation.segments.many_writers import TasksHere
from consyn_jax.data.preparation.workers import worker
from consyn_jax.data.sources import chunking, json_reader, reader, text_reader
from consyn_jax.data.store import TokenStoreWriter, file_hashes
from consyn_jax.data.store.file_hashes import hash_of
from consyn_jax.errors import UserError
from consyn_jax.prepare_config import CorpusOptions, EngineOptions
from consyn_jax.tokenization import BPETokenizer

SHARD_TOKENS = 40_000
SEGMENT_BYTES = 20_000
RULES: dict[str, Any] = {
    "tokenizer": "bytes",
    "near_duplicates": 0.8,
    "validation_fraction": 0.1,
    "on_bad_rows": "skip",
    "invalid_utf8": "replace",
    "num_workers": 0,
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, segments and shards; the ids of the tokenizer "bytes", quickly."""
    monkeypatch.setattr(
        BPETokenizer,
        "encode_batch",
        lambda self, texts, after=None: [list(text.encode()) for text in texts],
    )
    monkeypatch.setattr(chunking, "PART_BYTES", 8000)
    for module in (chunking, text_reader, worker):
        monkeypatch.setattr(module, "LIMIT", 9000)
    for module in (reader, text_reader, json_reader):
        monkeypatch.setattr(module, "BLOCK_BYTES", 6000)
    monkeypatch.setattr(
        build,
        "TokenStoreWriter",
        lambda *given, **named: TokenStoreWriter(*given, **named, shard_tokens=SHARD_TOKENS),
    )
    monkeypatch.setattr(many_writers, "SHARD_TOKENS", SHARD_TOKENS)
    monkeypatch.setattr(many_writers, "LEAST_SEGMENT_BYTES", SEGMENT_BYTES)


def texts(count: int, words: int, seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    known = ["tokens", "lie", "in", "shards", "é", "e\u0301", "日本", "and", "\x07", "documents"]
    return [
        " ".join(rng.choice(known) + str(rng.randrange(90)) for _ in range(rng.randrange(words)))
        for _ in range(count)
    ]


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def by_many(data: Path, output: Path, **more: Any) -> dict[str, bytes]:
    engine = EngineOptions(shared_directory=str(output.parent / "shared"))
    rules = CorpusOptions(data=(str(data),), **{**RULES, **more})
    prepare(rules, output=output, test_fraction=0.05, engine=engine)
    assert list((output.parent / "shared").iterdir()) == []
    return files(output)


def by_one(data: Path, output: Path, **more: Any) -> dict[str, bytes]:
    rules = CorpusOptions(data=(str(data),), **{**RULES, **more})
    prepare(rules, output=output, test_fraction=0.05)
    return files(output)


def assert_same(data: Path, place: Path, **more: Any) -> dict[str, Any]:
    """Compare both stores; return the report."""
    expected = by_one(data, place / "one", **more)
    found = by_many(data, place / "many", **more)
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []
    report: dict[str, Any] = json.loads(expected["report.json"])
    return report


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Files of every dataset type, with exact and near duplicates and texts of several segments."""
    place = tmp_path / "corpus"
    place.mkdir()
    (place / "a.md").write_bytes(b"broken \xff bytes\n\n\n\n\n" + texts(1, 90)[0].encode())
    (place / "b.txt.gz").write_bytes(
        gzip.compress("\n\n\n".join(texts(150, 40, 2)).encode(), mtime=0)
    )
    rows = texts(400, 40, 3)
    rows += rows[100:150] + [row + " nearly" for row in rows[:100]]
    lines = [json.dumps({"text": row, f"key{n % 150}": n}) for n, row in enumerate(rows)]
    for at in (5, 300, 301, 500):
        lines[at] = '{"text": 5}'
    (place / "c.jsonl").write_text("\n".join(lines))
    (place / "d.json").write_text(
        json.dumps([{"text": row} for row in texts(250, 40, 4)], indent=1)
    )
    chats = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer or "no"}]
        for prompt, answer in zip(texts(100, 9, 5), texts(100, 30, 6), strict=True)
    ]
    (place / "e.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"messages": c}) + "\n" for c in chats).encode(), mtime=0)
    )
    pairs = [{"prompt": row[:9], "completion": row[9:] or "."} for row in texts(150, 30, 7)]
    (place / "f.ndjson").write_text("".join(json.dumps(pair) + "\n" for pair in pairs + pairs[:50]))
    table = pyarrow.table({"text": texts(300, 40, 8), "other": list(range(300))})
    pyarrow.parquet.write_table(table, place / "g.parquet", 50, compression="none")
    with (place / "h.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "n"), *((row, 1) for row in texts(300, 40, 9) if row)])
    long = "\n".join(texts(300, 60, 10))
    (place / "i.txt").write_text(long)
    (place / "j.txt").write_text(long)  # a duplicate in parts
    (place / "k.txt").write_text("some\n\n\n" + long + " nearly\n\n\n" + long[:1000])
    return place


def test_every_dataset_type(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that can be read from their middle are cut, compressed ones are not."""
    cut, made = set[str](), spans.plan

    def plan(job: Job, cuts: dict[int, Any]) -> Any:
        cut.update(Path(job.sources[number].name).name for number in cuts if cuts[number])
        return made(job, cuts)

    monkeypatch.setattr(many_writers, "plan", plan)
    report = assert_same(corpus, tmp_path)
    assert cut == {path.name for path in corpus.iterdir() if path.suffix not in (".gz", ".md")}
    assert set(report["dropped"]) == {"bad row", "empty", "duplicate", "near duplicate"}
    assert set(report["splits"]) == {"train", "validation", "test"}
    assert len(report["unread"]) == 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"document_separator": "\\n\\n\\n"},
        {"document_separator": "\\n\\n", "deduplicate": True, "near_duplicates": None},
        {"deduplicate": False, "max_chars": 100, "min_chars": 20},
        {"tokenizer": "train:400", "near_duplicates": 0.5},
    ],
)
def test_rules(corpus: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    assert_same(corpus, tmp_path, **more)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_one_text_is_cut_by_position(tmp_path: Path, name: str) -> None:
    data = "\n".join(texts(400, 60)).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data, mtime=0) if name.endswith("gz") else data)
    assert_same(path, tmp_path)


def test_one_row_goes_through_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "\n".join(texts(40, 60))}))
    assert_same(path, tmp_path)


def test_what_nodes_cannot_read_goes_through_one_writer(tmp_path: Path) -> None:
    engine = EngineOptions(shared_directory=str(tmp_path / "shared"))
    rules = CorpusOptions(data=("sample",), tokenizer="bytes", num_workers=0)
    prepared = prepare(rules, output=tmp_path / "store", engine=engine)
    assert prepared.one_writer == "sample is not a file that all nodes can read"
    assert not (tmp_path / "shared").exists()


@pytest.mark.slow
def test_a_corpus_from_a_template_is_one_group(tmp_path: Path) -> None:
    rng, path = random.Random(1), tmp_path / "a.jsonl"
    frame = " ".join(f"word{n}" for n in range(40))
    rows = [f"{frame} {' '.join(str(rng.random()) for _ in range(4))}" for _ in range(600)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    report = assert_same(path, tmp_path)
    assert 50 < report["dropped"]["near duplicate"] < 595


class Stops(TasksHere):
    """Stops after a number of tasks, as a killed command does, and counts them by phase."""

    def __init__(self, after: int) -> None:
        self.left, self.ran = after, dict[str, list[int]]()

    def run(
        self, job: Job, phase: str, numbers: Sequence[int], done: Callable[[int], None]
    ) -> None:
        for number in numbers:
            if not self.left:
                place = job.place(phase, 9)
                place.with_name(".0000009.0123456789abcdef.new").mkdir(parents=True)
                raise KeyboardInterrupt
            self.left -= 1
            super().run(job, phase, [number], lambda _: None)
            self.ran.setdefault(phase, []).append(number)


@pytest.mark.slow
def test_a_stopped_preparation_repeats_no_task(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_one(corpus, tmp_path / "one")
    ran = list[tuple[str, int]]()
    for after in [*range(1, 200, 9), 10_000]:
        tasks = Stops(after)
        monkeypatch.setattr(engines, "TasksHere", lambda tasks=tasks: tasks)
        try:
            found = by_many(corpus, tmp_path / "many")
        except KeyboardInterrupt:
            assert not (tmp_path / "many" / "manifest.json").exists()
        ran += [(phase, number) for phase, numbers in tasks.ran.items() for number in numbers]
        if tasks.left:
            break
    assert found == expected
    assert len(ran) == len(set(ran))
    assert {phase for phase, _ in ran} > {"cuts", "segments", "exact", "near", "kept", "shards"}


@pytest.mark.slow
def test_bad_rows_stop_and_may_be_skipped_then(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"c\.jsonl:6 holds a number") as many:
        by_many(corpus, tmp_path / "many", on_bad_rows="error")
    with pytest.raises(UserError) as one:
        by_one(corpus, tmp_path / "one", on_bad_rows="error")
    assert str(many.value) == str(one.value)
    tasks = Stops(10_000)
    monkeypatch.setattr(engines, "TasksHere", lambda: tasks)
    assert by_many(corpus, tmp_path / "many") == by_one(corpus, tmp_path / "one")
    assert min(tasks.ran["segments"]) > 0


@pytest.mark.slow
def test_another_command_takes_over(corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """One writer after many, and many after one; other data in the same directory is refused."""
    monkeypatch.setattr(engines, "TasksHere", lambda: Stops(20))
    with pytest.raises(KeyboardInterrupt):
        by_many(corpus, tmp_path / "many")
    with pytest.raises(UserError, match="an unfinished token store, made from other data"):
        by_one(corpus / "c.jsonl", tmp_path / "many")
    expected = by_one(corpus, tmp_path / "one")
    assert by_one(corpus, tmp_path / "many") == expected


def test_shards_that_are_gone_are_made_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = corpus / "c.jsonl"
    expected = by_one(path, tmp_path / "one")
    monkeypatch.setattr(many_writers.ManyWriters, "remove", lambda self: None)
    engine = EngineOptions(shared_directory=str(tmp_path / "shared"))
    for lost in ("train-00000.tokens", "train-00001.index"):
        rules = CorpusOptions(data=(str(path),), **RULES)
        prepare(rules, output=tmp_path / "many", test_fraction=0.05, engine=engine)
        assert files(tmp_path / "many") == expected
        (tmp_path / "many" / "manifest.json").unlink()
        (tmp_path / "many" / "preparing").mkdir()
        (tmp_path / "many" / lost).unlink()


@pytest.mark.slow
def test_a_full_disk_is_named(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from consyn_jax.data.preparation.segments import job as jobs

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "shared"))

    with monkeypatch.context() as patch:
        patch.setattr(jobs.Draft, "finish", full)
        with pytest.raises(UserError, match="No space left") as fault:
            by_many(corpus, tmp_path / "many")
    assert "Make room, and run the same command again; it continues." in str(fault.value)
    assert not list((tmp_path / "shared").glob("*/*/*/.*"))
    assert by_many(corpus, tmp_path / "many") == by_one(corpus, tmp_path / "one")


def test_a_node_that_does_not_see_the_files_says_so(tmp_path: Path) -> None:
    unseen, _ = phases.work(str(tmp_path / "shared" / "job"), "0", "segments", 0)
    assert unseen.startswith(f"--shared_directory {tmp_path / 'shared'} is not visible on node ")
    unseen, _ = phases.work_on_file(str(tmp_path / "a.txt"))
    assert unseen.startswith(f"--data {tmp_path / 'a.txt'} is not visible on node ")


def test_tasks_hash_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text in lines\n" * 60_000)
    os.utime(path, (1, 1))
    read = list[Path]()
    monkeypatch.setattr(engines, "HASHED_HERE", 0)
    monkeypatch.setattr(file_hashes, "SETTLED_NS", -1)
    monkeypatch.setattr(file_hashes, "hash_of", lambda path: read.append(path) or hash_of(path))
    by_many(path, tmp_path / "many")  # the tasks hash
    assert by_one(path, tmp_path / "one") == files(tmp_path / "many")
    assert read == []


def test_groups_are_those_of_a_union_find() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        count = int(rng.integers(1, 60))
        pairs = rng.integers(0, count, (int(rng.integers(0, 80)), 2))
        parent = list(range(count))

        def root(x: int, parent: list[int] = parent) -> int:
            while parent[x] != x:
                x = parent[x]
            return x

        for a, b in pairs.tolist():
            low, high = sorted((root(a), root(b)))
            parent[high] = low
        assert duplicates._joined(pairs, count).tolist() == [root(x) for x in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, "{", '{"root": "/"}'])
def test_the_files_of_a_damaged_job_are_not_used(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    path = corpus / "c.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(engines, "TasksHere", lambda: Stops(12))
        with pytest.raises(KeyboardInterrupt):
            by_many(path, tmp_path / "many")
    (job,) = (tmp_path / "shared").glob("*/job.json")
    for damaged in (tmp_path / "shared").glob("*/*/segments/*/arrays.bin"):
        damaged.write_bytes(b"0")
    job.unlink() if content is None else job.write_text(content)
    assert by_many(path, tmp_path / "many") == by_one(path, tmp_path / "one")
