"""Train or validation, decided by each document alone, so that no document changes sides when others are added.

Duplicates fall on the same side. A corpus of one document is cut by position instead: its last part is held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

TRAIN, VALIDATION = "train", "validation"
# Part of every store's content: another salt is another split.
SALT = b"consyn_jax"


def side_of(text: str, fraction: float) -> str:
    """The split that a document belongs to: a hash of its text, read as a number in [0, 1), against `fraction`.

    >>> side_of("a document", 0.0), side_of("a document", 1.0)
    ('train', 'validation')
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=SALT).digest()
    return VALIDATION if int.from_bytes(digest, "little") < fraction * 2**64 else TRAIN


def cut(text: str, fraction: float) -> tuple[str, str]:
    """One document in two: the last `fraction` of its UTF-8 bytes, and what comes before. No character is torn.

    >>> cut("0123456789", 0.1)
    ('012345678', '9')
    >>> cut("aaaé", 0.2)
    ('aaa', 'é')
    """
    data = text.encode()
    at = int((1 - fraction) * len(data))
    while 0 < at < len(data) and data[at] & 0xC0 == 0x80:  # a continuation byte
        at -= 1
    return data[:at].decode(), data[at:].decode()


def split_documents(documents: Iterable[str], fraction: float) -> Iterator[tuple[str, str]]:
    """(split, text) of every document, in order: by hash, or by position when there is exactly one document.

    Args:
        fraction: share of the documents (of the bytes of one document) that goes to validation, in [0, 1).
    """
    remaining = iter(documents)
    first = next(remaining, None)
    if first is None:
        return
    second = next(remaining, None)
    if second is None:
        for side, part in zip((TRAIN, VALIDATION), cut(first, fraction), strict=True):
            if part:
                yield side, part
        return
    for text in (first, second):
        yield side_of(text, fraction), text
    del first, second
    for text in remaining:
        yield side_of(text, fraction), text
