from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consyn_jax.data.split import TEST, TRAIN, VALIDATION, cut, digest, joined_digest, split_of

texts = st.text(st.characters(exclude_categories=["Cs"]))


def split_of_text(text: str, validation: float, test: float = 0.0) -> str:
    return split_of(digest(text.encode()), validation, test)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_the_share_is_the_fraction(fraction: float) -> None:
    n = 20_000
    splits = [split_of_text(f"document {i}", fraction, fraction) for i in range(n)]
    for split in (VALIDATION, TEST):
        deviation = (n * fraction * (1 - fraction)) ** 0.5
        assert abs(splits.count(split) - n * fraction) < 5 * deviation


def test_larger_fractions_only_move_documents_out_of_train() -> None:
    for split, shares in (
        (VALIDATION, [(0.1, 0.2), (0.2, 0.2), (0.4, 0.3)]),
        (TEST, [(0.1, 0.1), (0.2, 0.2), (0.2, 0.4)]),
    ):
        held_out = [
            {i for i in range(2000) if split_of_text(str(i), *share) == split} for share in shares
        ]
        assert held_out[0] < held_out[1] < held_out[2]
    assert split_of_text("x", 0.0) == TRAIN


@given(text=texts, fraction=st.floats(0, 0.999))
def test_a_cut_loses_nothing_and_tears_no_character(text: str, fraction: float) -> None:
    data = text.encode()
    at = cut(data, fraction)
    assert data[:at].decode() + data[at:].decode() == text
    assert abs(len(data) - at - fraction * len(data)) <= 4


def test_a_document_in_parts_differs_from_each_of_them() -> None:
    parts = [digest(b"a"), digest(b"b")]
    assert joined_digest(parts[:1]) == parts[0]
    assert joined_digest(parts) not in (*parts, digest(b"ab"))


def test_tiny_shakespeare_is_split_as_nanogpt_does(shared_data: Path) -> None:
    data = (shared_data / "tinyshakespeare" / "input.txt").read_bytes()
    assert cut(data, 0.1) == int(len(data) * 0.9)
