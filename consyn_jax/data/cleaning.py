"""Cleaning of a document's text: canonical composition (NFC) and the removal of control characters, each of which can be left out.

Both leave text alone that needs nothing, which nearly all text does, so that what costs is the looking: on one core, 470 MB/s of ASCII,
210 MB/s of English with its dashes and quotes, and 48 MB/s once a text has a character that composition could concern (figures of a
2-core machine, CPython 3.11; the last is `unicodedata.is_normalized`).
"""

from __future__ import annotations

import re
import unicodedata

NORMALIZED, CONTROL_CHARACTERS = "normalized", "control_characters"
# Category Cc without \t, \n and \r. Form feed and vertical tab go as well: they are commands to a printer, stand beside a line break
# (where dropping them joins no words), and U+0085 and U+001C to U+001F, which also count as line breaks to Python, are in practice
# the traces of a wrong encoding.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# Anything outside the ranges in which no character combines, changes under NFC, or composes with the one before it (a test goes
# through all of Unicode). A text within them is NFC, and this search is several times as fast as asking unicodedata.
_MAY_CHANGE = re.compile(
    "[^\x00-\u02ff\u0400-\u0482\u048a-\u052f\u1e00-\u1eff\u2010-\u205e\u20a0-\u20cf\u3001-\u3029\u309b-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff01-\uff9d]"
)
_BYTE_ORDER_MARK = "\ufeff"


def clean(text: str, normalize: str = "nfc", control_characters: str = "remove") -> tuple[str, dict[str, int]]:
    """The cleaned text and what was done: "normalized" is 1 where composition changed the text, "control_characters" the number removed.

    Args:
        normalize: "nfc" composes characters canonically (Unicode Standard Annex 15); "none" leaves them.
        control_characters: "remove" drops control characters other than tab, line feed and carriage return, and byte order marks at
            the beginning of a text; "keep" leaves them.

    Only counts above zero are given. Cleaning twice changes nothing more, and a text cut in front of an ASCII letter can be cleaned in
    parts: nothing composes with an ASCII letter behind it.

    >>> clean("cafe\u0301\\x00")
    ('café', {'control_characters': 1, 'normalized': 1})
    """
    counts = {}
    # Removal comes first, because what it brings together may compose.
    if control_characters == "remove":
        text, removed = _remove_controls(text)
        if removed:
            counts[CONTROL_CHARACTERS] = removed
    if normalize == "nfc" and not text.isascii() and _MAY_CHANGE.search(text) and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
        counts[NORMALIZED] = 1
    return text, counts


def _remove_controls(text: str) -> tuple[str, int]:
    removed = 0
    if _CONTROLS.search(text):
        text, removed = _CONTROLS.subn("", text)
    if text.startswith(_BYTE_ORDER_MARK):
        length = len(text)
        text = text.lstrip(_BYTE_ORDER_MARK)
        removed += length - len(text)
    return text, removed
