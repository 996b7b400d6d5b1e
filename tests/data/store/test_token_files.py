import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consyn_jax.data.store.raw_tokens import RawTokens
from consyn_jax.data.store.token_files import PICKLES, UnusableError, read_head
from consyn_jax.errors import UserError
from consyn_jax.tokenization import BPETokenizer

BYTES = BPETokenizer.bytes()
EOS = BYTES.eos_token_id

Writer = Callable[[Path, np.ndarray], Path]


def nanogpt(path: Path, tokens: np.ndarray) -> Path:
    tokens.astype(np.uint16).tofile(path)
    return path


def llm_c(
    path: Path,
    tokens: np.ndarray,
    magic: int = 20240520,
    version: int = 1,
    count: int | None = None,
) -> Path:
    """As `write_datafile` in llm.c's dev/data/data_common.py."""
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(
        header.tobytes() + tokens.astype(np.uint16 if magic == 20240520 else np.uint32).tobytes()
    )
    return path


def llm_c_llama(path: Path, tokens: np.ndarray) -> Path:
    return llm_c(path, tokens, 20240801, 7)


def npy(path: Path, tokens: np.ndarray) -> Path:
    with path.open("wb") as file:  # np.save would add a suffix
        np.save(file, tokens)
    return path


def look(path: Path) -> tuple[str, str]:
    """(kind, "") of a token file, or ("", fault)."""
    try:
        return read_head(path).kind, ""
    except UnusableError as fault:
        return "", str(fault)


STREAM = np.array([1, 2, EOS, 3, EOS, 4, 5, 6, EOS, 7])


@pytest.mark.parametrize("suffix", PICKLES)
def test_suffixes_of_pickles_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tokens{suffix}"
    path.write_bytes(np.zeros(8, np.uint16).tobytes())
    assert look(path) == (
        "",
        f"is not opened, because a {suffix} file can contain a pickle, which could run code",
    )
    with pytest.raises(UserError, match=rf"tokens\{suffix} is not opened, because"):
        RawTokens([path], BYTES)


def explode() -> None:
    raise AssertionError("a pickle was run")


class Trap:
    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return explode, ()


@pytest.mark.torch
def test_pickles_under_other_names_are_not_run(tmp_path: Path) -> None:
    import torch

    torch.save({"x": torch.zeros(3)}, tmp_path / "new.bin")
    torch.save({"x": torch.zeros(3)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps([Trap(), 1, 2]))
    with zipfile.ZipFile(tmp_path / "zip.bin", "w") as file:
        file.writestr("x", "y")
    for name in ("new", "old", "plain", "zip"):
        assert look(tmp_path / f"{name}.bin") == (
            "",
            "is not opened, because it is a PyTorch file or another pickle, which could run code",
        )
    objects = np.empty(2, object)
    objects[:] = Trap()
    with (tmp_path / "objects.npy").open("wb") as out:
        np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(objects))
        out.write(pickle.dumps([Trap()]))
    assert look(tmp_path / "objects.npy") == (
        "",
        "is not opened, because it contains pickled Python objects, which could run code",
    )


