"""Split long documents into parts of about a megabyte, at places that no token spans.

So a document of any length can be cleaned and tokenised in bounded memory and by several processes.
The ids are the same as for the whole document. The cuts depend only on the text, so equal documents
from different files have equal parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from consyn_jax.tokenization import BPETokenizer

PART_BYTES = 1 << 20
# Number of bytes after the first `PART_BYTES` that are searched for a place to cut.
SEARCH_BYTES = 1 << 16
LIMIT = PART_BYTES + SEARCH_BYTES
WINDOW = 256
TRIES = 16
# Places where byte-level vocabularies separate words, in order of preference: a single newline
# before a letter, a space between letters, any newline, and any single space before something
# visible. A part must not begin with a control character (some start with byte C2) or a byte order
# mark (byte EF), because cleaning would treat it as the beginning of the document.
PLACES = (
    re.compile(rb"(?<=[^\s])\n(?=[A-Za-z])"),
    re.compile(rb"(?<=[a-z])(?= [A-Za-z])"),
    re.compile(rb"\n(?=[^\x00-\x20\x7f-\xc2\xef])"),
    re.compile(rb"(?<=[^\s])(?= [^\x00-\x20\x7f-\xc2\xef])"),
)


def parts(chunks: Iterable[bytes], tokenizer: BPETokenizer) -> Iterator[tuple[bytes, bool]]:
    """Split one document, given in chunks of any size, into parts: (bytes, whether it is the last).

    A document of up to `LIMIT` bytes is one part. Only an empty document has an empty part.
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
    """Find the end of a part at the beginning of `data`.

    The cut must not change the ids of the text around it. If there is no such cut, for example in a
    megabyte of one letter, all of `data` is one part, to bound time and memory.

    Args:
        data: the next `LIMIT` bytes of the document.
    """
    for place in PLACES:
        for tried, match in enumerate(place.finditer(data, PART_BYTES)):
            at = match.end()
            if tried == TRIES:
                break
            left = data[at - WINDOW : at].decode("utf-8", "ignore")
            right = data[at : at + WINDOW].decode("utf-8", "ignore")
            whole, *pieces = tokenizer.encode_batch(
                [left + right, left, right], after=["text", "text", "text"]
            )
            if whole == pieces[0] + pieces[1]:
                return at
    return LIMIT - _begun(data)


def _begun(data: bytes) -> int:
    """Return the number of bytes of an incomplete UTF-8 character at the end of `data`."""
    for back in range(1, 4):
        byte = data[-back]
        if byte >= 0xC0:
            return back if back < 2 + (byte >= 0xE0) + (byte >= 0xF0) else 0
        if byte < 0x80:
            return 0
    return 0
