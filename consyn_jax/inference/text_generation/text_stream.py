"""Decode a stream of tokens to text, in complete characters and up to a stop string.

A character may span several tokens, and the text of a token may depend on earlier tokens.
SentencePiece, for example, drops a space at the beginning, and decodes a run of byte tokens as one
unit. So new tokens are decoded together with earlier tokens, and text is released when later tokens
can no longer change it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from consyn_jax.tokenization import BPETokenizer

BROKEN = "\ufffd"  # the decoded form of an incomplete character
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Decoder:
    """Creates text streams, which share one table of the tokenizer's single-byte tokens.

    A run of byte tokens is decoded as a unit: if it is not UTF-8, each byte becomes U+FFFD.
    """

    def __init__(self, tokenizer: BPETokenizer) -> None:
        self.tokenizer = tokenizer
        model = json.loads(tokenizer.to_json())["model"]
        vocabulary = model["vocab"]
        tokens = (
            vocabulary.items()
            if isinstance(vocabulary, dict)
            else ((token, index) for index, (token, _) in enumerate(vocabulary))
        )
        falls_back = bool(model.get("byte_fallback"))
        self.run_bytes = {i for token, i in tokens if falls_back and _BYTE.fullmatch(token)}

    def stream(self, before: Sequence[int] = (), stop: Sequence[str] = ()) -> TextStream:
        """Begin the stream of a text that follows the tokens `before`."""
        return TextStream(self, before, stop)


class TextStream:
    """The text of one continuation, extended token by token.

    Attributes:
        text: The text released so far, without a stop string.
        stopped: Whether a stop string was found.
    """

    def __init__(self, decoder: Decoder, before: Sequence[int], stop: Sequence[str]) -> None:
        self._decoder, self._stop = decoder, tuple(s for s in stop if s)
        self._ids, self._start = list(before), 0
        self._read = len(before)  # number of tokens whose text is in `_pending` or `text`
        self._pending, self.text, self.stopped = "", "", False
        self._forget()

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens, and return the new text that later tokens cannot change."""
        if self.stopped:
            return ""
        for token in tokens:
            self._ids.append(token)
            self._take(last=False)
        return self._give(last=False)

    def finish(self) -> str:
        """Return the rest of the text, including incomplete characters."""
        if self.stopped:
            return ""
        self._take(last=True)
        return self._give(last=True)

    def release(self) -> None:
        """Free the tokens of a finished text."""
        self._ids, self._start, self._read = [], 0, 0

    def _take(self, last: bool) -> None:
        """Decode the characters that are complete, and add them to `_pending`."""
        if self._read == len(self._ids):
            return
        if not last and self._ids[-1] in self._decoder.run_bytes:
            return
        decode = self._decoder.tokenizer.decode
        before, after = (
            decode(self._ids[self._start : self._read]),
            decode(self._ids[self._start :]),
        )
        if not last and after.endswith(BROKEN):
            return
        self._pending += after[len(before) :]
        self._read = len(self._ids)
        self._forget()

    def _forget(self) -> None:
        """Drop tokens from the front, but keep enough context to decode the rest."""
        decode = self._decoder.tokenizer.decode
        for start in range(self._read - 1, self._start, -1):
            is_inside = self._ids[start] in self._decoder.run_bytes
            text = "" if is_inside else decode(self._ids[start : self._read])
            if text.strip() and not text.startswith(BROKEN):
                self._start = start
                return

    def _give(self, last: bool) -> str:
        """Release the pending text up to a stop string, or up to what may begin a stop string."""
        found = [at for s in self._stop if (at := self._pending.find(s)) >= 0]
        if found:
            self.stopped = True
            new, self._pending = self._pending[: min(found)], ""
        else:
            keep = 0 if last else self._possible_stop()
            cut = len(self._pending) - keep
            new, self._pending = self._pending[:cut], self._pending[cut:]
        self.text += new
        return new

    def _possible_stop(self) -> int:
        """Number of characters at the end of the pending text that may begin a stop string."""
        return max(
            (
                size
                for s in self._stop
                for size in range(1, len(s))
                if self._pending.endswith(s[:size])
            ),
            default=0,
        )
