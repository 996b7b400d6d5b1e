"""Long documents in parts of about a megabyte, cut where the tokenizer does not see across.

So a document of any length is cleaned and tokenised in bounded memory and by several processes, and its ids are those of the whole.
Where a document begins decides where it is cut, and nothing else: equal texts have equal parts, whatever file they come from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from consyn_jax.tokenization import BPETokenizer

PART_BYTES = 1 << 20
# Behind a part's length, where a cut is looked for.
SEARCH_BYTES = 1 << 16
LIMIT = PART_BYTES + SEARCH_BYTES
WINDOW = 256
TRIES = 16
# A lone newline before a letter, then a space between letters, then any newline and any lone space in front of something visible: the
# places that the patterns of byte-level vocabularies keep apart. Control characters (C2 begins some) and a byte order mark (EF begins
# it) are not to come first in a part, since cleaning would take them for the first of the document.
PLACES = (
    re.compile(rb"(?<=[^\s])\n(?=[A-Za-z])"),
    re.compile(rb"(?<=[a-z])(?= [A-Za-z])"),
    re.compile(rb"\n(?=[^\x00-\x20\x7f-\xc2\xef])"),
    re.compile(rb"(?<=[^\s])(?= [^\x00-\x20\x7f-\xc2\xef])"),
)


def parts(chunks: Iterable[bytes], tokenizer: BPETokenizer) -> Iterator[tuple[bytes, bool]]:
    """The bytes of one document, given in chunks of any size, as parts: (bytes, whether it is the last).

    A document of up to `LIMIT` bytes is one part. The last part is never empty, unless the document is.
    """
    buffer = bytearray()
    for chunk in chunks:
        buffer += chunk
        while len(buffer) > LIMIT:
            at = _cut(bytes(buffer[:LIMIT]), tokenizer)
            yield bytes(buffer[:at]), False
            del buffer[:at]
    yield bytes(buffer), True


def _cut(data: bytes, tokenizer: BPETokenizer) -> int:
    """Where the first part of `data` (`LIMIT` bytes) ends.

    A candidate is taken when the text around it has the same ids in one piece as in two. Text without any such place, such as a
    megabyte of one letter, is cut all the same, since otherwise neither time nor memory would be bounded.
    """
    for place in PLACES:
        for tried, match in enumerate(place.finditer(data, PART_BYTES)):
            at = match.end()
            if tried == TRIES:
                break
            left, right = data[at - WINDOW : at].decode("utf-8", "ignore"), data[at : at + WINDOW].decode("utf-8", "ignore")
            if tokenizer.encode(left + right) == tokenizer.encode(left) + tokenizer.encode(right):
                return at
    return LIMIT - _begun(data)


def _begun(data: bytes) -> int:
    """Bytes at the end of `data` that begin a character of UTF-8 which goes on behind it."""
    for back in range(1, 4):
        byte = data[-back]
        if byte >= 0xC0:
            return back if back < 2 + (byte >= 0xE0) + (byte >= 0xF0) else 0
        if byte < 0x80:
            return 0
    return 0
