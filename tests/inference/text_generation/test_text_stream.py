"""Streamed text: whole characters, the text of the whole, and nothing of a stop string."""

import random
from pathlib import Path

import pytest
from stories_model import sentencepiece_model

from consyn_jax.inference.text_generation.text_stream import Decoder
from consyn_jax.tokenization import BPETokenizer

TEXT = "Once upon a time  ünï 你好 👩‍👩‍👧 e\u0301 <s> \n\t\ufffd, end ي"


@pytest.fixture(scope="module")
def sentencepiece(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> BPETokenizer:
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    path.write_bytes(
        sentencepiece_model((shared_data / "parity/stories260K/tok512.bin").read_bytes())
    )
    return BPETokenizer.from_file(path)


@pytest.fixture(params=["bundled", "bytes", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, sentencepiece: BPETokenizer) -> BPETokenizer:
    if request.param == "sentencepiece":
        return sentencepiece
    return BPETokenizer() if request.param == "bundled" else BPETokenizer.bytes()


def streamed(tokenizer: BPETokenizer, ids: list[int], before: list[int], *stop: str) -> list[str]:
    stream = Decoder(tokenizer).stream(before, stop)
    pieces = [stream.push([token]) for token in ids]
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    return pieces


def test_pieces_are_whole_characters_and_sum_to_the_text(tokenizer: BPETokenizer) -> None:
    before = tokenizer.encode("A prompt:")
    ids = tokenizer.encode_batch([f" {TEXT}"], ["text"])[0]
    pieces = streamed(tokenizer, ids, before)
    assert "".join(pieces) == f" {TEXT}"
    assert sum("\ufffd" in piece for piece in pieces) == 1  # the one in the text
    assert len([piece for piece in pieces if piece]) > 15


@pytest.mark.slow
def test_any_tokens_give_the_text_of_the_whole(tokenizer: BPETokenizer) -> None:
    draw = random.Random(0)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for number in range(60):
        ids = draw.choices(range(min(tokenizer.vocab_size, 600)), k=draw.randrange(1, 30))
        before = bos if number % 2 else [*bos, *tokenizer.encode("Lily said")]
        whole, old = tokenizer.decode(before + ids), tokenizer.decode(before)
        assert old + "".join(streamed(tokenizer, ids, before)) == whole, ids


def test_a_stop_string_ends_the_text_and_is_never_shown(tokenizer: BPETokenizer) -> None:
    ids = tokenizer.encode_batch([" one two STOP three"], ["text"])[0]
    before = tokenizer.encode("zero")
    pieces = streamed(tokenizer, ids, before, "never", "STOP", " twice")
    assert "".join(pieces) == " one two "
    assert "".join(streamed(tokenizer, ids, before, "threefold")) == " one two STOP three"


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = Decoder(BPETokenizer.bytes()).stream((), ("\n\n",))
    assert [stream.push(list(text.encode())) for text in ("a\n", "b", "\n")] == ["a", "\nb", ""]
    assert stream.finish() == "\n"
