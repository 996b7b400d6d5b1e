import hashlib
import os
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consyn_jax.data.packing import PackedDataset
from consyn_jax.data.store import number_file
from consyn_jax.data.store.number_file import NumberFile
from consyn_jax.data.store.shards import MemoryShard, Shard, Tokens
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.errors import UserError

EOS, VOCABULARY = 258, 259

Entry = dict[str, Any]


def write(
    directory: Path, name: str, documents: list[list[int]], targets: list[int] | None = None
) -> Entry:
    """Write a shard as a store has it, and return its entry in the manifest."""
    lengths = np.array([len(ids) for ids in documents])
    tokens = np.concatenate([np.array(ids, "<u2") for ids in documents])
    files = {
        "file": tokens.tobytes(),
        "index": (np.cumsum(lengths) - lengths).astype("<u8").tobytes(),
    }
    entry: Entry = {"tokens": len(tokens), "documents": len(documents), "bytes": 7}
    if targets is not None:
        files["targets"] = np.array(targets, np.uint8).tobytes()
        entry["target_tokens"] = sum(targets)
    for key, data in files.items():
        suffix = "tokens" if key == "file" else key
        (directory / f"{name}.{suffix}").write_bytes(data)
        entry[key] = f"{name}.{suffix}"
        entry["sha256" if key == "file" else f"{key}_sha256"] = hashlib.sha256(data).hexdigest()
    return entry


def several(directory: Path, count: int) -> list[Entry]:
    return [write(directory, f"s{i:03d}", [[i, i, EOS], [i, EOS]]) for i in range(count)]


def opened(directory: Path, entries: list[Entry]) -> StoreSplit:
    return StoreSplit([Shard(directory, entry, VOCABULARY) for entry in entries])


def marks(shard: Tokens) -> list[int]:
    """1 for each token that is a target of the loss, else 0."""
    out = np.empty(shard.num_tokens, np.uint8)
    shard.read_targets(0, out)
    return out.tolist()


