import hashlib
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consyn_jax.config import CorpusOptions, UserError
from consyn_jax.data import digests, number_file
from consyn_jax.data.packing import PackedDataset, WholeDocuments
from consyn_jax.data.prepare import Prepared, prepare
from consyn_jax.data.raw_tokens import PICKLES, RawTokens, is_named_so, look
from consyn_jax.data.shards import StoreSplit
from consyn_jax.tokenization import BPETokenizer

BYTES = BPETokenizer.bytes()
BOS, EOS, PAD = BYTES.bos_token_id, BYTES.eos_token_id, BYTES.pad_token_id

Writer = Callable[[Path, np.ndarray], Path]


class Large(BPETokenizer):
    """A tokenizer of more than 65,536 tokens, as far as token files ask."""

    vocab_size, eos_token_id, sha256 = 100_000, 99_999, "large"  # type: ignore[assignment]

    def __init__(self) -> None: ...


def nanogpt(path: Path, tokens: np.ndarray) -> Path:
    tokens.astype(np.uint16).tofile(path)
    return path


def llm_c(path: Path, tokens: np.ndarray, magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    """As `write_datafile` in llm.c's dev/data/data_common.py."""
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + tokens.astype(np.uint16 if magic == 20240520 else np.uint32).tobytes())
    return path


def llm_c_llama(path: Path, tokens: np.ndarray) -> Path:
    return llm_c(path, tokens, 20240801, 7)


def npy(path: Path, tokens: np.ndarray) -> Path:
    with path.open("wb") as file:  # np.save would add a suffix
        np.save(file, tokens)
    return path


def all_of(split: StoreSplit) -> list[int]:
    out = np.empty(split.num_tokens, np.int64)
    split.read(0, out)
    return out.tolist()


STREAM = np.array([1, 2, EOS, 3, EOS, 4, 5, 6, EOS, 7])


@pytest.mark.parametrize(
    ("name", "write", "kind"),
    [
        ("train.bin", nanogpt, "nanogpt"),
        ("fineweb_train_000001.bin", llm_c, "llm.c"),
        ("llama_train_000001.bin", llm_c_llama, "llm.c"),
        ("a.npy", npy, "npy"),
        ("b.npy", lambda path, tokens: npy(path, tokens.astype(np.uint16)), "npy"),
        ("c.npy", lambda path, tokens: npy(path, tokens.astype(np.int32)), "npy"),
        ("d.npy", lambda path, tokens: npy(path, tokens.astype(np.uint32).reshape(-1, 5 if len(tokens) == 10 else 3)), "npy"),
    ],
)
def test_every_kind_is_recognised_and_read(tmp_path: Path, name: str, write: Writer, kind: str) -> None:
    path = write(tmp_path / name, STREAM)
    assert is_named_so(path)
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
    with pytest.raises(UserError, match=r"odd\.bin has 18 bytes, not a multiple of the 4 of a vocabulary of 100,000"):
        RawTokens([tmp_path / "odd.bin"], Large())


@given(
    files=st.lists(st.lists(st.sampled_from([1, 2, 3, EOS]), min_size=1, max_size=20), min_size=1, max_size=4),
    fraction=st.sampled_from([0.0, 0.01, 0.3, 0.99]),
    block_size=st.integers(1, 12),
)
def test_the_stream_is_cut_and_packed_as_a_slow_reference_does(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[int]], fraction: float, block_size: int
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
        assert rows["input_ids"][rows["loss_mask"]].tolist() == [BOS if p in begins else part[p - 1] for p in range(len(part))]
        for first, segments in zip(range(0, len(part), block_size), rows["segment_ids"], strict=True):
            document = [sum(start <= p for start in begins) for p in range(first, min(first + block_size, len(part)))]
            assert segments.tolist() == [d - document[0] + 1 for d in document] + [0] * (block_size - len(document))
        whole = WholeDocuments(split, block_size, BOS, PAD)
        rows = whole.rows(range(len(whole)))
        assert sorted(rows["labels"][rows["loss_mask"]].tolist()) == sorted(part)


def test_a_stream_without_eos_is_cut_where_the_fraction_says(tmp_path: Path) -> None:
    store = RawTokens([nanogpt(tmp_path / "shakespeare.bin", np.arange(200) % 60)], BYTES, validation_fraction=0.1)
    assert (store.split("train").num_tokens, store.split("validation").num_tokens) == (180, 20)
    assert next(iter(store.split("train").document_starts())).tolist() == [0]


