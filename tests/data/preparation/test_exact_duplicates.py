import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consyn_jax.data.preparation import exact_duplicates
from consyn_jax.data.preparation.exact_duplicates import ExactDuplicates, SortedRuns

# Digests with few values, equal in either half or in both, and with zero bytes, which a comparison
# as text would lose.
digests = st.builds(
    lambda high, low: bytes([0] * 7 + [high]) + bytes([low] + [0] * 7),
    st.integers(0, 3),
    st.integers(0, 3),
)
calls = st.lists(st.lists(digests, max_size=12), max_size=12)


def array(items: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(items), np.uint8).reshape(-1, 16)


def expected(items: list[bytes], known: set[bytes]) -> list[bool]:
    answers = []
    for item in items:
        answers.append(item not in known)
        known.add(item)
    return answers


@given(calls=calls, chunk=st.integers(1, 5))
def test_answers_match_a_set_and_the_file_has_new_digests_in_order(
    tmp_path_factory: pytest.TempPathFactory, calls: list[list[bytes]], chunk: int
) -> None:
    path, known = tmp_path_factory.mktemp("exact") / "digests", set[bytes]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_duplicates, "CHUNK", chunk)
        index = ExactDuplicates(path)
        for call in calls:
            assert index.first(array(call)).tolist() == expected(call, known)
            assert index.count == len(known)
        index.close()
    flat = [item for call in calls for item in call]
    assert path.read_bytes() == b"".join(dict.fromkeys(flat))


@given(items=st.lists(digests, max_size=40), later=st.lists(digests, max_size=20), data=st.data())
def test_a_file_can_be_resumed_at_any_count(
    tmp_path_factory: pytest.TempPathFactory,
    items: list[bytes],
    later: list[bytes],
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("exact") / "digests"
    index = ExactDuplicates(path)
    index.first(array(items))
    index.flush()
    index.close()
    recorded = list(dict.fromkeys(items))
    count = data.draw(st.integers(0, len(recorded)))
    reopened = ExactDuplicates(path, count)
    assert reopened.count == count
    assert reopened.first(array(later)).tolist() == expected(later, set(recorded[:count]))
    reopened.close()
    assert path.read_bytes() == b"".join(dict.fromkeys(recorded[:count] + later))


def test_many_digests_in_many_calls(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 50_000, 100_000)
    items = np.zeros((len(values), 16), np.uint8)
    items[:, 4:8] = values.astype("<u4").view(np.uint8).reshape(-1, 4)
    index, answers = ExactDuplicates(tmp_path / "digests"), []
    for start in range(0, len(items), 777):
        answers.append(index.first(items[start : start + 777]))
        runs = [len(keys) for keys, _ in index._runs._runs]
        assert all(a > b for a, b in itertools.pairwise(runs))
        assert len(runs) <= np.log2(index.count) + 1
    _, first = np.unique(values, return_index=True)
    np.testing.assert_array_equal(np.flatnonzero(np.concatenate(answers)), np.sort(first))
    assert sum(runs) == index.count == len(first)
    index.close()


@given(
    pairs=st.lists(
        st.lists(st.tuples(st.integers(0, 6), st.integers(0, 255)), max_size=10), max_size=10
    ),
    keys=st.lists(st.integers(0, 8), max_size=10),
    chunk=st.integers(1, 7),
)
def test_runs_find_every_pair_in_small_chunks(
    pairs: list[list[tuple[int, int]]], keys: list[int], chunk: int
) -> None:
    runs = SortedRuns(np.dtype(np.uint8))
    for added in pairs:
        runs.add(
            np.array([k for k, _ in added], np.uint64), np.array([v for _, v in added], np.uint8)
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_duplicates, "CHUNK", chunk)
        found = list(runs.find(np.array(keys, np.uint64)))
    assert all(len(positions) <= chunk for positions, _ in found)
    flat = [
        (p, v)
        for positions, values in found
        for p, v in zip(positions.tolist(), values.tolist(), strict=True)
    ]
    assert sorted(flat) == sorted(
        (p, v) for p, key in enumerate(keys) for added in pairs for k, v in added if k == key
    )


def test_a_file_that_is_too_short_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"digests has 0 bytes where 1 records of 16 bytes are expected"
    ):
        ExactDuplicates(tmp_path / "digests", 1)
    assert not (tmp_path / "digests").exists()
    (tmp_path / "digests").write_bytes(bytes(40))
    with pytest.raises(ValueError, match=r"has 40 bytes where 3 records"):
        ExactDuplicates(tmp_path / "digests", 3)
    index = ExactDuplicates(tmp_path / "digests", 2)
    index.close()
    assert (tmp_path / "digests").read_bytes() == bytes(32)


def test_system_errors_are_raised(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        ExactDuplicates(tmp_path / "file" / "digests")
    with pytest.raises(IsADirectoryError):
        ExactDuplicates(tmp_path)
