import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from consyn_jax.config import UserError
from consyn_jax.data.order import sample_ids
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.dataset import ConsynDataset, get_dataset


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.bytes()


def test_item_i_is_a_function_of_seed_and_i(tokenizer: BPETokenizer) -> None:
    dataset = get_dataset("sample", tokenizer, block_size=128, seed=7)
    order = sample_ids(7, 0, len(dataset), len(dataset))
    for i in (0, 1, len(dataset) - 1, -1):
        expected = dataset.packed[int(order[i])]
        for name, values in dataset[i].items():
            np.testing.assert_array_equal(values, expected[name])
            assert values.shape == (128,)
            assert values.dtype == (np.bool_ if name == "loss_mask" else np.int32)
    other = get_dataset("sample", tokenizer, block_size=128, seed=8)
    assert any((other[i]["labels"] != dataset[i]["labels"]).any() for i in range(5))
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_a_pass_over_the_items_has_every_token_once(tokenizer: BPETokenizer) -> None:
    dataset = get_dataset("sample", tokenizer, block_size=256)
    labels = np.concatenate([item["labels"][item["loss_mask"]] for item in dataset])
    stream = np.concatenate([shard.tokens for shard in dataset.packed.split.shards])
    np.testing.assert_array_equal(np.sort(labels), np.sort(stream))
    assert len(labels) == dataset.num_tokens == dataset.num_bytes + dataset.num_documents


def test_validation_keeps_the_order_of_the_store(tokenizer: BPETokenizer) -> None:
    dataset = get_dataset("sample", tokenizer, block_size=64, split="validation", validation_fraction=0.2)
    labels = np.concatenate([item["labels"][item["loss_mask"]] for item in dataset])
    np.testing.assert_array_equal(labels, np.concatenate([shard.tokens for shard in dataset.packed.split.shards]))


def test_the_fingerprint_is_of_the_data(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    first = get_dataset(tmp_path / "a.txt", tokenizer, 16, validation_fraction=0.1)
    assert get_dataset([tmp_path / "a.txt"], tokenizer, 32, seed=1, validation_fraction=0.1).fingerprint == first.fingerprint
    (tmp_path / "a.txt").write_text("other text " * 100)
    assert get_dataset(tmp_path / "a.txt", tokenizer, 16, validation_fraction=0.1).fingerprint != first.fingerprint
    assert first.tokenizer.sha256 == tokenizer.sha256


def test_what_is_left_out_is_warned_of(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.bin").write_bytes(b"\0")
    with pytest.warns(UserWarning, match=r"b\.bin is left out: it is binary"):
        get_dataset(tmp_path, tokenizer, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "no split 'test' in the data. Known: train, validation"),
        ({"split": "validation", "validation_fraction": 0.0}, "The split 'validation' of sample has no documents"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"dataset_type": "jsonl"}, "--data sample is text, not JSON rows"),
    ],
)
def test_mistakes(tokenizer: BPETokenizer, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_dataset("sample", tokenizer, **options)  # type: ignore[arg-type]


def test_jax_is_not_imported() -> None:
    code = "import sys; from consyn_jax.training.dataset import get_dataset; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_type_is_public(tokenizer: BPETokenizer) -> None:
    assert isinstance(get_dataset("sample", tokenizer), ConsynDataset)