def test_names_decide_the_split_and_validation_files_come_first(tmp_path: Path) -> None:
    names = ["train.bin", "val.bin", "fw_val_000000.bin", "valid.npy", "validation-1.npy", "x_test_0.bin", "evaluation.npy", "trivial.bin"]
    paths = [(npy if name.endswith("npy") else nanogpt)(tmp_path / name, np.array([i, EOS])) for i, name in enumerate(names)]
    store = RawTokens(paths, BYTES)
    found = {name: all_of(store.split(name))[::2] for name in ("train", "validation", "test")}
    assert found == {"train": [0, 6, 7], "validation": [1, 2, 3, 4], "test": [5]}
    store = RawTokens(paths[:2], BYTES, validation=[paths[5]])
    assert {name: all_of(split)[::2] for name, split in store.splits.items()} == {"train": [0, 1], "validation": [5]}
    with pytest.raises(UserError, match=r"All token files are validation or test data by their names \(.*val\.bin"):
        RawTokens(paths[1:3], BYTES)


def test_documents_go_on_in_the_next_file(tmp_path: Path) -> None:
    paths = [nanogpt(tmp_path / f"{i}.bin", np.array(tokens)) for i, tokens in enumerate([[1, 2], [3], [4, EOS], [5]])]
    split = RawTokens(paths, BYTES, validation_fraction=0.0).split("train")
    assert PackedDataset(split, 6, BOS, PAD).rows([0])["segment_ids"].tolist() == [[1, 1, 1, 1, 1, 2]]
    assert WholeDocuments(split, 5, BOS, PAD).rows([0])["input_ids"].tolist() == [[BOS, 1, 2, 3, 4]]


def test_the_fingerprint_follows_content_order_and_split(tmp_path: Path) -> None:
    a, b = (nanogpt(tmp_path / name, np.array(tokens)) for name, tokens in (("a.bin", [1, 2, EOS, 4]), ("b.bin", [3, EOS])))
    moved = nanogpt(tmp_path / "moved.bin", np.array([1, 2, EOS, 4]))
    first, gone = RawTokens([a, b], BYTES), RawTokens([moved, b], BYTES)
    assert first.fingerprint == RawTokens([moved, b], BYTES).fingerprint
    others = [RawTokens([b, a], BYTES), RawTokens([a], BYTES), RawTokens([a, b], BYTES, validation_fraction=0.9), RawTokens([a], BYTES, validation=[b])]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 5
    moved.unlink()
    with pytest.raises(UserError, match=r"moved\.bin cannot be read: No such file"):
        _ = gone.fingerprint


def test_what_was_hashed_is_remembered_for_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SMALL", 0)
    monkeypatch.setattr(digests, "SETTLED_NS", -1)
    path, asked, hashed = nanogpt(tmp_path / "a.bin", np.array([1, 2, EOS])), [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: asked.append(file.name) or hashed(file, name))

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
        with pytest.raises(UserError, match=rf"{path.name} has token id {wrong}, and the vocabulary has 259 tokens"):
            PackedDataset(split, 4, BOS, PAD).rows([0])


# ---------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("suffix", PICKLES)
def test_what_may_hold_a_pickle_is_refused_by_its_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tokens{suffix}"
    path.write_bytes(np.zeros(8, np.uint16).tobytes())
    assert is_named_so(path)
    assert look(path) == ("", f"is not opened, because a {suffix} file can hold a pickle, which could run code")
    with pytest.raises(UserError, match=rf"tokens\{suffix} is not opened, because"):
        RawTokens([path], BYTES)


def explode() -> None:
    raise AssertionError("a pickle was run")


class Trap:
    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return explode, ()


def test_pickles_under_other_names_are_not_run(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(3)}, tmp_path / "new.bin")
    torch.save({"x": torch.zeros(3)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps([Trap(), 1, 2]))
    with zipfile.ZipFile(tmp_path / "zip.bin", "w") as file:
        file.writestr("x", "y")
    for name in ("new", "old", "plain", "zip"):
        assert look(tmp_path / f"{name}.bin") == ("", "is not opened, because it is a PyTorch file or another pickle, which could run code")
    objects = np.empty(2, object)
    objects[:] = Trap()
    with (tmp_path / "objects.npy").open("wb") as out:
        np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(objects))
        out.write(pickle.dumps([Trap()]))
    assert look(tmp_path / "objects.npy") == ("", "is not opened, because it holds Python objects, which are a pickle, which could run code")


