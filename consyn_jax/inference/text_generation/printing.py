"""Print texts in the order of their prompts while several are generated at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from consyn_jax.errors import visible
from consyn_jax.inference.text_generation.continuations import Update, Wish
from consyn_jax.inference.text_generation.prompts import EncodedPrompt


def shown(text: str, stream: TextIO) -> str:
    """Escape control characters if the output is a terminal."""
    return visible(text) if stream.isatty() else text


class OrderedPrinter:
    """Prints texts in order, and streams the first unfinished text.

    If there are several texts, a line before each text names its prompt.
    """

    def __init__(
        self, stream: TextIO, prompts: Sequence[EncodedPrompt], wish: Wish, include_prompt: bool
    ) -> None:
        self._stream, self._prompts, self._wish = stream, prompts, wish
        self._include_prompt, self._next, self._begun = include_prompt, 0, False
        self._waiting: dict[int, str] = {}
        self._finished: set[int] = set()

    def add(self, update: Update) -> None:
        """Add new text, and print all text that is next in order."""
        place = update.prompt * self._wish.sequences + update.sequence
        self._waiting[place] = self._waiting.get(place, "") + update.new
        if update.ends:
            self._finished.add(place)
        while self._next in self._finished or (self._wish.streams and self._next in self._waiting):
            self._print(self._waiting.pop(self._next, ""))
            if self._next not in self._finished:
                break
            self._write("\n")
            self._finished.remove(self._next)
            self._next, self._begun = self._next + 1, False
        self._stream.flush()

    def _print(self, text: str) -> None:
        if not self._begun:
            self._begun = True
            self._begin()
        self._write(text)

    def _begin(self) -> None:
        number, sequence = divmod(self._next, self._wish.sequences)
        prompt = self._prompts[number]
        if len(self._prompts) * self._wish.sequences > 1:
            of = f", text {sequence + 1}" if self._wish.sequences > 1 else ""
            self._write(f"--- {prompt.given.where}{of}\n")
        if self._include_prompt:
            self._write(prompt.text)

    def _write(self, text: str) -> None:
        self._stream.write(shown(text, self._stream))
