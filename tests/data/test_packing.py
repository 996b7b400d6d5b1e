import itertools
import random
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consyn_jax.data import packing
from consyn_jax.data.packing import (
    PackedDataset,
    PackedSequences,
    Sequences,
    WholeDocuments,
    best_fit_decreasing,
)
from consyn_jax.data.store import TokenStore, TokenStoreWriter
from consyn_jax.data.store.shards import MemoryShard
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.parameters import layout
from consyn_jax.model_config import ModelConfig
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.loss import LossSums, cross_entropy

BOS, EOS, PAD = 257, 258, 256
BOTH = pytest.mark.parametrize("kind", [PackedDataset, WholeDocuments])

ids = st.lists(st.integers(0, 255), max_size=12)
with_eos = st.lists(
    st.lists(st.lists(st.sampled_from([1, 2, EOS]), max_size=12), min_size=1, max_size=6),
    min_size=1,
    max_size=4,
)
shards = st.lists(st.lists(ids, min_size=1, max_size=6), min_size=1, max_size=4)


def split_of(documents: list[list[list[int]]]) -> StoreSplit:
    return StoreSplit(
        [
            MemoryShard([np.array([*ids, EOS], np.int64) for ids in shard], EOS)
            for shard in documents
        ]
    )


def reference(documents: list[list[list[int]]], block_size: int) -> Sequences:
    """The windows by the definition, one token at a time."""
    stream = [
        (token, ([BOS, *ids])[t], number)
        for number, ids in enumerate(d for shard in documents for d in shard)
        for t, token in enumerate([*ids, EOS])
    ]
    rows: dict[str, list[list[int]]] = {
        "input_ids": [],
        "labels": [],
        "segment_ids": [],
        "loss_mask": [],
    }
    for start in range(0, len(stream), block_size):
        window = stream[start : start + block_size]
        padding = block_size - len(window)
        rows["labels"].append([token for token, _, _ in window] + [PAD] * padding)
        rows["input_ids"].append([token for _, token, _ in window] + [PAD] * padding)
        rows["segment_ids"].append(
            [number - window[0][2] + 1 for _, _, number in window] + [0] * padding
        )
        rows["loss_mask"].append([1] * len(window) + [0] * padding)
    return {name: np.array(values) for name, values in rows.items()}


@BOTH
@given(
    documents=st.lists(st.lists(st.sampled_from([1, 2, 3, BOS]), max_size=7), min_size=1),
    bos=st.sampled_from([BOS, None]),
    block_size=st.integers(8, 20),
)
def test_what_a_document_without_bos_in_front_learns(
    kind: type[PackedSequences], documents: list[list[int]], bos: int | None, block_size: int
) -> None:
    """With no BOS, or one that a document has already, the first token is an input only."""
    packed = kind(split_of([documents]), block_size, bos, PAD)
    rows = packed.rows(range(len(packed)))
    expected: Counter[tuple[int, ...]] = Counter()
    for document in documents:
        whole = (*document, EOS)
        has_front = bos is not None and whole[0] != bos
        inputs = (*([bos] if has_front else []), *whole)
        expected.update(itertools.pairwise(inputs))
    learned = rows["loss_mask"]
    assert expected == Counter(
        zip(rows["input_ids"][learned].tolist(), rows["labels"][learned].tolist(), strict=True)
    )
    assert (rows["segment_ids"][learned] > 0).all()
    assert packed.num_targets == (learned.sum() if bos is None else packed.num_tokens)
    if kind is WholeDocuments:
        assert segments_of(rows) == Counter(
            (*([bos] if bos is not None and d[:1] != [bos] else []), *d)
            for d in documents
            if d or bos is not None
        )


def segments_of(rows: Sequences) -> Counter[tuple[int, ...]]:
    """The inputs of each segment that learns something."""
    found: Counter[tuple[int, ...]] = Counter()
    for ids, segments, mask in zip(
        rows["input_ids"], rows["segment_ids"], rows["loss_mask"], strict=True
    ):
        for number in {*segments[mask].tolist()}:
            found[tuple(ids[segments == number].tolist())] += 1
    return found


