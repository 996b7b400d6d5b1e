import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from consyn_jax.data.order import ids_at
from consyn_jax.data.packing import WholeDocuments
from consyn_jax.errors import UserError
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.accepted_data import check_held_out
from consyn_jax.training.dataset import ConsynDataset, MixedDataset, _check_arguments, get_dataset


def stream(dataset: ConsynDataset) -> np.ndarray:
    tokens = np.empty(dataset.num_tokens, np.int64)
    dataset.packed.split.read(0, tokens)
    return tokens


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.bytes()


def test_item_i_is_a_function_of_seed_and_i(tokenizer: BPETokenizer) -> None:
    dataset = get_dataset("sample", tokenizer, block_size=128, seed=7)
    order = ids_at(7, np.arange(len(dataset)), len(dataset))
    for i in (0, 1, len(dataset) - 1, -1):
        expected = dataset.packed[int(order[i])]
        for name, values in dataset[i].items():
            np.testing.assert_array_equal(values, expected[name])
            assert values.shape == (128,)
            assert values.dtype == (np.bool_ if name == "loss_mask" else np.int32)
    other = get_dataset("sample", tokenizer, block_size=128, seed=8)
    assert any((other[i]["labels"] != dataset[i]["labels"]).any() for i in range(5))
    for i in range(5):
        np.testing.assert_array_equal(dataset.with_seed(8)[i]["labels"], other[i]["labels"])
    np.testing.assert_array_equal(dataset[-len(dataset)]["labels"], dataset[0]["labels"])
    for i in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError):
            dataset[i]


def test_a_pass_over_the_items_has_every_token_once(tokenizer: BPETokenizer) -> None:
    dataset = get_dataset("sample", tokenizer, block_size=256)
    labels = np.concatenate([item["labels"][item["loss_mask"]] for item in dataset])
    np.testing.assert_array_equal(np.sort(labels), np.sort(stream(dataset)))
    assert len(labels) == dataset.num_tokens == dataset.num_bytes + dataset.num_documents


def test_validation_keeps_the_order_of_the_store(tokenizer: BPETokenizer) -> None:
    dataset = get_dataset(
        "sample", tokenizer, block_size=64, split="validation", validation_fraction=0.2
    )
    labels = np.concatenate([item["labels"][item["loss_mask"]] for item in dataset])
    np.testing.assert_array_equal(labels, stream(dataset))


