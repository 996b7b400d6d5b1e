import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_token_files import STREAM, Writer, llm_c, llm_c_llama, look, nanogpt, npy

from consyn_jax.data.packing import PackedDataset, WholeDocuments
from consyn_jax.data.preparation.cached_store import Prepared, prepare
from consyn_jax.data.store import file_hashes, number_file
from consyn_jax.data.store.raw_tokens import RawTokens
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.errors import UserError
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.tokenization import BPETokenizer

BYTES = BPETokenizer.bytes()
BOS, EOS, PAD = BYTES.bos_token_id, BYTES.eos_token_id, BYTES.pad_token_id


class Large(BPETokenizer):
    """The part of a tokenizer with more than 65,536 tokens that token files need."""

    vocab_size, eos_token_id, sha256 = 100_000, 99_999, "large"  # type: ignore[assignment]

    def __init__(self) -> None: ...


def all_of(split: StoreSplit) -> list[int]:
    out = np.empty(split.num_tokens, np.int64)
    split.read(0, out)
    return out.tolist()


@pytest.mark.parametrize(
    ("name", "write", "kind"),
    [
        ("train.bin", nanogpt, "nanogpt"),
        ("fineweb_train_000001.bin", llm_c, "llm.c"),
        ("llama_train_000001.bin", llm_c_llama, "llm.c"),
        ("a.npy", npy, "npy"),
        ("b.npy", lambda path, tokens: npy(path, tokens.astype(np.uint16)), "npy"),
        ("c.npy", lambda path, tokens: npy(path, tokens.astype(np.int32)), "npy"),
        (
            "d.npy",
            lambda path, tokens: npy(
                path, tokens.astype(np.uint32).reshape(-1, 5 if len(tokens) == 10 else 3)
            ),
            "npy",
        ),
    ],
)
def test_token_files_of_every_kind_are_read(
    tmp_path: Path, name: str, write: Writer, kind: str
) -> None:
    path = write(tmp_path / name, STREAM)
    assert look(path) == (kind, "")
    store = RawTokens([path], BYTES, validation=[write(tmp_path / f"other-{name}", STREAM[:3])])
    assert all_of(store.split("train")) == STREAM.tolist()
    assert all_of(store.split("validation")) == [1, 2, EOS]
    assert store.split("test").num_tokens == 0
    assert store.split("train").shards[0].starts.tolist() == [0, 3, 5, 9]
    assert (store.split("train").num_documents, store.split("train").num_bytes) == (None, None)
    assert (store.vocab_size, store.tokenizer) == (259, BYTES)


def test_large_vocabularies_make_nanogpts_tokens_four_bytes(tmp_path: Path) -> None:
    tokens = np.array([5, 70_000, 99_999, 3], np.uint32)
    tokens.tofile(tmp_path / "train.bin")
    store = RawTokens([tmp_path / "train.bin"], Large(), validation_fraction=0.0)
    assert all_of(store.split("train")) == tokens.tolist()
    tokens.tofile(tmp_path / "odd.bin")
    with (tmp_path / "odd.bin").open("ab") as file:
        file.write(b"12")
    with pytest.raises(
        UserError,
        match=r"odd\.bin has 18 bytes, which is not a multiple of 4, the size",
    ):
        RawTokens([tmp_path / "odd.bin"], Large())


