"""Learn byte-pair merges: count words, then merge the most frequent pair until there are enough.

If several pairs are equally frequent, the pair with the lexicographically greater bytes is merged,
so the merges depend only on the text. The trainer of `tokenizers` breaks such ties by ids, which
depend on earlier merges.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise

from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from consyn_jax.errors import UserError

CHUNK_CHARS = 200_000
LONGEST_WORD_BYTES = 1_000

Pair = tuple[int, int]


def count_words(texts: Iterable[str], pattern: str) -> Counter[bytes]:
    """Split texts into words by `pattern`, and count the words (in UTF-8).

    A word of more than 1,000 bytes, such as a base64 blob, is counted in pieces. This keeps the
    training time linear in the length of the text.

    Raises:
        UserError: `texts` is a single text, or has values that are not text.
    """
    split = Split(Regex(pattern), "isolated")
    words: Counter[str] = Counter()
    if isinstance(texts, str):
        raise UserError("A vocabulary is trained on a list of texts. Pass a single text as [text].")
    for text in texts:
        if not isinstance(text, str):
            raise UserError(
                f"A vocabulary is trained on texts, not on a {type(text).__name__}. Pass the "
                'text of each row, such as row["text"].'
            )
        for chunk in _chunks(text):
            words.update(word for word, _ in split.pre_tokenize_str(chunk))
    counts: Counter[bytes] = Counter()
    for word, count in words.items():
        encoded = word.encode("utf-8")
        for start in range(0, len(encoded), LONGEST_WORD_BYTES):
            counts[encoded[start : start + LONGEST_WORD_BYTES]] += count
    return counts


def _chunks(text: str) -> Iterator[str]:
    """Split a long text into chunks, without cutting a word of GPT2_PATTERN or SPLIT_PATTERN.

    A chunk ends after a single newline. There is no cut between a newline and a slash, because they
    can belong to one word of SPLIT_PATTERN.
    """
    start = 0
    cut = re.compile(r"(?<=\S)\n(?=[^\s/])")
    while len(text) - start > CHUNK_CHARS and (found := cut.search(text, start + CHUNK_CHARS)):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def learn_merges(
    word_counts: Counter[bytes], num_new_tokens: int, reserved: Collection[bytes] = ()
) -> list[tuple[bytes, bytes]]:
    """Learn merges, in order, that add `num_new_tokens` tokens to the 256 bytes.

    Learning ends earlier if no pairs are left. Two merges may give the same token, which then
    counts once. Source: Sennrich et al. 2016, algorithm 1; here, pair counts are updated after each
    merge instead of computed again.

    Args:
        reserved: special tokens, which no merge may produce, so that ordinary text never becomes
            one.
    """
    return _Learner(word_counts, frozenset(reserved)).learn(num_new_tokens)


class _Learner:
    """State of the training: count of each pair, words that contain each pair, and a heap of pairs.

    A heap entry with an outdated count is replaced when it reaches the top.
    """

    def __init__(self, word_counts: Counter[bytes], reserved: frozenset[bytes]) -> None:
        self.tokens = [bytes([value]) for value in range(256)]
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        self.descending = [_descending_key(token) for token in self.tokens]
        self.reserved = reserved
        self.words = [list(word) for word in word_counts]
        self.frequencies = list(word_counts.values())
        self.counts: defaultdict[Pair, int] = defaultdict(int)
        self.occurrences: defaultdict[Pair, set[int]] = defaultdict(set)
        for index, (word, frequency) in enumerate(zip(self.words, self.frequencies, strict=True)):
            for pair in pairwise(word):
                self.counts[pair] += frequency
                self.occurrences[pair].add(index)
        self.heap = [self._entry(pair, count) for pair, count in self.counts.items()]
        heapq.heapify(self.heap)

    def learn(self, num_new_tokens: int) -> list[tuple[bytes, bytes]]:
        merges: list[tuple[bytes, bytes]] = []
        size = len(self.tokens) + num_new_tokens
        while len(self.tokens) < size and (pair := self._pop_best()) is not None:
            left, right = self.tokens[pair[0]], self.tokens[pair[1]]
            if left + right in self.reserved:
                del self.counts[pair]
                continue
            merges.append((left, right))
            self._merge(pair, self._token_id(left + right))
        return merges

    def _entry(self, pair: Pair, count: int) -> tuple[int, str, str, Pair]:
        return -count, self.descending[pair[0]], self.descending[pair[1]], pair

    def _pop_best(self) -> Pair | None:
        while self.heap:
            entry = heapq.heappop(self.heap)
            pair = entry[3]
            count = self.counts.get(pair, 0)
            if count == -entry[0] and count > 0:
                return pair
            # Pairs whose counts grew have already been pushed again. Push pairs whose counts fell.
            if 0 < count < -entry[0]:
                heapq.heappush(self.heap, self._entry(pair, count))
        return None

    def _token_id(self, token: bytes) -> int:
        if token not in self.ids:
            self.ids[token] = len(self.tokens)
            self.tokens.append(token)
            self.descending.append(_descending_key(token))
        return self.ids[token]

    def _merge(self, pair: Pair, merged: int) -> None:
        grown: set[Pair] = set()
        for index in self.occurrences.pop(pair):
            word, frequency = self.words[index], self.frequencies[index]
            new_word = _merge_in_word(word, pair, merged)
            if len(new_word) == len(word):
                continue
            for old in pairwise(word):
                self.counts[old] -= frequency
            for new in pairwise(new_word):
                self.counts[new] += frequency
                if merged in new:
                    self.occurrences[new].add(index)
                    grown.add(new)
            self.words[index] = new_word
        self.counts.pop(pair, None)
        for new in grown:
            heapq.heappush(self.heap, self._entry(new, self.counts[new]))


def _merge_in_word(word: list[int], pair: Pair, merged: int) -> list[int]:
    left, right = pair
    result: list[int] = []
    position, last = 0, len(word) - 1
    while position <= last:
        if position < last and word[position] == left and word[position + 1] == right:
            result.append(merged)
            position += 2
        else:
            result.append(word[position])
            position += 1
    return result


def _descending_key(token: bytes) -> str:
    """Return a key that sorts tokens in descending order of their bytes."""
    return "".join(chr(255 - value) for value in token) + chr(256)
