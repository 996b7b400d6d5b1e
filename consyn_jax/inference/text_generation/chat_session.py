"""A chat in the terminal: its history, and streamed answers."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from consyn_jax.errors import Unsaved, UserError
from consyn_jax.inference.text_generation.continuations import Wish, continuations
from consyn_jax.inference.text_generation.prompts import GivenPrompt, PromptEncoder
from consyn_jax.model.generation.engine import Engine
from consyn_jax.tokenization import BPETokenizer

HELP = "Type a message. /reset forgets the conversation, /exit or Ctrl-D ends it."


class ChatSession:
    """A conversation with a model.

    Args:
        say: Function that prints a piece of an answer, without a line end.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: BPETokenizer,
        encoder: PromptEncoder,
        wish: Wish,
        say: Callable[[str], None],
    ) -> None:
        self._engine, self._tokenizer, self._encoder = engine, tokenizer, encoder
        self._wish, self._say = wish, say
        self.messages: list[dict[str, Any]] = []

    def answer(self, text: str) -> str:
        """Send a message, print the answer, and add both to the history.

        If Ctrl-C stops the answer, the history has the part that was printed.

        Returns:
            The reason why the answer ended: a value of `Update.ends`, or "interrupted".

        Raises:
            UserError: The conversation does not fit the model's context; the history is unchanged.
        """
        asked = {"role": "user", "content": text}
        given = GivenPrompt("The conversation", None, [*self.messages, asked])
        prompt, context = self._encoder.encode(given), self._engine.plan.config.context
        if len(prompt.ids) >= context:
            raise UserError(
                f"The conversation has {len(prompt.ids):,} tokens with this message, and the "
                f"model's context is {context:,}. Start a new conversation with /reset."
            )
        said, ends = "", ""
        try:
            for update in continuations(self._engine, self._tokenizer, [prompt], self._wish):
                self._say(update.new)
                said, ends = update.text, update.ends
        except KeyboardInterrupt as stopped:
            if isinstance(stopped, Unsaved):
                if stopped.number != signal.SIGINT:
                    raise
                stopped.settle()
            ends = "interrupted"
        self.messages += [asked, {"role": "assistant", "content": said}]
        return ends

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages.clear()
