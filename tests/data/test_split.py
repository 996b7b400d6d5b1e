from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consyn_jax.data.split import TRAIN, VALIDATION, cut, side_of, split_documents

texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(documents=st.lists(texts, min_size=2, max_size=20), added=st.lists(texts, max_size=20), fraction=st.floats(0, 0.9))
def test_no_document_changes_sides_when_others_are_added(documents: list[str], added: list[str], fraction: float) -> None:
    before = {text: side for side, text in split_documents(documents, fraction)}
    after = {text: side for side, text in split_documents([*added, *documents], fraction)}
    assert all(after[text] == side for text, side in before.items())


def test_every_document_comes_out_once_and_in_order() -> None:
    documents = [f"document {i}" for i in range(1000)] * 2
    assert [text for _, text in split_documents(documents, 0.3)] == documents


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_the_share_is_the_fraction(fraction: float) -> None:
    n = 20_000
    held_out = sum(side_of(f"document {i}", fraction) == VALIDATION for i in range(n))
    assert abs(held_out - n * fraction) < 5 * (n * fraction * (1 - fraction)) ** 0.5  # five standard deviations


def test_a_larger_fraction_only_moves_documents_to_validation() -> None:
    held_out = [{i for i in range(2000) if side_of(str(i), fraction) == VALIDATION} for fraction in (0.1, 0.2, 0.4)]
    assert held_out[0] < held_out[1] < held_out[2]


@given(text=texts, fraction=st.floats(0, 0.999))
def test_a_cut_loses_nothing_and_tears_no_character(text: str, fraction: float) -> None:
    front, back = cut(text, fraction)
    assert front + back == text
    assert abs(len(back.encode()) - fraction * len(text.encode())) <= 4


def test_one_document_is_split_by_position_and_empty_parts_are_left_out() -> None:
    assert list(split_documents(["0123456789"], 0.2)) == [(TRAIN, "01234567"), (VALIDATION, "89")]
    assert list(split_documents(["0123456789"], 0.0)) == [(TRAIN, "0123456789")]
    assert list(split_documents([], 0.2)) == []


def test_tiny_shakespeare_is_split_as_nanogpt_does(shared_data: Path) -> None:
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    n = len(text)
    assert dict(split_documents([text], 0.1)) == {TRAIN: text[: int(n * 0.9)], VALIDATION: text[int(n * 0.9) :]}