def held_open(directory: Path) -> int:
    """Number of files in `directory` that this process has open."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            count += link.readlink().is_relative_to(directory)
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return count


# ------------------------------------------------------------------------------------------ reading


@given(
    documents=st.lists(
        st.lists(st.lists(st.integers(0, EOS), max_size=6), min_size=1, max_size=4),
        min_size=1,
        max_size=4,
    ),
    data=st.data(),
)
def test_windows_of_the_stream_are_slices_of_it(
    documents: list[list[list[int]]], data: st.DataObject
) -> None:
    split = StoreSplit(
        [MemoryShard([np.array(ids, np.int64) for ids in shard], EOS) for shard in documents]
    )
    stream = np.array(
        [
            token
            for shard in documents
            for ids in shard
            for token in (ids if ids[-1:] == [EOS] else [*ids, EOS])
        ]
    )
    starts = np.concatenate(list(split.document_starts()))
    width = data.draw(st.integers(1, 20))
    first = np.array(
        data.draw(st.lists(st.integers(0, len(stream) - 1), min_size=1, max_size=5)), np.int64
    )
    tokens, begins, targets = split.windows(first, width)
    padded = np.concatenate([[0], stream, np.zeros(width, np.int64)])
    for row, position in enumerate(first):
        np.testing.assert_array_equal(tokens[row], padded[position : position + width + 1])
        there = min(width, len(stream) - position)
        np.testing.assert_array_equal(
            np.flatnonzero(begins[row, :there]) + position,
            starts[(starts >= position) & (starts < position + there)],
        )
    assert targets is None


def test_a_shard_reads_as_it_was_written(tmp_path: Path) -> None:
    split = opened(
        tmp_path, [write(tmp_path, "a", [[1, 2, EOS], [EOS]]), write(tmp_path, "b", [[3, EOS]])]
    )
    out = np.empty(4, np.uint16)
    split.read(1, out)
    assert out.tolist() == [2, EOS, EOS, 3]
    wide = np.empty(6, np.int64)
    split.read(0, wide)
    assert wide.tolist() == [1, 2, EOS, EOS, 3, EOS]
    first = split.shards[0]
    assert (first.starts.tolist(), marks(first)) == ([0, 3], [1, 1, 1, 1])
    assert (split.num_tokens, split.num_targets, split.num_documents, split.num_bytes) == (
        6,
        6,
        3,
        14,
    )


@pytest.mark.parametrize(
    ("documents", "delimiter"),
    [
        ([[1, EOS], [EOS], [2, 3, EOS]], EOS),
        ([[1, EOS, 4, EOS], [2, EOS]], None),  # as in a conversation of several turns
        ([[1, EOS], [2, 7]], None),
        ([[1, 7], [7], [2, 7]], 7),
        ([[EOS]], EOS),
    ],
)
def test_eos_is_the_delimiter_only_if_it_occurs_nowhere_else(
    tmp_path: Path, documents: list[list[int]], delimiter: int | None
) -> None:
    split = opened(tmp_path, [write(tmp_path, "a", documents)])
    _, begins, _ = split.windows(np.array([0]), split.num_tokens)
    assert split.shards[0].delimiter == delimiter
    lengths = [len(ids) for ids in documents]
    assert np.flatnonzero(begins[0]).tolist() == (np.cumsum(lengths) - lengths).tolist()


def test_the_delimiter_is_found_across_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(number_file, "CHUNK_BYTES", 16)
    random = np.random.default_rng(0)
    documents = [[*random.integers(0, 256, n).tolist(), EOS] for n in random.integers(0, 30, 50)]
    lengths = [len(ids) for ids in documents]
    for delimiter in (EOS, None):
        shard = Shard(tmp_path, write(tmp_path, "a", documents), VOCABULARY)
        shard.verify()
        assert shard.delimiter == delimiter
        assert shard.starts.tolist() == (np.cumsum(lengths) - lengths).tolist()
        documents[45][0] = EOS
    assert lengths[45] > 1


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    split = opened(tmp_path, several(tmp_path, 1))
    split.read(0, np.empty(5, np.uint16))
    os.truncate(tmp_path / "s000.tokens", 6)
    with pytest.raises(UserError, match=r"s000\.tokens was truncated while it was read"):
        split.read(0, np.empty(5, np.uint16))


def test_a_deleted_file_is_named(tmp_path: Path) -> None:
    split = opened(tmp_path, several(tmp_path, 1))
    (tmp_path / "s000.index").unlink()
    with pytest.raises(UserError, match=r"s000\.index cannot be read: No such file"):
        split.read(0, np.empty(5, np.uint16))


# ------------------------------------------------------------------------------------------ targets


def test_targets_become_the_loss_mask(tmp_path: Path) -> None:
    entries = [
        write(tmp_path, "a", [[1, 2, EOS], [3, EOS]], [0, 1, 1, 0, 1]),
        write(tmp_path, "b", [[4, EOS]]),
    ]
    split = opened(tmp_path, entries)
    assert (split.num_tokens, split.num_targets) == (7, 5)
    assert [marks(shard) for shard in split.shards] == [[0, 1, 1, 0, 1], [1, 1]]
    rows = PackedDataset(split, 4, 257, 256).rows([0, 1])
    assert rows["loss_mask"].tolist() == [[False, True, True, False], [True, True, True, False]]
    assert rows["segment_ids"].tolist() == [[1, 1, 1, 2], [1, 2, 2, 0]]


@pytest.mark.parametrize(
    ("data", "keep_checksum", "message"),
    [
        (b"\1\1\1\1", False, r"a\.targets has 4 bytes, but the manifest says 5"),
        (b"\0\1\1\1\1", True, r"a\.targets does not match its checksum"),
        (
            b"\0\1\3\0\1",
            False,
            r"a\.targets has the value 3, but the largest allowed is 2",
        ),
        (b"\1\1\1\0\1", False, r"a\.targets has 4 targets, but the manifest says 3"),
    ],
)
def test_damaged_targets_are_named(
    tmp_path: Path, data: bytes, keep_checksum: bool, message: str
) -> None:
    entry = write(tmp_path, "a", [[1, 2, EOS], [3, EOS]], [0, 1, 1, 0, 1])
    (tmp_path / "a.targets").write_bytes(data)
    if not keep_checksum:
        entry["targets_sha256"] = hashlib.sha256(data).hexdigest()
    with pytest.raises(UserError, match=message):
        Shard(tmp_path, entry, VOCABULARY).verify()


def test_a_store_without_its_targets_is_damaged(tmp_path: Path) -> None:
    entry = write(tmp_path, "a", [[1, EOS]], [0, 1])
    (tmp_path / "a.targets").unlink()
    with pytest.raises(UserError, match=r"a\.targets is missing"):
        Shard(tmp_path, entry, VOCABULARY)
    (tmp_path / "a.targets").mkdir()
    with pytest.raises(UserError, match=r"a\.targets is not a file"):
        Shard(tmp_path, entry, VOCABULARY)


# ------------------------------------------------------------------------------------------- bounds


def test_a_shard_is_checked_once_by_all_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[str] = []
    chunks = NumberFile.chunks
    monkeypatch.setattr(
        NumberFile,
        "chunks",
        lambda self, *a: passes.append(Path(self.path).name) or chunks(self, *a),
    )
    split = opened(tmp_path, several(tmp_path, 6))
    together = threading.Barrier(4)

    def read(_: int) -> list[list[int]]:
        together.wait()
        return [split.windows(np.arange(0, 30, 3), 3)[0].tolist() for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(read, range(4)))
    assert all(result == [results[0][0]] * 5 for result in results)
    assert sorted(passes) == sorted(
        f"s{i:03d}.{kind}" for i in range(6) for kind in ("tokens", "index")
    )


def test_the_first_of_several_damaged_shards_is_named(tmp_path: Path) -> None:
    entries = several(tmp_path, 6)
    for name in ("s002", "s004"):
        (tmp_path / f"{name}.tokens").write_bytes(bytes(10))
    split = opened(tmp_path, entries)
    with pytest.raises(
        UserError, match=r"s002\.tokens does not match its checksum in manifest\.json"
    ):
        split.windows(np.array([29, 0, 11, 21]), 1)
    assert split.shards[0].verified
    assert split.windows(np.array([0]), 10)[0].tolist() == [
        [0, 0, 0, EOS, 0, EOS, 1, 1, EOS, 1, EOS]
    ]


def test_few_files_are_open_at_a_time_and_none_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(number_file._open_files, "limit", 5)
    split = opened(tmp_path, several(tmp_path, 40))
    assert held_open(tmp_path) == 0
    expected = split.windows(np.arange(0, 200, 5), 5)[0][:, 1:].tolist()
    assert expected == [[i, i, EOS, i, EOS] for i in range(40)]
    assert held_open(tmp_path) == 5

    def read(seed: int) -> bool:
        order = np.random.default_rng(seed).permutation(40)
        return split.windows(order * 5, 5)[0][:, 1:].tolist() == [expected[i] for i in order]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(40)))
    assert held_open(tmp_path) == 5
    del split
    assert held_open(tmp_path) == 0


def test_a_file_with_the_id_of_a_deleted_one_counts_as_read_last(tmp_path: Path) -> None:
    """CPython reuses the address of a deleted object, so `id` alone does not tell them apart."""
    split = opened(tmp_path, several(tmp_path, 2))
    one, other = (shard._tokens for shard in split.shards)
    files = number_file._OpenFiles(1)
    files.get(other)
    files._recent = OrderedDict([(id(one), weakref.ref(split.shards[0])), *files._recent.items()])
    assert files.get(one) is one.opened is not None
    assert other.opened is None


@pytest.mark.slow
@pytest.mark.exhaustive
def test_reading_a_large_store_takes_no_memory(tmp_path: Path) -> None:
    """150 MB in three shards are checked and then read at random."""
    random = np.random.default_rng(0)
    entries = []
    for name in "abc":
        tokens = random.integers(0, EOS, 25_000_000, dtype=np.uint16)
        tokens[999::1000] = EOS
        index = np.arange(0, len(tokens), 1000)
        (tmp_path / f"{name}.tokens").write_bytes(tokens.data)
        (tmp_path / f"{name}.index").write_bytes(index.data)
        checksums = {
            "sha256": hashlib.sha256(tokens.data).hexdigest(),
            "index_sha256": hashlib.sha256(index.data).hexdigest(),
        }
        entries.append(
            {
                "file": f"{name}.tokens",
                "index": f"{name}.index",
                "tokens": len(tokens),
                "documents": len(index),
                "bytes": 1,
                **checksums,
            }
        )
    del tokens

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    packed = PackedDataset(opened(tmp_path, entries), 1024, 257, 256)
    for _ in range(300):
        packed.rows(random.integers(0, len(packed), 200))
    assert resident() - before < 30e6
    assert held_open(tmp_path) == 6
