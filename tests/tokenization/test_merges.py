"""Learned merges against published ones and a direct reference, and on texts that are slow."""

import json
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from consyn_jax.tokenization import GPT2_PATTERN, SPLIT_PATTERN, BPETokenizer
from consyn_jax.tokenization import merges as learning
from consyn_jax.tokenization.merges import count_words, learn_merges


def reference_merges(
    word_counts: dict[bytes, int], num_new_tokens: int, reserved: frozenset[bytes] = frozenset()
) -> list[tuple[bytes, bytes]]:
    """The definition, recounted from scratch for every merge."""
    words = [([bytes([value]) for value in word], count) for word, count in word_counts.items()]
    tokens = {bytes([value]) for value in range(256)}
    merges: list[tuple[bytes, bytes]] = []
    while len(tokens) < 256 + num_new_tokens:
        counts: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words:
            for pair in pairwise(word):
                if pair[0] + pair[1] not in reserved:
                    counts[pair] += count
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        tokens.add(best[0] + best[1])
        words = [(merge(word, best), count) for word, count in words]
    return merges


def merge(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    result: list[bytes] = []
    for token in word:
        # A token that has just been merged is longer than pair[0], so it is never the left half
        # again.
        if result and result[-1] == pair[0] and token == pair[1]:
            result[-1] += token
        else:
            result.append(token)
    return result


def test_published_merges_and_vocabulary_are_reproduced(shared_data: Path) -> None:
    folder = shared_data / "bpe"
    tokenizer = BPETokenizer.train(
        folder / "corpus.en", 500, pattern=GPT2_PATTERN, special_tokens=["<|endoftext|>"]
    )
    model = json.loads(tokenizer.to_json())["model"]
    lines = (folder / "train-bpe-reference-merges.txt").read_text(encoding="utf-8").splitlines()
    assert [" ".join(pair) for pair in model["merges"]] == lines
    assert model["vocab"] == json.loads(
        (folder / "train-bpe-reference-vocab.json").read_text(encoding="utf-8")
    )


@settings(deadline=None, max_examples=150)
@given(
    st.dictionaries(st.text("abA", min_size=1, max_size=9), st.integers(1, 4), max_size=8),
    st.integers(0, 30),
    st.sets(st.text("ab", min_size=2, max_size=3), max_size=2),
)
def test_merges_agree_with_the_definition(
    words: dict[str, int], num_new_tokens: int, reserved: set[str]
) -> None:
    counts = Counter({word.encode(): count for word, count in words.items()})
    banned = frozenset(word.encode() for word in reserved)
    assert learn_merges(counts, num_new_tokens, banned) == reference_merges(
        counts, num_new_tokens, banned
    )


def test_ties_go_to_the_greater_pair() -> None:
    assert learn_merges(Counter({b"ab": 1, b"ba": 1, b"b\xff": 1}), 3) == [
        (b"b", b"\xff"),
        (b"b", b"a"),
        (b"a", b"b"),
    ]


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, SPLIT_PATTERN])
@settings(deadline=None, max_examples=100)
@given(st.text(st.sampled_from("aé \n\t\r;'1/"), max_size=60))
def test_counting_in_chunks_changes_nothing(pattern: str, text: str) -> None:
    whole = Counter(
        word.encode() for word, _ in Split(Regex(pattern), "isolated").pre_tokenize_str(text)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "CHUNK_CHARS", 5)
        assert count_words([text], pattern) == whole


def test_one_endless_word_is_learned_in_linear_time() -> None:
    start = time.process_time()
    tokenizer = BPETokenizer.train_from_iterator(["xyzzy" * 100_000], 300)
    assert time.process_time() - start < 10
    assert tokenizer.decode(tokenizer.encode("xyzzy" * 1000)) == "xyzzy" * 1000
