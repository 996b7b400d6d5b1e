"""Many writers make the bytes of one writer, whatever the data."""

import gzip
import json
import os
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from segment_stores import Stops, assert_same, by_many, by_one, files, texts

from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.data.preparation.segments import (
    duplicates,
    engines,
    many_writers,
    partitions,
    phases,
    spans,
)
from consyn_jax.data.preparation.segments.job import Job
from consyn_jax.data.sources import json_reader
from consyn_jax.data.store import file_hashes
from consyn_jax.data.store.file_hashes import hash_of
from consyn_jax.prepare_config import CorpusOptions, EngineOptions


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


def test_keys_are_grouped_in_pieces(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, made = list[int](), partitions.band_keys

    def band_keys(signatures: np.ndarray, threshold: float) -> np.ndarray:
        sizes.append(len(signatures))
        return made(signatures, threshold)

    monkeypatch.setattr(partitions, "PIECE_KEYS", 5 * 18)
    monkeypatch.setattr(partitions, "band_keys", band_keys)
    report = assert_same(corpus / "c.jsonl", tmp_path)
    assert report["dropped"]["near duplicate"]
    assert max(sizes) == 5
    assert sum(sizes) > 400


@pytest.mark.slow
def test_many_segments_need_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    rows = texts(200, 40)
    rows += [*rows, *(row + " nearly" for row in rows)]  # so that each partition finds some
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    monkeypatch.setattr(json_reader, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(many_writers, "LEAST_SEGMENT_BYTES", 1000)
    monkeypatch.setattr(many_writers, "LEAST_PARTITIONS", 48)
    by_one(path, tmp_path / "warm")  # imports what is imported late
    tasks = Stops(10_000)
    monkeypatch.setattr(engines, "TasksHere", lambda: tasks)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 25, hard))
    try:
        by_many(path, tmp_path / "many")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(tasks.ran["segments"]) > 45


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