@given(
    files=st.lists(
        st.lists(st.sampled_from([1, 2, 3, EOS]), min_size=1, max_size=20), min_size=1, max_size=4
    ),
    fraction=st.sampled_from([0.0, 0.01, 0.3, 0.99]),
    block_size=st.integers(1, 12),
)
def test_the_stream_is_cut_and_packed_like_a_slow_reference(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[list[int]],
    fraction: float,
    block_size: int,
) -> None:
    directory = tmp_path_factory.mktemp("raw")
    paths = [nanogpt(directory / f"{i}.bin", np.array(tokens)) for i, tokens in enumerate(files)]
    stream = [token for tokens in files for token in tokens]
    cut = int((1 - fraction) * len(stream))
    cut = next((p for p in range(max(cut, 1), len(stream)) if stream[p - 1] == EOS), cut)
    store = RawTokens(paths, BYTES, validation_fraction=fraction)
    for name, part in (("train", stream[:cut]), ("validation", stream[cut:])):
        split = store.split(name)
        assert (all_of(split), split.num_tokens, split.num_targets) == (part, len(part), len(part))
        begins = [p for p in range(len(part)) if p == 0 or part[p - 1] == EOS]
        assert [p for starts in split.document_starts() for p in starts] == begins
        packed = PackedDataset(split, block_size, BOS, PAD)
        rows = packed.rows(range(len(packed)))
        assert rows["labels"][rows["loss_mask"]].tolist() == part
        assert rows["input_ids"][rows["loss_mask"]].tolist() == [
            BOS if p in begins else part[p - 1] for p in range(len(part))
        ]
        for first, segments in zip(
            range(0, len(part), block_size), rows["segment_ids"], strict=True
        ):
            document = [
                sum(start <= p for start in begins)
                for p in range(first, min(first + block_size, len(part)))
            ]
            assert segments.tolist() == [d - document[0] + 1 for d in document] + [0] * (
                block_size - len(document)
            )
        whole = WholeDocuments(split, block_size, BOS, PAD)
        rows = whole.rows(range(len(whole)))
        assert sorted(rows["labels"][rows["loss_mask"]].tolist()) == sorted(part)


def test_a_bin_of_wider_numbers_is_refused(tmp_path: Path) -> None:
    ids = np.arange(200) % 60
    for kind in (np.uint32, np.int64):
        ids.astype(kind).tofile(tmp_path / "train.bin")
        with pytest.raises(
            UserError, match=r"32 bits or more.* Write the file as uint16, or as \.npy\."
        ):
            all_of(RawTokens([tmp_path / "train.bin"], BYTES).split("train"))
    ids.astype(np.uint16).tofile(tmp_path / "train.bin")
    assert all_of(
        RawTokens([tmp_path / "train.bin"], BYTES, validation_fraction=0.0).split("train")
    )
    with pytest.raises(UserError, match="or write it as uint32 for this tokenizer"):
        all_of(RawTokens([tmp_path / "train.bin"], Large()).split("train"))


def test_a_stream_without_eos_is_cut_by_the_fraction(tmp_path: Path) -> None:
    store = RawTokens(
        [nanogpt(tmp_path / "shakespeare.bin", np.arange(200) % 60)], BYTES, validation_fraction=0.1
    )
    assert (store.split("train").num_tokens, store.split("validation").num_tokens) == (180, 20)
    assert next(iter(store.split("train").document_starts())).tolist() == [0]


def test_names_decide_the_split_unless_validation_files_are_given(tmp_path: Path) -> None:
    names = [
        "train.bin",
        "val.bin",
        "fw_val_000000.bin",
        "valid.npy",
        "validation-1.npy",
        "x_test_0.bin",
        "evaluation.npy",
        "trivial.bin",
    ]
    paths = [
        (npy if name.endswith("npy") else nanogpt)(tmp_path / name, np.array([i, EOS]))
        for i, name in enumerate(names)
    ]
    store = RawTokens(paths, BYTES)
    found = {name: all_of(store.split(name))[::2] for name in ("train", "validation", "test")}
    assert found == {"train": [0, 7], "validation": [1, 2, 3, 4], "test": [5, 6]}
    store = RawTokens(paths[:2], BYTES, validation=[paths[5]])
    assert {name: all_of(split)[::2] for name, split in store.splits.items()} == {
        "train": [0, 1],
        "validation": [5],
    }
    with pytest.raises(
        UserError, match=r"all token files mark them as validation or test data \(.*val\.bin"
    ):
        RawTokens(paths[1:3], BYTES)