@given(
    documents=shards | with_eos,
    block_size=st.integers(1, 20),
    order=st.randoms(use_true_random=False),
)
def test_windows_match_the_definition_in_any_order_and_over_shards(
    documents: list[list[list[int]]], block_size: int, order: random.Random
) -> None:
    packed = PackedDataset(split_of(documents), block_size, BOS, PAD)
    expected = reference(documents, block_size)
    assert len(packed) == len(expected["labels"])
    indices = [*range(len(packed)), 0]
    order.shuffle(indices)
    rows = packed.rows(indices)
    for name, values in rows.items():
        np.testing.assert_array_equal(values, expected[name][indices], err_msg=name)
        assert values.dtype == (np.bool_ if name == "loss_mask" else np.int32)


@given(documents=shards, block_size=st.integers(1, 20))
def test_every_token_is_a_label_exactly_once_an_epoch(
    documents: list[list[list[int]]], block_size: int
) -> None:
    packed = PackedDataset(split_of(documents), block_size, BOS, PAD)
    rows = packed.rows(np.arange(len(packed)))
    assert rows["labels"][rows["loss_mask"]].tolist() == [
        token for shard in documents for ids in shard for token in (*ids, EOS)
    ]
    assert rows["loss_mask"].sum() == packed.num_tokens
    assert not (rows["input_ids"] == EOS).any()
    assert ((rows["segment_ids"] == 0) == ~rows["loss_mask"]).all()


@given(documents=shards, block_size=st.integers(1, 20))
def test_within_a_segment_each_label_is_the_next_input(
    documents: list[list[list[int]]], block_size: int
) -> None:
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
    split = StoreSplit(
        [MemoryShard([np.array([1, 2]), np.array([3, EOS]), np.array([], np.int64)], EOS)]
    )
    assert PackedDataset(split, 6, BOS, PAD)[0]["labels"].tolist() == [1, 2, EOS, 3, EOS, EOS]
    assert split.num_bytes is None


def test_a_store_on_disk_gives_the_same_windows(tmp_path: Path) -> None:
    tokenizer = BPETokenizer.bytes()
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, n).tolist() for n in rng.integers(0, 40, 100)]
    with TokenStoreWriter(tmp_path / "store", tokenizer, shard_tokens=300) as writer:
        writer.add_many("train", documents, [len(d) for d in documents])
    split = TokenStore(tmp_path / "store").split("train")
    assert len(split.shards) > 3
    packed = PackedDataset(split, 16, tokenizer.bos_token_id, tokenizer.pad_token_id)
    rows = packed.rows(range(len(packed)))
    for name, values in reference([documents], 16).items():
        np.testing.assert_array_equal(rows[name], values, err_msg=name)
    assert (packed.num_documents, packed.num_bytes) == (100, sum(map(len, documents)))


# ---------------------------------------------------------------------------------- whole documents


def pieces(rows: Sequences) -> list[tuple[int, list[int], list[int]]]:
    """(first input, labels, the other inputs) of every segment."""
    found = []
    for i in range(len(rows["labels"])):
        for segment in range(1, rows["segment_ids"][i].max() + 1):
            at = np.flatnonzero(rows["segment_ids"][i] == segment)
            assert (np.diff(at) == 1).all()
            inputs = rows["input_ids"][i, at].tolist()
            found.append((inputs[0], rows["labels"][i, at].tolist(), inputs[1:]))
    return found


