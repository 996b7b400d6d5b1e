from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consyn_jax.data.packing import Batch, PackedDataset, memory_split
from consyn_jax.data.shards import MemoryShard, StoreSplit
from consyn_jax.data.store import TokenStore, TokenStoreWriter
from consyn_jax.tokenization import BPETokenizer

BOS, EOS, PAD = 257, 258, 256

ids = st.lists(st.integers(0, 255), max_size=12)
shards = st.lists(st.lists(ids, min_size=1, max_size=6), min_size=1, max_size=4)


def split_of(documents: list[list[list[int]]]) -> StoreSplit:
    return StoreSplit([MemoryShard([np.array([*ids, EOS], np.int64) for ids in shard], EOS) for shard in documents])


def reference(documents: list[list[list[int]]], block_size: int) -> Batch:
    """The windows one token at a time, as the definition has it."""
    stream = [(token, ([BOS, *ids])[t], number) for number, ids in enumerate(d for shard in documents for d in shard) for t, token in enumerate([*ids, EOS])]
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "segment_ids": [], "loss_mask": []}
    for start in range(0, len(stream), block_size):
        window = stream[start : start + block_size]
        padding = block_size - len(window)
        rows["labels"].append([token for token, _, _ in window] + [PAD] * padding)
        rows["input_ids"].append([token for _, token, _ in window] + [PAD] * padding)
        rows["segment_ids"].append([number - window[0][2] + 1 for _, _, number in window] + [0] * padding)
        rows["loss_mask"].append([1] * len(window) + [0] * padding)
    return {name: np.array(values) for name, values in rows.items()}


@given(documents=shards, block_size=st.integers(1, 20), order=st.randoms(use_true_random=False))
def test_windows_are_as_defined_in_any_order_over_any_shards(documents: list[list[list[int]]], block_size: int, order: "object") -> None:
    packed = PackedDataset(split_of(documents), block_size, BOS, PAD)
    expected = reference(documents, block_size)
    assert len(packed) == len(expected["labels"])
    indices = [*range(len(packed)), 0]
    order.shuffle(indices)  # type: ignore[attr-defined]
    rows = packed.rows(indices)
    for name, values in rows.items():
        np.testing.assert_array_equal(values, expected[name][indices], err_msg=name)
        assert values.dtype == (np.bool_ if name == "loss_mask" else np.int32)


@given(documents=shards, block_size=st.integers(1, 20))
def test_every_token_is_a_label_exactly_once_an_epoch(documents: list[list[list[int]]], block_size: int) -> None:
    packed = PackedDataset(split_of(documents), block_size, BOS, PAD)
    rows = packed.rows(np.arange(len(packed)))
    assert rows["labels"][rows["loss_mask"]].tolist() == [token for shard in documents for ids in shard for token in (*ids, EOS)]
    assert rows["loss_mask"].sum() == packed.num_tokens
    assert not (rows["input_ids"] == EOS).any()
    assert ((rows["segment_ids"] == 0) == ~rows["loss_mask"]).all()


@given(documents=shards, block_size=st.integers(1, 20))
def test_within_a_segment_each_label_is_the_next_input(documents: list[list[list[int]]], block_size: int) -> None:
    rows = PackedDataset(split_of(documents), block_size, BOS, PAD).rows([0])
    same = (rows["segment_ids"][:, 1:] == rows["segment_ids"][:, :-1]) & rows["loss_mask"][:, 1:]
    assert (rows["input_ids"][:, 1:] == rows["labels"][:, :-1])[same].all()
    begins = (rows["segment_ids"][:, 1:] != rows["segment_ids"][:, :-1]) & rows["loss_mask"][:, 1:]
    assert (rows["input_ids"][:, 1:][begins] == BOS).all()


def test_items_are_rows() -> None:
    packed = PackedDataset(split_of([[[1, 2, 3], [4]], [[5, 6]]]), 4, BOS, PAD)
    assert len(packed) == 3
    assert {name: values.tolist() for name, values in packed[1].items()} == {
        "input_ids": [BOS, 4, BOS, 5],
        "labels": [4, EOS, 5, 6],
        "segment_ids": [1, 1, 2, 2],
        "loss_mask": [True] * 4,
    }
    np.testing.assert_array_equal(packed[-1]["labels"], [EOS, PAD, PAD, PAD])
    for beyond in (3, -4):
        with pytest.raises(IndexError):
            packed[beyond]


def test_token_lists_get_their_eos() -> None:
    split = memory_split([np.array([1, 2]), np.array([3, EOS]), np.array([], np.int64)], EOS)
    assert split.shards[0].tokens.tolist() == [1, 2, EOS, 3, EOS, EOS]
    assert split.num_bytes is None


def test_a_store_on_disk_gives_the_same_windows(tmp_path: Path) -> None:
    tokenizer = BPETokenizer.bytes()
    random = np.random.default_rng(0)
    documents = [random.integers(0, 256, n).tolist() for n in random.integers(0, 40, 100)]
    with TokenStoreWriter(tmp_path / "store", tokenizer, shard_tokens=300) as writer:
        writer.add_many("train", documents, [len(d) for d in documents])
    split = TokenStore(tmp_path / "store").split("train")
    assert len(split.shards) > 3
    packed = PackedDataset(split, 16, tokenizer.bos_token_id, tokenizer.pad_token_id)
    rows = packed.rows(range(len(packed)))
    for name, values in reference([documents], 16).items():
        np.testing.assert_array_equal(rows[name], values, err_msg=name)
    assert (packed.num_documents, packed.num_bytes) == (100, sum(map(len, documents)))
