"""stories260K, a real small llama: the checkpoint with its tokenizer, in each form tests need."""

import shutil
import struct
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend
from tokenizers.processors import TemplateProcessing

from consyn_jax.tokenization import BPETokenizer


def stories_model(shared_data: Path, directory: Path) -> Path:
    """Fill a directory with the checkpoint and its tokenizer; transformers can load it, too."""
    parity = shared_data / "parity" / "stories260K"
    directory.mkdir(exist_ok=True)
    for file in (parity / "hf").iterdir():
        shutil.copyfile(file, directory / file.name)
    stories_tokenizer(parity / "tok512.bin").save(directory, "llama")
    return directory


def stories_tokenizer(file: Path) -> BPETokenizer:
    """Read the file of llama2.c: (score, length, piece) of each id, merged by score, with bytes for
    other characters."""
    data, at = file.read_bytes(), 4
    pieces: list[tuple[str, float]] = []
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        at += 8 + length
        pieces.append((data[at - length : at].decode(), score))
    special = ["<unk>", "<s>", "</s>"]
    ids = {name: i for i, name in enumerate([*special, *(piece for piece, _ in pieces[3:])])}
    scores = dict(pieces[259:])  # behind the bytes
    merges = [
        (piece[:i], piece[i:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for i in range(1, len(piece))
        if piece[:i] in ids and piece[i:] in ids
    ]
    made = Tokenizer(BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = Prepend(" ")
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return BPETokenizer(made.to_str())


def sentencepiece_model(data: bytes) -> bytes:
    """A SentencePiece model (BPE with bytes) of the tokens in a file of llama2.c."""
    at, pieces = 4, list[tuple[bytes, float]]()
    while at < len(data):
        score, size = struct.unpack_from("<fi", data, at)
        pieces.append((data[at + 8 : at + 8 + size].replace(b" ", "▁".encode()), score))
        at += 8 + size
    proto = b""
    for number, (text, score) in enumerate(pieces):
        kind = 2 if number == 0 else 3 if number < 3 else 6 if number < 259 else 1
        if kind == 3:
            text = text.strip().replace("▁".encode(), b"")
        piece = field(1, text) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        proto += field(1, piece)
    trainer = b"\x18\x02" + varint(35 << 3) + b"\x01"  # BPE, byte_fallback
    rules = b"\x20\x00"  # remove_extra_whitespaces
    return proto + field(2, trainer) + field(3, rules)


def field(number: int, value: bytes) -> bytes:
    """A field of a protocol buffer that holds bytes."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(number: int) -> bytes:
    """A whole number as a protocol buffer writes it."""
    found = b""
    while number > 0x7F:
        found, number = found + bytes([number & 0x7F | 0x80]), number >> 7
    return found + bytes([number])