@given(documents=shards | with_eos, block_size=st.integers(1, 20))
def test_only_documents_longer_than_a_sequence_are_cut(
    documents: list[list[list[int]]], block_size: int
) -> None:
    packed = WholeDocuments(split_of(documents), block_size, BOS, PAD)
    rows = packed.rows(np.arange(len(packed)))
    expected = []
    for document in ([*ids, EOS] for shard in documents for ids in shard):
        for start in range(0, len(document), block_size):
            labels = document[start : start + block_size]
            expected.append((document[start - 1] if start else BOS, labels, labels[:-1]))
    assert sorted(pieces(rows)) == sorted(expected)
    assert rows["loss_mask"].sum() == packed.num_tokens == packed.num_targets
    padding = rows["segment_ids"] == 0
    assert (padding == ~rows["loss_mask"]).all()
    assert (rows["labels"][padding] == PAD).all()
    assert (rows["input_ids"][padding] == PAD).all()
    assert packed.padding_fraction == pytest.approx(padding.mean())
    for i in (0, -1):
        for name, values in packed[i].items():
            np.testing.assert_array_equal(values, rows[name][i])
            assert values.dtype == (np.bool_ if name == "loss_mask" else np.int32)


@BOTH
@given(documents=shards | with_eos, block_size=st.integers(1, 20), seed=st.integers(0, 99))
def test_every_target_is_counted_exactly_once_an_epoch(
    kind: type[PackedSequences], documents: list[list[list[int]]], block_size: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    marks = [[rng.integers(0, 2, len(ids) + 1) for ids in shard] for shard in documents]
    split = StoreSplit(
        [
            MemoryShard([np.array([*ids, EOS]) for ids in shard], EOS, marks)
            for shard, marks in zip(documents, marks, strict=True)
        ]
    )
    packed = kind(split, block_size, BOS, PAD)
    rows = packed.rows(np.arange(len(packed)))
    stream = np.array([token for shard in documents for ids in shard for token in (*ids, EOS)])
    chosen = np.concatenate([m for shard in marks for m in shard]).astype(bool)
    assert Counter(rows["labels"][rows["loss_mask"]].tolist()) == Counter(stream[chosen].tolist())
    assert Counter(rows["labels"][rows["segment_ids"] > 0].tolist()) == Counter(stream.tolist())
    assert (packed.num_tokens, packed.num_targets) == (len(stream), chosen.sum())
    if kind is PackedDataset:
        assert rows["labels"][rows["loss_mask"]].tolist() == stream[chosen].tolist()


def slow_best_fit_decreasing(lengths: list[int], size: int) -> list[int]:
    """The sum of each bin, by the definition."""
    bins: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, held in enumerate(bins) if held + length <= size]
        if fitting:
            bins[max(fitting, key=lambda i: bins[i])] += length
        else:
            bins.append(length)
    return bins


@given(size=st.integers(1, 40), data=st.data())
def test_best_fit_decreasing_matches_its_definition(size: int, data: st.DataObject) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(1, size), min_size=1, max_size=60)), np.int64)
    bins = best_fit_decreasing(lengths, size)
    assert sorted(np.bincount(bins, weights=lengths)) == sorted(
        slow_best_fit_decreasing(lengths.tolist(), size)
    )


