from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from consyn_jax.config import UserError
from consyn_jax.data.packing import PackedDataset
from consyn_jax.data.shards import MemoryShard, StoreSplit
from consyn_jax.data.streaming import FirstWindows, Streamed
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.dataset import MixedDataset, get_dataset
from consyn_jax.training.inputs import Source, as_source, complete

IDS = np.arange(20).reshape(2, 10) + 30
ALL = np.arange(4)


def source_of(data: Any, **changes: Any) -> Source:
    return as_source(data, **({"batch_size": 4, "block_size": 8, "seed": 1, "bos_id": 1, "eos_id": 2, "pad_id": 0} | changes))


# ---------------------------------------------------------------------------------------------------------------- one batch


def test_ids_alone_are_shifted() -> None:
    batch = complete({"input_ids": IDS})
    np.testing.assert_array_equal(batch["input_ids"], IDS[:, :-1])
    np.testing.assert_array_equal(batch["labels"], IDS[:, 1:])
    assert batch["loss_mask"].all()
    assert (batch["segment_ids"] == 1).all()
    assert {name: values.dtype for name, values in batch.items()} == {
        "input_ids": np.int32,
        "labels": np.int32,
        "segment_ids": np.int32,
        "loss_mask": np.bool_,
    }


def test_padding_and_borders_of_documents_are_no_targets() -> None:
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0, 0], [1] * 10])
    batch = complete({"input_ids": IDS, "segment_ids": segments})
    np.testing.assert_array_equal(batch["loss_mask"][0], [1, 1, 0, 1, 1, 1, 0, 0, 0])
    assert batch["loss_mask"][1].all()
    attended = complete({"input_ids": IDS, "attention_mask": segments > 0})
    np.testing.assert_array_equal(attended["loss_mask"][0], [1, 1, 1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(attended["segment_ids"][0], [1, 1, 1, 1, 1, 1, 1, 0, 0])


def test_a_mask_over_ids_is_shifted_with_them() -> None:
    mask = np.ones((2, 10), bool)
    mask[0, :4] = False  # a prompt of four tokens
    batch = complete({"input_ids": IDS, "loss_mask": mask})
    np.testing.assert_array_equal(batch["loss_mask"][0], [0, 0, 0, 1, 1, 1, 1, 1, 1])


def test_labels_of_torch_are_taken_as_they_are() -> None:
    labels = IDS + 1
    labels[0, :3] = -100
    batch = complete({"input_ids": torch.tensor(IDS), "labels": torch.tensor(labels)})
    np.testing.assert_array_equal(batch["loss_mask"], labels != -100)
    np.testing.assert_array_equal(batch["labels"], np.where(labels == -100, 0, labels))
    masked = complete({"input_ids": IDS, "labels": labels, "loss_mask": np.arange(10) < [[5], [10]]})
    np.testing.assert_array_equal(masked["loss_mask"][0], [0, 0, 0, 1, 1, 0, 0, 0, 0, 0])
    padded = complete({"input_ids": IDS, "labels": IDS + 1, "attention_mask": np.arange(10) < [[5], [10]]})
    np.testing.assert_array_equal(padded["loss_mask"][0], [1] * 5 + [0] * 5)


def test_a_whole_batch_stays_as_it_is() -> None:
    batch = {"input_ids": IDS, "labels": IDS + 1, "segment_ids": np.full_like(IDS, 3), "loss_mask": IDS % 2 == 0}
    for name, values in complete({**batch, "anything": "else"}).items():
        np.testing.assert_array_equal(values, batch[name])


def test_labels_that_are_not_shifted_are_refused() -> None:
    labels = IDS.copy()
    labels[:, :2] = -100
    for unshifted in (IDS, labels):
        with pytest.raises(UserError, match=r"labels equal the input_ids, so nothing is predicted\. Shift them"):
            complete({"input_ids": IDS, "labels": unshifted})
    ones = np.ones((2, 10), int)
    assert complete({"input_ids": ones, "labels": ones})["loss_mask"].all(), "one token over and over follows itself"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ([1, 2], "must be a dict with 'input_ids', and is list"),
        ({"ids": IDS}, "must be a dict with 'input_ids', and is ['ids']"),
        ({"input_ids": IDS[0]}, "must be [sequences, tokens], and have shape (10,)"),
    ],
)
def test_what_is_no_batch_is_refused_in_words(raw: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        complete(raw)
    assert words in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- kinds of data


def test_a_dataset_brings_its_order_and_its_bytes() -> None:
    dataset = get_dataset("sample", BPETokenizer.bytes(), block_size=64, seed=5)
    source = source_of(dataset, seed=1, block_size=64)
    assert (source.sequences, source.tokens, source.num_bytes) == (len(dataset), dataset.num_tokens, dataset.num_bytes)
    assert source.fingerprint == dataset.fingerprint
    first = next(source.training(0, 4, 1, ALL))
    np.testing.assert_array_equal(first["labels"][0], [dataset[i]["labels"] for i in range(4)])


def test_a_mixture_is_trained_on_in_its_order_and_evaluated_on_as_a_whole() -> None:
    dataset = get_dataset("sample", BPETokenizer.bytes(), block_size=64)
    mixed = MixedDataset({"a": dataset, "b": dataset}, [1, 2], seed=3)
    source = source_of(mixed, block_size=64)
    assert (source.sequences, source.tokens, source.num_bytes) == (2 * len(dataset), 2 * dataset.num_tokens, 2 * dataset.num_bytes)
    assert source.fingerprint == mixed.fingerprint
    np.testing.assert_array_equal(next(source.training(2, 4, 3, ALL))["labels"].reshape(12, 64), mixed.order.at(np.arange(24, 36))["labels"])
    assert sum(int(batch["loss_mask"].sum()) for batch in source.evaluation(4, ALL)) == mixed.num_tokens


class Growing:
    """A corpus that is complete."""

    tokenizer, key, closed = BPETokenizer.bytes(), "content", False

    def split(self, name: str, tokens: int | None) -> tuple[StoreSplit, bool]:
        return StoreSplit([MemoryShard([np.arange(3, 100)], 2)]) if name == "train" else StoreSplit([]), True

    def close(self) -> None:
        self.closed = True


def test_a_growing_corpus_has_an_order_and_no_length() -> None:
    corpus = Growing()
    source, held_out = source_of(Streamed(corpus, 8, seed=1)), source_of(FirstWindows(corpus, 8))
    assert (source.sequences, source.tokens, source.num_bytes) == (None, None, None)
    assert source.fingerprint == held_out.fingerprint == "stream:content"
    assert next(source.training(1, 4, 2, ALL))["labels"].shape == (2, 4, 8)
    assert held_out.sequences == 0
    assert list(held_out.evaluation(4, ALL)) == []
    with pytest.raises(UserError, match="Give its FirstWindows"):
        source.evaluation(4, ALL)
    with pytest.raises(UserError, match="there only to evaluate on"):
        held_out.training(0, 4, 1, ALL)
    held_out.close()
    assert not corpus.closed
    source.close()
    assert corpus.closed


def test_token_lists_are_documents() -> None:
    source = source_of([[5, 6, 7], [8], [9] * 20])
    assert source.tokens == 4 + 2 + 21, "each with its EOS"
    assert source.sequences == 4
    (batch,) = source.evaluation(4, ALL)
    np.testing.assert_array_equal(batch["input_ids"][0], [1, 5, 6, 7, 1, 8, 1, 9])
    np.testing.assert_array_equal(batch["labels"][0], [5, 6, 7, 2, 8, 2, 9, 9])
    np.testing.assert_array_equal(batch["segment_ids"][0], [1, 1, 1, 1, 2, 2, 3, 3])
    assert source.fingerprint == source_of([[5, 6, 7], [8], [9] * 20]).fingerprint
    assert source.fingerprint != source_of([[5, 6, 7, 8], [9] * 20]).fingerprint


def test_packed_windows_and_items_are_read_in_a_seeded_order() -> None:
    packed = PackedDataset(StoreSplit([MemoryShard([np.arange(3, 100)], 2)]), 8, 1, 0)
    items = [packed[i] for i in range(len(packed))]
    for data in (packed, items):
        source = source_of(data)
        assert source.sequences == len(packed)
        whole = [next(source.training(step, 4, 2, ALL)) for step in range(3)]
        resumed = source.training(1, 4, 2, ALL)
        for batch in whole[1:]:
            assert batch["labels"].shape == (2, 4, 8)
            np.testing.assert_array_equal(next(resumed)["labels"], batch["labels"])
        np.testing.assert_array_equal(next(source.training(0, 4, 2, np.array([1, 3])))["labels"], whole[0]["labels"][:, [1, 3]])


class TorchDataset(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(9) + i}


def test_a_dataset_of_torch_is_read_item_by_item() -> None:
    source = source_of(TorchDataset())
    assert source.sequences == 10
    (first, *_, last) = source.evaluation(4, ALL)
    np.testing.assert_array_equal(first["labels"], np.arange(1, 9) + np.arange(4)[:, None])
    np.testing.assert_array_equal(last["loss_mask"].any(1), [True, True, False, False])


def test_a_data_loader_of_torch_goes_round_and_a_resume_skips() -> None:
    source = source_of(DataLoader(TorchDataset(), batch_size=4, drop_last=True))
    assert source.sequences is None
    batches = source.training(0, 4, 1, ALL)
    found = [next(batches)["input_ids"][0, :, 0].tolist() for _ in range(5)]
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    resumed = source.training(1, 4, 2, ALL)
    assert next(resumed)["input_ids"][:, :, 0].tolist() == found[2:4]


def test_a_short_last_batch_is_padded_in_evaluation_and_refused_in_training() -> None:
    source = source_of(DataLoader(TorchDataset(), batch_size=4))
    *_, last = source.evaluation(4, ALL)
    np.testing.assert_array_equal(last["loss_mask"].any(1), [True, True, False, False])
    with pytest.raises(UserError, match=r"A batch has 2 sequences, and batch_size is 4\. .*drop_last=True"):
        list(source.training(0, 4, 3, ALL))
    with pytest.raises(UserError, match="A batch has 4 sequences, and batch_size is 2"):
        list(source_of(DataLoader(TorchDataset(), batch_size=4), batch_size=2).evaluation(2, np.arange(2)))


def test_batches_in_halves_are_the_same_steps_and_the_same_evaluation() -> None:
    """As --auto_batch has them."""
    source, both = source_of(DataLoader(TorchDataset(), batch_size=4, drop_last=True)), np.arange(2)
    whole, halves = source.training(1, 4, 2, ALL), source.training(1, 2, 4, both)
    for _ in range(3):
        one, other = next(whole), next(halves)
        assert other["labels"].shape == (4, 2, 8)
        np.testing.assert_array_equal(one["labels"].reshape(8, 8), other["labels"].reshape(8, 8))
    short = source_of(DataLoader(TorchDataset(), batch_size=4))
    found = [np.concatenate([batch["labels"] for batch in batches]) for batches in (short.evaluation(4, ALL), short.evaluation(2, both))]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("data", "tokens"),
    [
        (DataLoader(TorchDataset(), batch_size=4), 8),
        (TorchDataset(), 8),
        ([{"input_ids": IDS[0], "labels": IDS[0] + 1}], 10),
        ([{"input_ids": IDS[0, :n]} for n in (10, 9)], 8),
        (PackedDataset(StoreSplit([MemoryShard([np.arange(3, 100)], 2)]), 8, 1, 0), 8),
        (get_dataset("sample", BPETokenizer.bytes(), block_size=8), 8),
    ],
    ids=["batches", "items", "items with labels", "an item among others", "windows", "dataset"],
)
def test_sequences_of_another_length_are_refused_in_words(data: Any, tokens: int) -> None:
    for read in (lambda source: source.training(0, 4, 1, ALL), lambda source: source.evaluation(4, ALL)):
        with pytest.raises(UserError, match=rf"A sequence of the data has {tokens} tokens, and max_tokens is 9\. Make them equal"):
            next(read(source_of(data, block_size=9)))


def test_a_generator_ends() -> None:
    def three() -> Iterator[dict[str, np.ndarray]]:
        for _ in range(3):
            yield {"input_ids": IDS}

    assert len(list(source_of(three(), batch_size=2, block_size=9).training(0, 2, 2, np.arange(2)))) == 1, "a half step is no step"


@pytest.mark.parametrize(
    ("data", "changes", "words"),
    [
        (3, {}, "type int is not supported"),
        ([], {}, "training data is empty"),
        ([[1, 2], [3]], {"bos_id": None}, "needs to know BOS and EOS"),
        ([[[1, 2]], [[3, 4]]], {}, "must hold lists of token ids"),
    ],
)
def test_what_is_no_data_is_refused_in_words(data: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        source_of(data, **changes)
