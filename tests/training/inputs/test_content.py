import numpy as np

from consyn_jax.training.inputs.content import (
    MOST_ROWS,
    documents,
    fingerprint_of,
)


def test_positions_that_restart_are_documents() -> None:
    ones = np.ones((1, 6), int)
    found = documents(ones, np.array([[0, 1, 2, 0, 1, 2]]))
    assert found.tolist() == [[1, 1, 1, 2, 2, 2]]
    assert documents(ones, np.array([[7, 8, 9, 10, 11, 12]])).tolist() == ones.tolist()
    padded = documents(np.array([[0, 1, 1, 1, 1, 0]]), np.array([[1, 0, 1, 0, 1, 1]]))
    assert padded.tolist() == [[0, 1, 1, 2, 2, 0]]
    own = documents(np.array([[1, 1, 1, 2, 2, 2]]), np.array([[0, 1, 2, 0, 1, 0]]))
    assert own.tolist() == [[1, 1, 1, 2, 2, 3]]


def test_a_fingerprint_is_of_every_number_and_not_of_types() -> None:
    import torch

    rows = [{"input_ids": [i, i + 1], "labels": [-100, i]} for i in range(50)]
    base = fingerprint_of(rows)
    assert base == fingerprint_of([{k: np.array(v, np.int32) for k, v in r.items()} for r in rows])
    assert base == fingerprint_of([{k: torch.tensor(v) for k, v in r.items()} for r in rows])
    for i, key in ((0, "labels"), (33, "input_ids"), (49, "labels")):
        other = [dict(row) for row in rows]
        other[i] = {**other[i], key: [other[i][key][0], 7000]}
        assert fingerprint_of(other) != base, (i, key)
    assert fingerprint_of(rows[::-1]) != base
    assert fingerprint_of([[1, 2], [3]]) != fingerprint_of([[1], [2, 3]])
    assert fingerprint_of([([1, 2], "a")]) != fingerprint_of([([1, 2], "b")])


def test_what_cannot_be_known_has_no_fingerprint() -> None:
    class Random:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> dict:
            return {"input_ids": np.random.default_rng().integers(1000, size=20)}

    assert fingerprint_of(Random()) is None
    assert fingerprint_of([object()]) is None
    assert fingerprint_of(range(MOST_ROWS + 1)) is None