def test_groups_are_planned_separately_and_plans_are_deterministic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, n) for n in rng.integers(0, 50, 500)]
    split = StoreSplit([MemoryShard(documents[at : at + 120], EOS) for at in range(0, 500, 120)])
    monkeypatch.setattr(packing, "GROUP_DOCUMENTS", 50)
    packed, again = WholeDocuments(split, 64, BOS, PAD), WholeDocuments(split, 64, BOS, PAD)
    for name, values in packed.rows(range(len(packed))).items():
        np.testing.assert_array_equal(values, again.rows(range(len(packed)))[name])
    starts, ends = packed._starts, packed._pieces
    ordered = np.concatenate(list(split.document_starts()))
    group = [
        set((np.searchsorted(ordered, starts[a:b]) // 50).tolist())
        for a, b in itertools.pairwise(ends)
    ]
    assert all(len(numbers) == 1 for numbers in group)
    assert packed.padding_fraction < 0.1
    assert len(packed.rows(range(len(packed)))["labels"]) == len(packed)


def test_many_documents_need_little_padding() -> None:
    rng = np.random.default_rng(1)
    documents = [
        np.zeros(n, np.int64) for n in np.minimum(rng.lognormal(4, 1, 5000).astype(int), 3000)
    ]
    assert (
        WholeDocuments(StoreSplit([MemoryShard(documents, EOS)]), 512, BOS, PAD).padding_fraction
        < 0.002
    )


def test_an_empty_split_has_no_sequences() -> None:
    for kind in (PackedDataset, WholeDocuments):
        packed = kind(StoreSplit([]), 8, BOS, PAD)
        assert (len(packed), packed.num_tokens, packed.padding_fraction) == (0, 0, 0.0)
        with pytest.raises(ValueError, match="block_size must be at least 1, not 0"):
            kind(StoreSplit([]), 0, BOS, PAD)


def test_every_token_of_a_list_needs_a_target_mark() -> None:
    documents = [np.array([1, 2]), np.array([3])]
    split = StoreSplit([MemoryShard(documents, EOS, [np.array([0, 1]), np.array([0, 0])])])
    assert PackedDataset(split, 5, BOS, PAD)[0]["loss_mask"].tolist() == [
        False,
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(ValueError, match="as many targets"):
        MemoryShard(documents, EOS, [np.array([0, 1]), np.array([0, 1, 1])])


# --------------------------------------------------------------------------------------------- loss

MODEL = ModelConfig(
    vocab_size=259,
    hidden_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    context=64,
)


@pytest.fixture(scope="module")
def loss() -> "partial[LossSums]":
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32),
        layout(MODEL).shapes,
    )

    @jax.jit
    def sums(params: object, batch: dict[str, jax.Array]) -> LossSums:
        return cross_entropy(
            ConsynLMHeadModel.from_parameters(MODEL, params)(
                batch["input_ids"], batch["segment_ids"]
            ),
            batch["labels"],
            batch["loss_mask"],
        )

    return partial(sums, params)


@BOTH
@pytest.mark.parametrize("targeted", [False, True])
def test_the_loss_of_packed_documents_is_the_sum_over_separate_ones(
    kind: type[PackedSequences], targeted: bool, loss: "partial[LossSums]"
) -> None:
    """Documents are laid out so that neither `WholeDocuments` nor windows cut any."""
    rng = np.random.default_rng(2)
    lengths = [[9, 1, 22], [32], [5, 5, 5, 5, 12], [31, 1], [10, 20]]  # with EOS; windows of 32
    documents = [rng.integers(0, 256, n - 1) for row in lengths for n in row]
    marks = [np.append(rng.integers(0, 2, len(ids)), 1) for ids in documents] if targeted else None
    packed = kind(StoreSplit([MemoryShard(documents, EOS, marks)]), 32, BOS, PAD)
    together = loss(packed.rows(range(len(packed))))
    alone = []
    for i, document in enumerate(documents):
        one = PackedDataset(
            StoreSplit([MemoryShard([document], EOS, marks and [marks[i]])]), 32, BOS, PAD
        )
        batch = one.rows(range(len(one)))
        assert len(batch["labels"]) == 1
        np.testing.assert_array_equal(batch["input_ids"][0, : len(document) + 1], [BOS, *document])
        alone.append(
            loss(
                {
                    name: np.pad(values, ((0, len(packed) - 1), (0, 0)))
                    for name, values in batch.items()
                }
            )
        )  # one shape, compiled once
    for name in ("nll", "tokens", "correct"):
        assert float(getattr(together, name)) == pytest.approx(
            sum(float(getattr(sums, name)) for sums in alone), rel=1e-5
        ), name
    assert together.tokens == packed.num_targets


@BOTH
def test_tokens_that_are_no_targets_are_still_inputs(
    kind: type[PackedSequences], loss: "partial[LossSums]"
) -> None:
    """A prompt that is not in the loss changes the loss of the completion."""
    rows = [
        loss(
            kind(
                StoreSplit(
                    [MemoryShard([np.array([prompt, 7, 7, 7])], EOS, [np.array([0, 1, 1, 1])])]
                ),
                32,
                BOS,
                PAD,
            ).rows([0] * 5)
        )
        for prompt in (3, 99)
    ]
    assert rows[0].tokens == rows[1].tokens == 20
    assert abs(float(rows[0].nll - rows[1].nll)) > 1e-3