def test_the_fingerprint_depends_on_the_data(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    first = get_dataset(tmp_path / "a.txt", tokenizer, 16, validation_fraction=0.1)
    assert (
        get_dataset(
            [tmp_path / "a.txt"], tokenizer, 32, seed=1, validation_fraction=0.1
        ).fingerprint
        == first.fingerprint
    )
    (tmp_path / "a.txt").write_text("other text " * 100)
    assert (
        get_dataset(tmp_path / "a.txt", tokenizer, 16, validation_fraction=0.1).fingerprint
        != first.fingerprint
    )
    assert first.tokenizer.sha256 == tokenizer.sha256


def test_omissions_are_warned_of(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.png").write_bytes(b"\0")
    with pytest.warns(UserWarning, match=r"b\.png is left out: it is binary"):
        get_dataset(tmp_path, tokenizer, 4)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.warns(UserWarning, match="1 bad rows were left out. The first one: .*rows"):
        assert (
            get_dataset(
                rows, tokenizer, 4, on_bad_rows="skip", validation_fraction=0.0
            ).num_documents
            == 1
        )


def test_the_test_split_and_the_options_of_preparation(
    tokenizer: BPETokenizer, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(f'{{"a": {{"b": "text number {i}"}}}}\n' for i in range(200))
        + '{"a": {"b": "text number 0"}}\n'
    )
    options = {
        "text_key": "a.b",
        "test_fraction": 0.3,
        "validation_fraction": 0.2,
        "block_size": 16,
    }
    splits = {
        name: get_dataset(rows, tokenizer, split=name, **options)
        for name in ("train", "validation", "test")
    }
    counts = {name: dataset.num_documents or 0 for name, dataset in splits.items()}
    assert sum(counts.values()) == 200
    assert counts["train"] > counts["test"] > counts["validation"] > 0
    assert len({dataset.fingerprint for dataset in splits.values()}) == 1
    kept = [
        get_dataset(
            rows, tokenizer, 16, text_key="a.b", validation_fraction=0.0, deduplicate=value
        ).num_documents
        for value in (True, False)
    ]
    assert kept == [200, 201]


def test_a_tokenizer_of_another_library_is_answered_with_its_name() -> None:
    theirs = SimpleNamespace(name_or_path="some/model")
    with pytest.raises(UserError, match=r"tokenizer is a Simple.*: tokenizer='some/model'\.$"):
        _check_arguments(theirs, {}, {}, {})


def test_whole_documents(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{"x" * (i % 13 + 1)}{i}"}}\n' for i in range(100)))
    dataset = get_dataset(rows, tokenizer, 20, packing="whole", validation_fraction=0.0)
    assert isinstance(dataset.packed, WholeDocuments)
    assert sum(int(item["loss_mask"].sum()) for item in dataset) == dataset.num_tokens
    assert all(
        (item["input_ids"][item["segment_ids"] > 0][:1] == tokenizer.bos_token_id).all()
        for item in dataset
    )


def test_what_long_rows_lose_is_said(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    long = json.dumps({"prompt": "p" * 60, "completion": "c"})
    rows.write_text(json.dumps({"prompt": "p", "completion": "c"}) + f"\n{long}\n")
    with pytest.warns(UserWarning, match=r"^1 row longer than block_size=16 lost 46 tokens"):
        get_dataset(rows, tokenizer, 16, validation_fraction=0.0)
    for on_long_rows, number in ((None, 1), ("drop", 2)):
        rows.write_text(f"{long}\n" * number)
        with pytest.raises(
            UserError, match=r"sequence of 16 tokens, so no target is left to learn"
        ):
            get_dataset(rows, tokenizer, 16, validation_fraction=0.0, on_long_rows=on_long_rows)


# ----------------------------------------------------------------------------------------- mixtures


def texts(path: Path, word: str, count: int) -> Path:
    path.write_text("".join(f'{{"text": "{word} {i}"}}\n' for i in range(count)))
    return path


def test_a_mixture_is_weighted_in_training_and_whole_in_evaluation(
    tokenizer: BPETokenizer, tmp_path: Path
) -> None:
    sources = {
        name: get_dataset(
            texts(tmp_path / f"{name}.jsonl", name, n), tokenizer, 16, validation_fraction=0.0
        )
        for name, n in (("a", 50), ("b", 300))
    }
    mixed = MixedDataset(sources, [3, 1], seed=5)
    assert len(mixed) == len(sources["a"]) + len(sources["b"])
    assert (mixed.num_tokens, mixed.num_bytes) == tuple(
        sum(getattr(d, name) for d in sources.values()) for name in ("num_tokens", "num_bytes")
    )
    taken = mixed.order.at(np.arange(1000))["labels"]
    own = {
        name: {row.tobytes() for row in d.packed.rows(np.arange(len(d)))["labels"]}
        for name, d in sources.items()
    }
    assert (
        sum(row.tobytes() in own["a"] for row in taken)
        == mixed.order.counts(1000)["a"]
        == pytest.approx(750, abs=40)
    )
    both = mixed.rows(np.arange(len(mixed)))
    assert both["loss_mask"].sum() == mixed.num_tokens
    again = MixedDataset(sources, [3.0, 1.0], seed=6)
    first = np.arange(9)
    np.testing.assert_array_equal(
        mixed.with_seed(6).order.at(first)["labels"], again.order.at(first)["labels"]
    )
    assert (
        again.fingerprint == mixed.fingerprint != MixedDataset(sources, [1, 1], seed=5).fingerprint
    )
    assert (
        mixed.fingerprint
        != MixedDataset({"a": sources["b"], "b": sources["a"]}, [3, 1], seed=5).fingerprint
    )


def test_datasets_that_cannot_be_mixed(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    files = [texts(tmp_path / f"{name}.jsonl", name, 50) for name in "ab"]
    first = get_dataset(files[0], tokenizer, 16)
    other = BPETokenizer.train_from_iterator(["other words"], 262)
    for second, weights, words in (
        (get_dataset(files[1], other, 16), [1, 1], r"^a and b were made with different tokenizers"),
        (get_dataset(files[1], tokenizer, 8), [1, 1], "sequences of 16 and 8 tokens"),
        (get_dataset(files[1], tokenizer, 16), [1, 0], "above 0"),
        (get_dataset(files[1], tokenizer, 16), [1], "1 weights for 2 sources"),
    ):
        with pytest.raises(UserError, match=words):
            MixedDataset({"a": first, "b": second}, weights, seed=1)
    with pytest.raises(UserError, match="at least one dataset"):
        MixedDataset({}, [], seed=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "no split 'test' in the data. Known: train, validation"),
        (
            {"split": "validation", "validation_fraction": 0.0},
            "The split 'validation' of sample has no documents",
        ),
        ({"block_size": 0}, "block_size must be a whole number of at least 1, not 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"on_long_rows": "cut"}, "on_long_rows 'cut' is not known.* Known: truncate, drop, error"),
        ({"dataset_type": "jsonl"}, "--data sample is text, not JSON rows"),
        ({"packing": "hole"}, r"packing 'hole' is not known; did you mean whole\?"),
        ({"txt_key": "a"}, r"txt_key is not an option of get_dataset; did you mean text_key\?"),
        ({"output": "a"}, r"output is not an option of get_dataset"),
        ({"near_duplicates": 0.1}, "similarity from 0.5 to 1"),
    ],
)
def test_mistakes(tokenizer: BPETokenizer, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_dataset("sample", tokenizer, **options)  # type: ignore[arg-type]


def test_the_arguments_are_those_of_the_documentation(tokenizer: BPETokenizer) -> None:
    """And the least that may be given is the least that is said to be."""
    given = inspect.signature(get_dataset).parameters.values()
    assert {p.name: p.default for p in given if p.kind is not p.VAR_KEYWORD} == {
        "data_path": inspect.Parameter.empty,
        "tokenizer": None,
        "block_size": 1024,
        "dataset_type": "auto",
        "split": "train",
        "seed": 42,
        "packing": None,
        "on_long_rows": None,
        "test_fraction": 0.0,
    }
    least = get_dataset("sample", tokenizer, block_size=1, seed=0)
    assert len(least) == least.num_tokens


def test_jax_is_not_imported() -> None:
    code = "import sys, consyn_jax.training.dataset; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_type_is_public(tokenizer: BPETokenizer) -> None:
    assert isinstance(get_dataset("sample", tokenizer), ConsynDataset)


def test_evaluation_data_that_was_not_held_out_from_the_training_data_is_refused(
    tmp_path: Path,
) -> None:
    tokenizer = BPETokenizer.bytes()
    files = [texts(tmp_path / f"{name}.jsonl", name, 60) for name in ("one", "two")]

    def data(*paths: Path, share: float = 0.2, **more: Any) -> ConsynDataset:
        return get_dataset(list(paths), tokenizer, 16, validation_fraction=share, **more)

    training = data(files[0])
    for held_out in (
        data(files[0], split="validation", share=0.4),
        data(*files, split="validation"),
        data(files[0], split="test", test_fraction=0.3),
        data(files[0], share=0.0),
        MixedDataset({"one": data(files[0], split="validation", share=0.4)}, [1], seed=0),
    ):
        with pytest.raises(UserError, match=r"one\.jsonl with other options than train_data"):
            check_held_out(training, held_out)
    for held_out in (
        data(files[0], split="validation"),
        data(files[1], split="validation", share=0.4),
        data(files[1], share=0.0),
        None,
    ):
        check_held_out(training, held_out)
    named = data(files[0], validation=[str(files[1])], share=0.0)
    check_held_out(named, data(files[1], share=0.0))
    check_held_out(
        data(files[0], share=0.0), data(files[0], validation=[str(files[1])], split="validation")
    )
