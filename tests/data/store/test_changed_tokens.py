"""Others' token files that are changed under a run are noticed and named."""

import os
from pathlib import Path

import numpy as np
import pytest

from consyn_jax.data.store import raw_tokens
from consyn_jax.data.store.raw_tokens import RawTokens
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.errors import UserError
from consyn_jax.tokenization import BPETokenizer


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "train.bin"
    np.random.default_rng(0).integers(0, 256, 200_000).astype("<u2").tofile(path)
    return path


@pytest.fixture
def split(file: Path, monkeypatch: pytest.MonkeyPatch) -> StoreSplit:
    monkeypatch.setattr(raw_tokens, "LOOK_S", 0.0)
    split = RawTokens([file], BPETokenizer.bytes()).split("train")
    read(split)
    return split


def read(split: StoreSplit, start: int = 50_000) -> np.ndarray:
    out = np.empty(1024, np.int32)
    split.read(start, out)
    return out


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("ids out of range", "token ids outside the vocabulary|modification time"),
        ("shorter", "it had 400,000 bytes and now has 390,000"),
        ("other tokens", "its modification time changed"),
        ("other tokens at the same time", "its content changed"),
        ("ids out of range at the same time", "token ids outside the vocabulary"),
    ],
)
def test_a_change_in_place_is_named(how: str, said: str, file: Path, split: StoreSplit) -> None:
    before = file.stat()
    with file.open("r+b") as opened:
        if how == "shorter":
            opened.truncate(390_000)
        elif how.startswith("ids"):
            opened.seek(2 * 50_000)
            opened.write(np.full(10, 60_000, "<u2").tobytes())
        else:
            opened.write(np.zeros(200_000, "<u2").tobytes())
    if how.endswith("same time"):
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    with pytest.raises(UserError, match=said) as caught:
        read(split)
    assert str(file) in str(caught.value)
    assert "was changed while it was read" in str(caught.value)


def test_a_file_that_stays_is_read_as_before(file: Path, split: StoreSplit) -> None:
    tokens = np.fromfile(file, "<u2")
    for start in (0, 1000, 150_000):
        np.testing.assert_array_equal(read(split, start), tokens[start : start + 1024])