def test_nanogpts_meta_is_ignored_and_said_so(tmp_path: Path) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Trap()))
    kind, reason = look(tmp_path / "meta.pkl")
    assert not kind
    assert reason == "is nanoGPT's vocabulary in a pickle, which could run code when it is opened, and is not needed"


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("x.bin", lambda path, _: path.write_bytes(b""), "is empty"),
        ("x.npy", lambda path, _: path.write_bytes(b""), "is empty"),
        ("x.bin", lambda path, _: path.write_bytes(b"abc"), "has 3 bytes, which are no whole number of tokens"),
        ("x.txt", lambda path, _: path.write_bytes(b"abc"), "is no token file by its name, which would end in .bin or .npy"),
        ("x.bin", lambda path, t: llm_c(path, t, version=2), "has llm.c's magic number 20240520 and version 2, and only version 1 is known"),
        ("x.bin", lambda path, t: llm_c(path, t, count=11), "has a header of llm.c that says 11 tokens of 2 bytes, and 20 bytes behind it"),
        ("x.bin", lambda path, t: llm_c(path, t, count=-1), "has a header of llm.c that says -1 tokens of 2 bytes, and 20 bytes behind it"),
        ("x.bin", lambda path, t: llm_c(path, t[:0]), "has a header of llm.c that says 0 tokens of 2 bytes, and 0 bytes behind it"),
        ("x.bin", lambda path, _: path.write_bytes(np.array([20240520, 1, 0], np.int32).tobytes()), "that says 0 tokens of 2 bytes, and 0 bytes behind it"),
        ("x.npy", lambda path, _: path.write_bytes(b"abc"), "is no NumPy file, though its name ends in .npy"),
        ("x.npy", lambda path, _: path.write_bytes(b"\x93NUMPY\1\0"), "has no NumPy header that can be read"),
        ("x.npy", lambda path, _: path.write_bytes(b"\x93NUMPY\1\0\xff\xff{" + b"[" * 9000), "has no NumPy header that can be read"),
        ("x.npy", lambda path, t: npy(path, t.astype(float)), "holds float64, and tokens are uint16, uint32, int32, int64, little-endian"),
        ("x.npy", lambda path, t: npy(path, t.astype(">i4")), "holds >i4, and tokens are uint16, uint32, int32, int64, little-endian"),
        ("x.npy", lambda path, t: npy(path, t.reshape(1, 2, 5)), "has the shape (1, 2, 5), and tokens are one row, or rows"),
        ("x.npy", lambda path, t: npy(path, np.asfortranarray(t.reshape(2, 5))), "has the shape (2, 5) in Fortran order, and tokens are one row, or rows"),
        ("x.npy", lambda path, t: npy(path, t[:0]), "has a header that says 0 numbers of 8 bytes, and 0 bytes behind it"),
        ("x.npy", lambda path, t: path.write_bytes(npy(path, t).read_bytes()[:-1]), "has a header that says 10 numbers of 8 bytes, and 79 bytes behind it"),
    ],
)
def test_what_is_no_token_file_is_refused_with_the_reason(tmp_path: Path, name: str, write: Writer, message: str) -> None:
    path = tmp_path / name
    write(path, STREAM)
    kind, reason = look(path)
    assert not kind
    assert reason.endswith(message)
    with pytest.raises(UserError) as caught:
        RawTokens([path], BYTES)
    assert str(caught.value) == f"{path} {reason}. Give token files of nanoGPT, llm.c or NumPy."


@given(head=st.binary(max_size=200), magic=st.sampled_from([b"", b"\x93NUMPY\1\0\x76\0", b"\x93NUMPY\2\0\x76\0\0\0", b"PK\3\4", b"\x80\4\x95"]))
def test_no_file_at_all_gives_a_traceback(tmp_path_factory: pytest.TempPathFactory, head: bytes, magic: bytes) -> None:
    directory = tmp_path_factory.mktemp("any")
    for name in ("x.bin", "x.npy"):
        path = directory / name
        path.write_bytes(magic + head)
        kind, reason = look(path)
        assert bool(kind) != bool(reason)


@given(text=st.text(alphabet="{}[]()'descrfotan_hp:, <iu248TrueFalsL1-\n", max_size=100))
def test_no_numpy_header_gives_a_traceback(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("any") / "x.npy"
    for header in (text, f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({text},)}}", f"{{'descr': {text!r}, 'fortran_order': False, 'shape': (1,)}}"):
        path.write_bytes(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + bytes(8))
        kind, reason = look(path)
        assert bool(kind) != bool(reason)