def test_nanogpts_meta_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Trap()))
    kind, reason = look(tmp_path / "meta.pkl")
    assert not kind
    assert reason == (
        "is a pickle with nanoGPT's vocabulary, which is not needed and could run code when it "
        "is opened"
    )


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("x.bin", lambda path, _: path.write_bytes(b""), "is empty"),
        ("x.npy", lambda path, _: path.write_bytes(b""), "is empty"),
        (
            "x.bin",
            lambda path, _: path.write_bytes(b"abc"),
            "has 3 bytes, an odd number, but tokens have 2 or 4 bytes",
        ),
        (
            "x.txt",
            lambda path, _: path.write_bytes(b"abc"),
            "has no suffix of a token file (.bin or .npy)",
        ),
        (
            "x.bin",
            lambda path, t: llm_c(path, t, version=2),
            "has llm.c's magic number 20240520 and version 2, but only version 1 is supported",
        ),
        (
            "x.bin",
            lambda path, t: llm_c(path, t, count=11),
            "has an llm.c header for 11 tokens of 2 bytes, but 20 bytes after it",
        ),
        (
            "x.bin",
            lambda path, t: llm_c(path, t, count=-1),
            "has an llm.c header for -1 tokens of 2 bytes, but 20 bytes after it",
        ),
        (
            "x.bin",
            lambda path, t: llm_c(path, t[:0]),
            "has an llm.c header for 0 tokens of 2 bytes, but 0 bytes after it",
        ),
        (
            "x.bin",
            lambda path, _: path.write_bytes(np.array([20240520, 1, 0], np.int32).tobytes()),
            "for 0 tokens of 2 bytes, but 0 bytes after it",
        ),
        (
            "x.npy",
            lambda path, _: path.write_bytes(b"abc"),
            "is not a NumPy file, although its name ends in .npy",
        ),
        (
            "x.npy",
            lambda path, _: path.write_bytes(b"\x93NUMPY\1\0"),
            "has no readable NumPy header",
        ),
        (
            "x.npy",
            lambda path, _: path.write_bytes(b"\x93NUMPY\1\0\xff\xff{" + b"[" * 9000),
            "has no readable NumPy header",
        ),
        (
            "x.npy",
            lambda path, t: npy(path, t.astype(float)),
            "has float64, but token ids are little-endian uint16, uint32, int32, int64",
        ),
        (
            "x.npy",
            lambda path, t: npy(path, t.astype(">i4")),
            "has >i4, but token ids are little-endian uint16, uint32, int32, int64",
        ),
        (
            "x.npy",
            lambda path, t: npy(path, t.reshape(1, 2, 5)),
            "has the shape (1, 2, 5), but tokens need one dimension, or two in C order",
        ),
        (
            "x.npy",
            lambda path, t: npy(path, np.asfortranarray(t.reshape(2, 5))),
            "in Fortran order, but tokens need one dimension, or two in C order",
        ),
        (
            "x.npy",
            lambda path, t: npy(path, t[:0]),
            "has a header for 0 numbers of 8 bytes, but 0 bytes after it",
        ),
        (
            "x.npy",
            lambda path, t: path.write_bytes(npy(path, t).read_bytes()[:-1]),
            "has a header for 10 numbers of 8 bytes, but 79 bytes after it",
        ),
    ],
)
def test_other_files_are_refused_with_the_reason(
    tmp_path: Path, name: str, write: Writer, message: str
) -> None:
    path = tmp_path / name
    write(path, STREAM)
    kind, reason = look(path)
    assert not kind
    assert reason.endswith(message)
    with pytest.raises(UserError) as caught:
        RawTokens([path], BYTES)
    assert str(caught.value) == f"{path} {reason}. Give token files of nanoGPT, llm.c or NumPy."


@given(
    head=st.binary(max_size=200),
    magic=st.sampled_from(
        [b"", b"\x93NUMPY\1\0\x76\0", b"\x93NUMPY\2\0\x76\0\0\0", b"PK\3\4", b"\x80\4\x95"]
    ),
)
def test_no_file_gives_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, head: bytes, magic: bytes
) -> None:
    directory = tmp_path_factory.mktemp("any")
    for name in ("x.bin", "x.npy"):
        path = directory / name
        path.write_bytes(magic + head)
        kind, reason = look(path)
        assert bool(kind) != bool(reason)


@given(text=st.text(alphabet="{}[]()'descrfotan_hp:, <iu248TrueFalsL1-\n", max_size=100))
def test_no_numpy_header_gives_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("any") / "x.npy"
    for header in (
        text,
        f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({text},)}}",
        f"{{'descr': {text!r}, 'fortran_order': False, 'shape': (1,)}}",
    ):
        path.write_bytes(
            b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + bytes(8)
        )
        kind, reason = look(path)
        assert bool(kind) != bool(reason)