def test_documents_continue_in_the_next_file(tmp_path: Path) -> None:
    paths = [
        nanogpt(tmp_path / f"{i}.bin", np.array(tokens))
        for i, tokens in enumerate([[1, 2], [3], [4, EOS], [5]])
    ]
    split = RawTokens(paths, BYTES, validation_fraction=0.0).split("train")
    assert PackedDataset(split, 6, BOS, PAD).rows([0])["segment_ids"].tolist() == [
        [1, 1, 1, 1, 1, 2]
    ]
    assert WholeDocuments(split, 5, BOS, PAD).rows([0])["input_ids"].tolist() == [[BOS, 1, 2, 3, 4]]


def test_the_fingerprint_follows_content_order_and_split(tmp_path: Path) -> None:
    a, b = (
        nanogpt(tmp_path / name, np.array(tokens))
        for name, tokens in (("a.bin", [1, 2, EOS, 4]), ("b.bin", [3, EOS]))
    )
    moved = nanogpt(tmp_path / "moved.bin", np.array([1, 2, EOS, 4]))
    first, gone = RawTokens([a, b], BYTES), RawTokens([moved, b], BYTES)
    assert first.fingerprint == RawTokens([moved, b], BYTES).fingerprint
    others = [
        RawTokens([b, a], BYTES),
        RawTokens([a], BYTES),
        RawTokens([a, b], BYTES, validation_fraction=0.9),
        RawTokens([a], BYTES, validation=[b]),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 5
    moved.unlink()
    with pytest.raises(UserError, match=r"moved\.bin cannot be read: No such file"):
        _ = gone.fingerprint


def test_hashes_are_remembered_by_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hashes, "SMALL", 0)
    monkeypatch.setattr(file_hashes, "SETTLED_NS", -1)
    path, asked, hashed = (
        nanogpt(tmp_path / "a.bin", np.array([1, 2, EOS])),
        [],
        hashlib.file_digest,
    )
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, name: asked.append(file.name) or hashed(file, name)
    )

    def start() -> Prepared:
        return prepare(CorpusOptions(data=(str(path),), tokenizer="bytes"))

    first = start()
    assert not asked
    assert first.store.fingerprint == start().store.fingerprint
    assert asked == [str(path)]


@pytest.mark.parametrize(
    ("write", "wrong"),
    [
        (lambda path: nanogpt(path / "x.bin", np.array([1] * 40 + [300])), 300),
        (lambda path: llm_c_llama(path / "x.bin", np.array([1, 2**32 - 1])), 2**32 - 1),
        (lambda path: npy(path / "x.npy", np.array([1, -1, 3])), -1),
        (lambda path: npy(path / "x.npy", np.array([1, 2**40])), 2**40),
    ],
)
def test_ids_outside_the_vocabulary_are_found_on_the_first_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Path], wrong: int
) -> None:
    monkeypatch.setattr(number_file, "CHUNK_BYTES", 16)
    path = write(tmp_path)
    good = nanogpt(tmp_path / "good.bin", np.array([1, 2, 3]))
    split = RawTokens([good, path], BYTES, validation=[good]).split("train")
    assert PackedDataset(split, 3, BOS, PAD).rows([0])["labels"].tolist() == [[1, 2, 3]]
    for _ in range(2):
        with pytest.raises(
            UserError, match=rf"{path.name} has token id {wrong} at position \d+, but the "
        ):
            PackedDataset(split, 4, BOS, PAD).rows([0])


@pytest.mark.parametrize("chunk", [16, 1 << 20])
def test_a_wrong_id_is_refused_with_its_place(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(number_file, "CHUNK_BYTES", chunk)
    ids = np.array([1, 2, 3, 4, 300, 5, 301, 6])
    ids.astype(np.uint16).tofile(tmp_path / "a.bin")
    np.save(tmp_path / "b.npy", ids.reshape(4, 2).astype(np.int32))
    np.save(tmp_path / "c.npy", np.where(ids == 300, -1, ids).astype(np.int64))
    for name, words in {
        "a.bin": "token id 300 at position 4, but the vocabulary has 259",
        "b.npy": "token id 300 at row 2, column 0, but",
        "c.npy": "token id -1 at position 4, but",
    }.items():
        with pytest.raises(UserError, match=f"{name} has {words}"):
            all_of(RawTokens([tmp_path / name], BYTES, validation_fraction=0.0).split("train"))
