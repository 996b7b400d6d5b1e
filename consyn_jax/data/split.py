"""Assign documents to train, validation or test by a hash of their text.

A document stays in its split when other documents are added, and duplicates are in the same split.
If the corpus is a single document, its last part is held out instead.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)
# Cache keys include the salt, because it determines the splits.
SALT = b"consyn_jax"
DIGEST_BYTES = 16
# Keywords (`SPLIT_KEYWORDS`) and word separators from `datasets.data_files`.
KEYWORDS = {
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "dev", "val"),
    TEST: ("test", "testing", "eval", "evaluation"),
}
_BETWEEN = re.compile(r"[-._ 0-9]+")


def split_of_name(name: str) -> str | None:
    """Find the keyword of a split in the name of a file or directory; None if there is none.

    >>> [split_of_name(name) for name in ("val.jsonl", "fw_val_000.bin", "train_sft-00.csv")]
    ['validation', 'validation', 'train']
    >>> [split_of_name(name) for name in ("tests.npy", "contest.txt", "Dev2.tsv")]
    [None, None, 'validation']
    """
    splits = {word: split for split, words in KEYWORDS.items() for word in words}
    found = (splits.get(word) for word in _BETWEEN.split(name.lower()))
    return next((split for split in found if split), None)


def digest(data: bytes) -> bytes:
    """Compute a 16-byte hash of a document's text, for finding duplicates and choosing the split.

    >>> digest(b"a document").hex()
    'b269d408a40c463c0046790c79c99920'
    """
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES, person=SALT).digest()


def joined_digest(parts: Sequence[bytes]) -> bytes:
    """Compute a document's digest from the digests of its parts (see `sources/chunking.py`)."""
    return parts[0] if len(parts) == 1 else digest(b"".join(parts))


def split_of(document: bytes, validation: float, test: float = 0.0) -> str:
    """Choose the split of a document by its digest, which is read as a number in [0, 1).

    For a document in parts, the digest of the first part decides. Numbers below `validation` mean
    validation, and numbers of at least 1 - `test` mean test. So a larger held-out share only moves
    documents out of train.

    >>> a = digest(b"a document")
    >>> split_of(a, 0.0), split_of(a, 1.0), split_of(a, 0.0, 1.0)
    ('train', 'validation', 'test')
    """
    number = int.from_bytes(document[:8], "little")
    if number < validation * 2**64:
        return VALIDATION
    return TEST if number >= (1 - test) * 2**64 else TRAIN


def cut(data: bytes, fraction: float) -> int:
    """Return the start of the last `fraction` of a UTF-8 document, at a character boundary.

    >>> cut(b"0123456789", 0.1), cut("aaa\u00e9".encode(), 0.2)
    (9, 3)
    """
    at = int((1 - fraction) * len(data))
    return at - torn(data[max(at - 3, 0) : at + 1]) if at < len(data) else at


def torn(data: bytes) -> int:
    """Return the distance from the last byte of `data` back to the first byte of its character.

    >>> torn(b"ab"), torn("a\u20ac".encode())
    (0, 2)
    """
    back = 0
    while back < min(3, len(data) - 1) and data[-1 - back] & 0xC0 == 0x80:  # a continuation byte
        back += 1
    return back
