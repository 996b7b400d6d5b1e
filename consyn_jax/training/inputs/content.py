"""Find documents in the caller's rows by their position_ids, and fingerprint the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from consyn_jax.tokenization.token_ids import as_array

# At most this many rows are read, because reading all rows of a large dataset may take hours.
MOST_ROWS = 100_000
DIGEST_BYTES = 16


def documents(segments: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Split segments [b, T] into documents where positions [b, T] restart at 0; padding stays 0.

    Attention depends only on differences of positions, so the first position of a document does not
    matter.

    >>> documents(np.array([[1, 1, 1, 1, 0]]), np.array([[0, 1, 0, 1, 0]]))
    array([[1, 1, 2, 2, 0]])
    """
    attended = segments > 0
    restarts = (segments[:, 1:] == segments[:, :-1]) & attended[:, 1:] & (positions[:, 1:] == 0)
    begins = np.ones_like(attended)
    begins[:, 1:] = (segments[:, 1:] != segments[:, :-1]) | restarts
    return np.where(attended, np.cumsum(begins & attended, axis=1), 0)


class Fingerprint:
    """A hash of all added values, in order; None after a value that cannot be hashed."""

    def __init__(self) -> None:
        self._hash, self._is_known = hashlib.blake2b(digest_size=DIGEST_BYTES), True

    def add(self, value: Any) -> None:
        """Add a number, text or array, or a sequence or mapping of such values."""
        if isinstance(value, Mapping):
            for key in sorted(value, key=str):
                self._tag("key", str(key))
                self.add(value[key])
        elif isinstance(value, str | bytes):
            self._hash.update(
                value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
            )
            self._tag("text", str(len(value)))
        elif value is None:
            self._tag("none", "")
        else:
            self._add_array(value)

    def _add_array(self, value: Any) -> None:
        try:
            array = as_array(value)
        except (ValueError, TypeError, RuntimeError):  # rows of unequal length, or an object
            array = np.empty(0, object)
        if array.dtype.kind in "iub":  # the hash does not depend on the integer dtype
            array = array.astype(np.int64)
        elif array.dtype.kind == "f":
            array = array.astype(np.float64)
        elif isinstance(value, list | tuple):
            self._tag("items", str(len(value)))
            for item in value:
                self.add(item)
            return
        else:
            self._is_known = False
            return
        self._hash.update(np.ascontiguousarray(array).tobytes())
        self._tag(array.dtype.kind, str(array.shape))

    def _tag(self, kind: str, about: str) -> None:
        self._hash.update(f"|{kind} {about}|".encode())

    @property
    def value(self) -> str | None:
        """The hash as hexadecimal digits, or None."""
        return self._hash.hexdigest() if self._is_known else None


def fingerprint_of(rows: Any, look: Callable[[int, Any], None] | None = None) -> str | None:
    """Fingerprint rows of any kind.

    Args:
        look: Function that is called with the index and content of each row.

    Returns:
        The hash; None if a second read gives other content, or if there are more than `MOST_ROWS`
        rows.
    """
    count = len(rows)
    if not count or (count > MOST_ROWS and look is None):
        return None
    found, first, again = Fingerprint(), Fingerprint(), Fingerprint()
    for i in range(min(count, MOST_ROWS)):
        row = rows[i]
        if look is not None:
            look(i, row)
        found.add(row)
        if i == 0:
            first.add(row)
    again.add(rows[0])  # differs if rows are drawn at random
    return found.value if first.value == again.value and count <= MOST_ROWS else None
