import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from consyn_jax.data.preparation import exact_duplicates, near_duplicates
from consyn_jax.data.preparation.near_duplicates import (
    EMPTY,
    GRAM_WORDS,
    PERMUTATIONS,
    RECALL,
    NearDuplicates,
    bands_and_rows,
    signature,
)

THRESHOLD = 0.8
texts = st.text(st.characters(exclude_categories=["Cs"]))
words = st.lists(st.sampled_from(["a", "b", "Ä", "日本", "word"]), max_size=30)


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def grams(text: str) -> set[tuple[str, ...]]:
    found = words_of(text)
    gram = min(GRAM_WORDS, len(found))
    return {tuple(found[i : i + gram]) for i in range(len(found) - gram + 1)} if found else set()


def jaccard(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    return len(a & b) / len(a | b)


def paragraphs(shared_data: Path, n: int) -> list[str]:
    text = (shared_data / "wikitext-2" / "train.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if len(line) > 500][:n]


def edited(rng: np.random.Generator, text: str, share: float) -> str:
    """`text` with a share of its words replaced by others."""
    tokens = text.split()
    return " ".join(
        f"new{rng.integers(10**9)}" if rng.random() < share else token for token in tokens
    )


# ---------------------------------------------------------------------------------------- signature


@given(text=texts | words.map(" ".join), step=st.integers(1, 9))
def test_a_signature_is_the_smallest_hash_under_every_permutation(text: str, step: int) -> None:
    smallest = [EMPTY] * PERMUTATIONS
    for gram in grams(text):
        mixed = (
            sum(
                xxh3_64_intdigest(word.encode()) * int(near_duplicates._CONSTANTS[i])
                for i, word in enumerate(gram)
            )
            % 2**64
        )
        for p, multiplier in enumerate(near_duplicates._MULTIPLIERS[:, 0].tolist()):
            smallest[p] = min(smallest[p], (mixed >> 32 | 1) * multiplier % 2**32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates, "_STEP", step)
        assert signature(text).tolist() == smallest


def test_signatures_never_change() -> None:
    """They are stored in files, and every process and machine must compute the same."""
    assert signature("The quick brown fox jumps over the lazy dog.")[:4].tolist() == [
        94138179,
        951575055,
        358290883,
        100145013,
    ]
    assert signature("Größe: 日本")[-2:].tolist() == [2211133837, 2910282703]


def test_punctuation_spacing_and_case_make_no_difference() -> None:
    assert (
        signature("One, two; THREE -- four\nfive six!").tolist()
        == signature("one two three four five six").tolist()
    )


@given(a=words, b=words)
def test_the_minimum_over_parts_is_the_signature_of_the_whole(a: list[str], b: list[str]) -> None:
    overlapping = " ".join([*a, *b[: GRAM_WORDS - 1]])
    if a and len(b) >= GRAM_WORDS:
        assert (
            np.minimum(signature(overlapping), signature(" ".join(b))).tolist()
            == signature(" ".join([*a, *b])).tolist()
        )
    assert (
        np.minimum(signature(" ".join(a)), signature("...")).tolist()
        == signature(" ".join(a)).tolist()
    )


def test_equal_entries_estimate_jaccard_similarity_without_bias(shared_data: Path) -> None:
    rng = np.random.default_rng(0)
    errors = []
    for text in paragraphs(shared_data, 300):
        other = edited(rng, text, rng.choice([0.01, 0.03, 0.1]))
        true = jaccard(grams(text), grams(other))
        if 0 < true < 1:
            errors.append(
                (np.mean(signature(text) == signature(other)) - true)
                / (true * (1 - true) / PERMUTATIONS) ** 0.5
            )
    assert len(errors) > 250
    assert abs(np.mean(errors)) < 5 / len(errors) ** 0.5  # five standard deviations
    assert abs(np.std(errors) - 1) < 5 / (2 * len(errors)) ** 0.5


# ----------------------------------------------------------------------------------------- deciding


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_reach_the_recall_at_the_threshold(threshold: float) -> None:
    bands, rows = bands_and_rows(threshold)
    assert bands * rows <= PERMUTATIONS
    assert 1 - (1 - threshold**rows) ** bands >= RECALL
    assert (
        rows == PERMUTATIONS
        or 1 - (1 - threshold ** (rows + 1)) ** (PERMUTATIONS // (rows + 1)) < RECALL
    )


def test_edited_copies_of_real_text_are_found_and_others_are_not(
    tmp_path: Path, shared_data: Path
) -> None:
    rng = np.random.default_rng(0)
    index = NearDuplicates(tmp_path / "signatures", THRESHOLD)
    originals = paragraphs(shared_data, 2000)
    stored = np.stack([signature(text) for text in originals])
    kept = index.first(stored)
    assert kept.mean() > 0.98  # these paragraphs are hardly ever copies of each other
    originals, stored = (
        [text for text, keep in zip(originals, kept, strict=True) if keep],
        stored[kept],
    )
    copies = [edited(rng, text, rng.uniform(0, 0.06)) for text in originals]
    asked = np.stack([signature(text) for text in copies])
    found = ~index.first(asked)
    index.close()
    estimate = (stored == asked).mean(axis=1)
    true = np.array([jaccard(grams(a), grams(b)) for a, b in zip(originals, copies, strict=True)])
    assert found[estimate >= THRESHOLD].mean() >= 0.99
    # Within two standard deviations of the threshold the estimate decides either way.
    assert found[true >= 0.87].mean() >= 0.95
    assert found[true < 0.73].mean() <= 0.03
    assert not found[true < 0.65].any()
    assert min((true >= 0.87).sum(), (true < 0.73).sum()) > 500


def decide(signatures: np.ndarray, threshold: float) -> list[bool]:
    """The decisions when every document is compared with every kept one."""
    kept: list[np.ndarray] = []
    decisions = []
    for row in signatures:
        worded = bool((row != EMPTY).any())
        decisions.append(not worded or all((row == other).mean() < threshold for other in kept))
        if decisions[-1] and worded:
            kept.append(row)
    return decisions


def family(seed: int, n: int) -> np.ndarray:
    """Signatures around a few centres: copies, near copies, less similar ones, and documents
    without words."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**32 - 1, (3, PERMUTATIONS), np.uint32)
    rows = centres[rng.integers(0, 3, n)]
    changed = rng.random((n, PERMUTATIONS)) < rng.choice([0.0, 0.02, 0.1, 0.15, 0.25, 0.5], (n, 1))
    rows = np.where(changed, rng.integers(0, 2**32 - 1, rows.shape, np.uint32), rows)
    rows[rng.random(n) < 0.1] = EMPTY
    return rows


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    threshold=st.sampled_from([0.5, 0.8, 1.0]),
    chunk=st.integers(1, 9),
)
def test_decisions_do_not_depend_on_calls_or_reopening(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    n: int,
    cuts: list[int],
    threshold: float,
    chunk: int,
) -> None:
    folder, signatures = tmp_path_factory.mktemp("near"), family(seed, n)
    whole = NearDuplicates(folder / "whole", threshold)
    decisions = whole.first(signatures)
    whole.flush()
    assert whole.count == decisions.sum()
    whole.close()
    assert (folder / "whole").read_bytes() == signatures[decisions].astype("<u4").tobytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_duplicates, "CHUNK", chunk)
        parts = NearDuplicates(folder / "parts", threshold)
        np.testing.assert_array_equal(
            np.concatenate([parts.first(part) for part in np.split(signatures, sorted(cuts))]),
            decisions,
        )
        parts.close()
        for done in cuts:
            reopened = NearDuplicates(folder / "whole", threshold, int(decisions[:done].sum()))
            np.testing.assert_array_equal(reopened.first(signatures[done:]), decisions[done:])
            reopened.close()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9, 1.0])
def test_nearly_all_decisions_match_a_comparison_of_all_pairs(
    tmp_path: Path, threshold: float
) -> None:
    signatures = family(7, 1500)
    index = NearDuplicates(tmp_path / "signatures", threshold)
    decisions = index.first(signatures)
    index.close()
    assert (decisions == decide(signatures, threshold)).mean() > 0.99


def test_documents_without_words_are_kept_and_resemble_nothing(tmp_path: Path) -> None:
    rows = np.stack([signature(text) for text in ("---", "a b", "***", "A, b!", "---")])
    index = NearDuplicates(tmp_path / "signatures", 0.8)
    assert index.first(rows).tolist() == [True, True, True, False, True]
    assert index.first(rows).tolist() == [True, False, True, False, True]
    assert index.count == 7
    index.close()
    index = NearDuplicates(tmp_path / "signatures", 0.8, 1)
    assert index.first(rows).tolist() == [True, True, True, False, True]
    index.close()


def test_a_similarity_of_exactly_the_threshold_is_near(tmp_path: Path) -> None:
    rows = np.stack([np.arange(PERMUTATIONS, dtype=np.uint32)] * 3)
    rows[1, ::2] += 1000  # 64 of 128 stay equal, but no two neighbours
    rows[2, 64:] += 2000
    index = NearDuplicates(tmp_path / "signatures", 0.5)
    assert index.first(rows).tolist() == [True, True, False]
    index.close()


def test_wrong_thresholds_and_short_files_are_refused(tmp_path: Path) -> None:
    for threshold in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="above 0 and up to 1"):
            NearDuplicates(tmp_path / "signatures", threshold)
    with pytest.raises(
        ValueError, match=r"signatures has 0 bytes where 2 records of 512 bytes are expected"
    ):
        NearDuplicates(tmp_path / "signatures", 0.8, 2)
