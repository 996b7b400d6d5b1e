"""Whole numbers: divisors, multiples, and decimal digits."""

from __future__ import annotations

from numbers import Integral


def divisors(n: int) -> list[int]:
    """All positive divisors of `n`, ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [d for d in range(1, n + 1) if n % d == 0]


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `n`.

    >>> round_up(50_257, 128)
    50304
    """
    return -(-n // multiple) * multiple


def neighbours(n: int, multiple: int) -> list[int]:
    """The positive multiples of `multiple` next to `n`, at most one on each side.

    >>> neighbours(10, 4), neighbours(3, 4), neighbours(8, 4)
    ([8, 12], [4], [8])
    """
    below = n // multiple * multiple
    return [m for m in dict.fromkeys((below, round_up(n, multiple))) if m > 0]


def natural(text: str) -> int | None:
    """Parse up to 15 decimal digits; return None for any other text.

    `str.isdigit` is not used, because it accepts ², which `int` refuses.

    >>> natural("12"), natural("-1"), natural("²")
    (12, None, None)
    """
    return int(text) if len(text) <= 15 and text.isdecimal() else None


def is_whole(value: object) -> bool:
    """Whether a value is a Python or NumPy integer, but not a boolean.

    >>> is_whole(3), is_whole(3.0), is_whole(True), is_whole("3")
    (True, False, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool)
