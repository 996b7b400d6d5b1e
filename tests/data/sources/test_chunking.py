"""Parts of long documents lose nothing, tear no character, and have the ids of the whole."""

import gzip
import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consyn_jax.data.preparation.cleaning import clean
from consyn_jax.data.sources import chunking as module
from consyn_jax.data.sources.chunking import parts
from consyn_jax.tokenization import BPETokenizer, load_tokenizer

BYTES = BPETokenizer.bytes()


def small(monkeypatch: pytest.MonkeyPatch, part: int, search: int) -> None:
    monkeypatch.setattr(module, "PART_BYTES", part)
    monkeypatch.setattr(module, "LIMIT", part + search)


def chunked(data: bytes, size: int) -> Iterable[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


@given(
    text=st.text(
        st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\r\0\ufeff\u0301a")
    ),
    part=st.integers(4, 40),
    search=st.integers(4, 40),
)
def test_parts_are_the_document_for_any_chunks(text: str, part: int, search: int) -> None:
    data = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        small(patch, part, search)
        found = [list(parts(chunked(data, size), BYTES)) for size in (1, 3, 7, 1000)]
    assert all(other == found[0] for other in found)
    assert b"".join(piece for piece, _ in found[0]) == data
    assert [last for _, last in found[0]] == [False] * (len(found[0]) - 1) + [True]
    for piece, _ in found[0]:
        piece.decode()  # no character is torn
        assert 0 < len(piece) <= part + search or not data


@given(data=st.binary(max_size=200))
def test_parts_keep_bytes_that_are_not_text(data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        small(patch, 8, 8)
        assert b"".join(piece for piece, _ in parts([data], BYTES)) == data


@given(
    words=st.lists(
        st.text(
            st.sampled_from("aé\u0301\u0323\u1100\u1161\ufeff\0\x85日'1."), min_size=1, max_size=4
        ),
        min_size=1,
    ),
    ends=st.sampled_from(" \n"),
)
def test_parts_are_cleaned_like_the_whole(words: list[str], ends: str) -> None:
    text = "start" + "".join(f"{ends}{word}" for word in words)
    with pytest.MonkeyPatch.context() as patch:
        small(patch, 8, 40)
        pieces = [piece.decode() for piece, _ in parts([text.encode()], BYTES)]
    assert "".join(clean(piece)[0] for piece in pieces) == clean(text)[0]


@pytest.mark.parametrize(
    "text",
    [
        "a" * 5000,
        "日" * 2000,
        "\n" * 5000,
        " " * 5000,
        "e\u0301" * 2000,
        "\u0301" * 2000,
        "1" * 5000,
        "\n\ufeff" * 2000,
    ],
)
def test_text_without_a_place_to_cut_is_cut_anyway(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    small(monkeypatch, 256, 64)
    pieces = [piece for piece, _ in parts([text.encode()], BYTES)]
    assert b"".join(pieces).decode() == text
    assert max(map(len, pieces)) <= 320
    assert min(map(len, pieces[:-1])) >= 256


def reals(shared_data: Path) -> dict[str, str]:
    found = {
        path.name: path.read_text(encoding="utf-8", errors="replace")[:40_000]
        for path in sorted((shared_data / "gutenberg").glob("*.txt"))
    }
    found["wikitext"] = (shared_data / "wikitext-2" / "valid.txt").read_text()
    with gzip.open(shared_data / "enwik8" / "enwik8.gz") as file:
        found["enwik8"] = file.read(400_000).decode("utf-8", "ignore")
    # One line of many scripts, so that there are no newlines to cut at.
    rows = map(json.loads, (shared_data / "jsonl" / "udhr.jsonl").read_text().splitlines())
    scripts = " ".join(" ".join(row["text"][:1500].split()) for row in rows)
    found["scripts"], found["decomposed"] = scripts, unicodedata.normalize("NFD", scripts)[:300_000]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "gpt2"])
def test_parts_have_the_ids_of_the_whole(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tokenizer = load_tokenizer(
        "default" if name == "default" else str(shared_data / "tokenizers" / "gpt2")
    )
    small(monkeypatch, 1 << 12, 1 << 10)
    for of, text in reals(shared_data).items():
        text = text[:100_000]
        pieces = [piece.decode() for piece, _ in parts([text.encode()], tokenizer)]
        assert len(pieces) > len(text) / 6000
        ids = [token for part in tokenizer.encode_batch(pieces) for token in part]
        assert ids == tokenizer.encode(text), of


@pytest.mark.slow
def test_a_whole_file_at_the_real_size(shared_data: Path) -> None:
    tokenizer = load_tokenizer("default")
    text = (shared_data / "gutenberg" / "bible-kjv.txt").read_text()[:2_500_000]
    pieces = [piece.decode() for piece, _ in parts([text.encode()], tokenizer)]
    assert len(pieces) == 3
    assert [token for part in tokenizer.encode_batch(pieces) for token in part] == tokenizer.encode(
        text
    )
