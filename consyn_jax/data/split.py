"""Train, validation or test, decided by each document alone, so that no document changes sides when others are added.

Duplicates fall on the same side. A corpus of one document is cut by position instead: its last part is held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)
# Part of every store's content: another salt is another split.
SALT = b"consyn_jax"
DIGEST_BYTES = 16


def digest(data: bytes) -> bytes:
    """16 bytes that stand for a document's text: equal texts are duplicates, and it decides the side.

    >>> digest(b"a document").hex()
    'b269d408a40c463c0046790c79c99920'
    """
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES, person=SALT).digest()


def joined_digest(parts: Sequence[bytes]) -> bytes:
    """The digest of a document from those of its parts (see `parts.py`)."""
    return parts[0] if len(parts) == 1 else digest(b"".join(parts))


def side_of(document: bytes, validation: float, test: float = 0.0) -> str:
    """The split of a document: its digest (of a document in parts, that of the first) as a number in [0, 1) against the shares.

    Validation is at the lower end and test at the upper, so that a larger share only moves documents out of train.

    >>> side_of(digest(b"a document"), 0.0), side_of(digest(b"a document"), 1.0), side_of(digest(b"a document"), 0.0, 1.0)
    ('train', 'validation', 'test')
    """
    number = int.from_bytes(document[:8], "little")
    if number < validation * 2**64:
        return VALIDATION
    return TEST if number >= (1 - test) * 2**64 else TRAIN


def cut(data: bytes, fraction: float) -> int:
    """Where the last `fraction` of one document in UTF-8 begins. No character is torn.

    >>> cut(b"0123456789", 0.1), cut("aaa\u00e9".encode(), 0.2)
    (9, 3)
    """
    at = int((1 - fraction) * len(data))
    return at - torn(data[max(at - 3, 0) : at + 1]) if at < len(data) else at


def torn(data: bytes) -> int:
    """How many bytes before the last one the character begins that the last byte of `data` belongs to.

    >>> torn(b"ab"), torn("a\u20ac".encode())
    (0, 2)
    """
    back = 0
    while back < min(3, len(data) - 1) and data[-1 - back] & 0xC0 == 0x80:  # a continuation byte
        back += 1
    return back
