"""Continue each prompt until an EOS token, a stop string or a limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from consyn_jax.inference.text_generation.prompts import EncodedPrompt
from consyn_jax.inference.text_generation.text_stream import Decoder, TextStream
from consyn_jax.model.generation.decoding import CHUNK
from consyn_jax.model.generation.engine import Engine, Request
from consyn_jax.tokenization import BPETokenizer

STREAM_STEPS, STOP_STEPS = 4, 16  # tokens between two checks of the text


@dataclass(frozen=True)
class Wish:
    """Settings of the continuations of each prompt.

    Attributes:
        max_tokens: Maximum number of new tokens; fewer if the context is full earlier.
        sequences: Number of continuations of each prompt.
        stop: Stop strings, which end a continuation and are left out of it.
        streams: Whether to yield new text every few tokens; otherwise it comes in larger pieces.
    """

    max_tokens: int
    sequences: int = 1
    stop: tuple[str, ...] = ()
    streams: bool = False


class Update(NamedTuple):
    """New text of a continuation.

    Attributes:
        prompt: Index of the prompt.
        sequence: Index of the continuation among all continuations of this prompt.
        new: Text added since the last update.
        text: The complete text so far.
        tokens: Number of tokens of `text`.
        ends: Why the continuation has ended: "eos", "stop" (a stop string), "length" (`max_tokens`)
            or "context" (the model's context is full); "" while it goes on.
    """

    prompt: int
    sequence: int
    new: str
    text: str
    tokens: int
    ends: str


def continuations(
    engine: Engine, tokenizer: BPETokenizer, prompts: Sequence[EncodedPrompt], wish: Wish
) -> Iterator[Update]:
    """Continue all prompts, and yield updates of their texts in any order."""
    context = engine.plan.config.context
    requests = [
        Request(p.ids, min(wish.max_tokens, context - len(p.ids)), number, sequence)
        for number, p in enumerate(prompts)
        for sequence in range(wish.sequences)
    ]
    decoder = Decoder(tokenizer)
    streams: dict[int, TextStream] = {}
    counts = [0] * len(requests)
    steps = STREAM_STEPS if wish.streams else STOP_STEPS if wish.stop else CHUNK
    for piece in engine.run(requests, steps):
        request = requests[piece.request]
        stream = streams.get(piece.request)
        if stream is None:
            stream = streams[piece.request] = decoder.stream(request.ids, wish.stop)
        if stream.stopped:
            continue
        tokens = piece.tokens[:-1] if piece.ends == "eos" else piece.tokens
        taken, new = _take(stream, tokens, last=bool(piece.ends))
        counts[piece.request] += taken
        ends = piece.ends
        if stream.stopped:
            ends = "stop"
            engine.stop(piece.request)
        elif ends == "length" and request.max_tokens < wish.max_tokens:
            ends = "context"
        if ends:
            streams[piece.request].release()
        yield Update(
            *(request.prompt, request.sequence, new, stream.text, counts[piece.request], ends)
        )


def _take(stream: TextStream, tokens: Sequence[int], last: bool) -> tuple[int, str]:
    """Push tokens up to a stop string; return the number of pushed tokens and the new text."""
    new, taken = "", 0
    for token in tokens:
        new += stream.push([token])
        taken += 1
        if stream.stopped:
            return taken, new
    return taken, new + (stream.finish() if last else "")
