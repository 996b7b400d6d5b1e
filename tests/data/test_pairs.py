"""Pairs of answers as rows: both sequences beside each other, cut and dropped as TRL does."""

import numpy as np
import pytest

from consyn_jax.data.pairs import (
    CHOSEN_REFERENCE,
    REJECTED_REFERENCE,
    PairDataset,
    longer_sequences,
)
from consyn_jax.data.store.manifest import BETWEEN, GIVEN
from consyn_jax.data.store.shards import MemoryShard
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.errors import UserError

BOS, EOS, PAD = 1, 2, 0
Sequence = list[int]


def split(*pairs: tuple[Sequence, Sequence, Sequence], given: bool = False) -> StoreSplit:
    """A split of (prompt, chosen, rejected); each answer ends with EOS."""
    documents, targets = [], []
    for prompt, *answers in pairs:
        halves, marks = [], []
        for answer in answers:
            ids = [*prompt, *answer, EOS]
            own = [0] * len(prompt) + [1] * (len(answer) + 1)
            if given:
                own[0] = GIVEN
            halves.append(ids)
            marks.append(own)
        documents.append(np.array([*halves[0], EOS, *halves[1]]))
        targets.append(np.array([*marks[0], BETWEEN, *marks[1]]))
    return StoreSplit([MemoryShard(documents, EOS, targets)])


def test_a_row_has_both_sequences_with_a_segment_each() -> None:
    pairs = PairDataset(split(([5, 6], [7, 8], [9])), 6, BOS, PAD)
    row = pairs[0]
    assert row["input_ids"].tolist() == [1, 5, 6, 7, 8, 0, 1, 5, 6, 9, 0, 0]
    assert row["labels"].tolist() == [5, 6, 7, 8, 2, 0, 5, 6, 9, 2, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 0, 0]
    assert (
        row["loss_mask"].tolist()
        == [False] * 2 + [True] * 3 + [False] * 3 + [True] * 2 + [False] * 2
    )
    assert (pairs.num_tokens, pairs.num_targets) == (9, 5)
    assert pairs.padding_fraction == 0.25
    assert {name: values.dtype for name, values in row.items()} == {
        "input_ids": np.int32,
        "labels": np.int32,
        "segment_ids": np.int32,
        "loss_mask": np.bool_,
    }


@pytest.mark.parametrize(("bos", "given"), [(BOS, True), (None, False)])
def test_without_a_bos_the_first_token_is_an_input_only(bos: int | None, given: bool) -> None:
    row = PairDataset(split(([5, 6], [7], [8]), given=given), 4, bos, PAD)[0]
    assert row["input_ids"].tolist() == [5, 6, 7, 0, 5, 6, 8, 0]
    assert row["labels"].tolist() == [6, 7, 2, 0, 6, 8, 2, 0]
    assert row["loss_mask"].tolist() == [False, True, True, False] * 2


LONG = split(
    ([5, 6], [7, 7, 7, 7], [8]),  # the chosen answer is too long
    ([5], [7], [8]),
    ([5, 6, 5, 6], [7], [8]),  # the prompt fills the sequence
)


def test_long_pairs_lose_their_end_and_those_without_an_answer_are_dropped() -> None:
    pairs = PairDataset(LONG, 4, BOS, PAD)
    assert (len(pairs), pairs.num_long, pairs.num_without_answer) == (2, 2, 1)
    row = pairs[0]
    assert row["labels"].tolist() == [5, 6, 7, 7, 5, 6, 8, 2]
    assert row["loss_mask"].tolist() == [False, False, True, True] * 2
    assert pairs.num_tokens + pairs.lost_tokens == 7 + 4 + 3 + 3 + 6 + 6
    assert longer_sequences(LONG).tolist() == [7, 3, 6]


def test_long_pairs_are_dropped_or_an_error() -> None:
    dropped = PairDataset(LONG, 4, BOS, PAD, "drop")
    assert (len(dropped), dropped.num_long, dropped.lost_tokens) == (1, 2, 23)
    assert dropped[0]["labels"].tolist() == [5, 7, 2, 0, 5, 8, 2, 0]
    with pytest.raises(UserError, match=r"^A pair has a sequence of 7 tokens, more than the 4 of"):
        PairDataset(LONG, 4, BOS, PAD, "error")


def test_the_reference_comes_with_the_rows() -> None:
    pairs = PairDataset(LONG, 8, BOS, PAD)
    pairs.reference = np.arange(6, dtype=np.float32).reshape(3, 2)
    rows = pairs.rows([2, 0])
    assert rows[CHOSEN_REFERENCE].tolist() == [4, 0]
    assert rows[REJECTED_REFERENCE].tolist() == [5, 1]
    assert rows["labels"].shape == (2, 16)


def test_a_document_that_is_no_pair_is_damage() -> None:
    text = StoreSplit([MemoryShard([np.array([5, 6, EOS])], EOS)])
    with pytest.raises(UserError, match="one of its documents is not a pair"):
        PairDataset(text, 4, BOS, PAD)
