"""Byte-level BPE on the `tokenizers` package: text to ids and back, exactly.

Every byte has a token, so nothing is unknown. The text of a special token in a document is ordinary text: it is encoded as bytes and
never becomes the special id, so no document can forge the end of another.
"""

from __future__ import annotations

import builtins
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.processors import TemplateProcessing

from consyn_jax.config import UserError
from consyn_jax.tokenization.merges import count_words, learn_merges

PAD, BOS, EOS = SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The words of GPT-2."""

SPLIT_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The words of o200k (GPT-4o, Llama 4): letters keep their combining marks, digits go by threes, newlines and indentation by runs."""

# Names that published tokenizers use, the first that a vocabulary has wins. GPT-2's <|endoftext|> ends and begins.
KNOWN_NAMES = {
    "bos_token": (BOS, "<|begin_of_text|>", "<|startoftext|>", "<|begin▁of▁sentence|>", "<s>", "<bos>", "[BOS]"),
    "eos_token": (EOS, "<|end_of_text|>", "<|endoftext|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "[EOS]"),
    "pad_token": (PAD, "<|finetune_right_pad_id|>", "<|padding|>", "<pad>", "[PAD]"),
}
LARGEST_ID = 1 << 24


class BPETokenizer:
    """A tokenizer with a beginning, an end and a padding token. `BPETokenizer()` is the bundled vocabulary of 49,152.

    What is made here has distinct `<|pad|>`, `<|bos|>` and `<|eos|>`. A vocabulary from elsewhere that lacks one uses its
    end-of-text token in that place.
    """

    def __init__(self, json_text: str | None = None, bos_token: str | None = None, eos_token: str | None = None, pad_token: str | None = None) -> None:
        """From the text of a tokenizer.json (the bundled one when None); roles without a name are found by known names.

        Raises:
            UserError: not a BPE tokenizer, a named token is not in it, or it has no end-of-text token.
        """
        self._tokenizer = _parse(_bundled_json() if json_text is None else json_text)
        # A published file may ask for these. Documents cut short or padded, or merged at random, are not what a run should train on.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.model.dropout = None
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._size = max(vocabulary.values()) + 1
        if self._size > LARGEST_ID:
            raise UserError(f"The tokenizer has token id {self._size - 1}, more than any embedding holds. Check the ids in its tokenizer.json.")
        self._special = _special_tokens(vocabulary, {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token})
        self._ids = {role: vocabulary[name] for role, name in self._special.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.to_json(), self._special["bos_token"], self._special["eos_token"], self._special["pad_token"])

    def __repr__(self) -> str:
        return f"BPETokenizer(vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"

    # ------------------------------------------------------------------------------------------------------------ where they come from

    @classmethod
    def bytes(cls) -> BPETokenizer:
        """256 byte values and the special tokens: byte b has id b, `<|pad|>` 256, `<|bos|>` 257, `<|eos|>` 258."""
        symbols = [BYTE_SYMBOLS[value] for value in range(256)]
        return cls(_build([*symbols, *SPECIAL_TOKENS], [], SPECIAL_TOKENS, SPLIT_PATTERN))

    @classmethod
    def train(
        cls, files: str | Path | Sequence[str | Path], vocab_size: int, pattern: str = SPLIT_PATTERN, special_tokens: Sequence[str] = SPECIAL_TOKENS
    ) -> BPETokenizer:
        """Learns a vocabulary from UTF-8 text files. Same result for the same text, on any machine.

        Raises:
            UserError: a file is missing or not UTF-8, or as `train_from_iterator`.
        """
        paths = [files] if isinstance(files, str | Path) else files
        return cls.train_from_iterator((_read_text(Path(path)) for path in paths), vocab_size, pattern, special_tokens)

    @classmethod
    def train_from_iterator(
        cls, texts: Iterable[str], vocab_size: int, pattern: str = SPLIT_PATTERN, special_tokens: Sequence[str] = SPECIAL_TOKENS
    ) -> BPETokenizer:
        """Learns a vocabulary of `vocab_size` tokens: `special_tokens`, the 256 bytes in GPT-2's order, then merges as learned.

        Text with few different words gives fewer tokens. `pattern` cuts text into the words that no token crosses.

        Raises:
            UserError: the size leaves no room for the bytes and special tokens, or no special token can mark the end of a text.
        """
        _check_room(vocab_size, special_tokens)
        return cls.train_from_counts(count_words(texts, pattern), vocab_size, pattern, special_tokens)

    @classmethod
    def train_from_counts(
        cls, word_counts: Counter[builtins.bytes], vocab_size: int, pattern: str = SPLIT_PATTERN, special_tokens: Sequence[str] = SPECIAL_TOKENS
    ) -> BPETokenizer:
        """As `train_from_iterator`, from words counted by `merges.count_words` with the same pattern, which a caller may have weighted."""
        _check_room(vocab_size, special_tokens)
        reserved = [token.encode("utf-8") for token in special_tokens]
        merges = learn_merges(word_counts, vocab_size - 256 - len(special_tokens), reserved)
        symbols = [(_symbols(left), _symbols(right)) for left, right in merges]
        tokens = [*special_tokens, *sorted(BYTE_SYMBOLS), *dict.fromkeys(left + right for left, right in symbols)]
        return cls(_build(tokens, symbols, special_tokens, pattern))

    @classmethod
    def from_file(cls, path: str | Path) -> BPETokenizer:
        """Loads a tokenizer.json, or a directory with one; a tokenizer_config.json beside it names its special tokens.

        Raises:
            UserError: nothing there, a broken file, a tokenizer that is not BPE, or one without an end-of-text token.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"There is no tokenizer at {file}. Give a tokenizer.json or a directory that contains one.")
        try:
            return cls(_read_text(file), **_configured_names(file.with_name("tokenizer_config.json")))
        except UserError as error:
            raise UserError(f"{file}: {error}") from error

    # ------------------------------------------------------------------------------------------------------------ text and ids

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """The ids of a text. Special tokens come from the two switches alone, never from the text.

        Raises:
            UserError: the text has a lone surrogate, which is not a character.
        """
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            _check_surrogates([text])
            raise
        return [self.bos_token_id] * add_bos + ids + [self.eos_token_id] * add_eos

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, without special tokens, on all cores.

        Raises:
            UserError: a text has a lone surrogate, which is not a character.
        """
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            _check_surrogates(texts)
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8, as at the cut end of a sample, become U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    # ------------------------------------------------------------------------------------------------------------ what they are

    @property
    def vocab_size(self) -> int:
        """The largest id plus one, special tokens included: the rows that an embedding needs."""
        return self._size

    @property
    def bos_token_id(self) -> int:
        """Id of the token that begins a text."""
        return self._ids["bos_token"]

    @property
    def eos_token_id(self) -> int:
        """Id of the token that ends a text."""
        return self._ids["eos_token"]

    @property
    def pad_token_id(self) -> int:
        """Id of the token that fills up a batch."""
        return self._ids["pad_token"]

    @cached_property
    def sha256(self) -> str:
        """Hash of everything that affects ids and text here, in a canonical form: equal tokenizers have equal hashes."""
        content = {**json.loads(self.to_json()), **self._special}
        # Only other programs use it, and transformers writes an empty one where there is none.
        del content["post_processor"]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode("utf-8")).hexdigest()

    def to_json(self) -> str:
        """The tokenizer.json, as `tokenizers` and transformers read it."""
        return self._tokenizer.to_str()

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `from_file` and transformers' AutoTokenizer load.

        Raises:
            UserError: there is a file where the directory should be.
        """
        directory = Path(directory)
        if directory.exists() and not directory.is_dir():
            raise UserError(f"{directory} is a file, so no tokenizer can be saved in it. Give a directory.")
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            **self._special,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
        }
        for name, text in (("tokenizer.json", self.to_json()), ("tokenizer_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")):
            fresh = directory / f".{name}.new"  # a preparation may be killed here and go on with what it finds
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(directory / name)


def load_tokenizer(spec: str) -> BPETokenizer:
    """The tokenizer that `--tokenizer` names: `default`, `bytes`, or a path.

    Raises:
        UserError: as `BPETokenizer.from_file`.
    """
    if spec == "default":
        return BPETokenizer()
    if spec == "bytes":
        return BPETokenizer.bytes()
    return BPETokenizer.from_file(spec)


# ----------------------------------------------------------------------------------------------------------------------- building


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary. Source: GPT-2's encoder, `bytes_to_unicode`."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(value) if value in printable else chr(next(others)) for value in range(256)]


BYTE_SYMBOLS = _byte_symbols()


def _symbols(token: bytes) -> str:
    return "".join(BYTE_SYMBOLS[value] for value in token)


def _check_room(vocab_size: int, special_tokens: Sequence[str]) -> None:
    if vocab_size < 256 + len(special_tokens):
        raise UserError(f"A vocabulary of {vocab_size} tokens has no room for 256 bytes and {len(special_tokens)} special tokens. Ask for more.")


def _build(tokens: Sequence[str], merges: Sequence[tuple[str, str]], special_tokens: Sequence[str], pattern: str) -> str:
    """The tokenizer.json of a byte-level BPE: `tokens` in the order of their ids, a BOS in front when a caller asks for specials."""
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=list(merges)))
    tokenizer.pre_tokenizer = PreTokenizers([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    if BOS in special_tokens:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tokens.index(BOS))]
        )
    return tokenizer.to_str()


# ----------------------------------------------------------------------------------------------------------------------- reading


def _bundled_json() -> str:
    return gzip.decompress(resources.files("consyn_jax.tokenization").joinpath("default.json.gz").read_bytes()).decode("utf-8")


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}). Convert it or leave it out.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check the path.") from error


def _check_surrogates(texts: Sequence[str]) -> None:
    """Names the first text that UTF-8 cannot hold. The Rust side says only that it wants a str."""
    surrogate = re.compile("[\ud800-\udfff]")
    for text in texts:
        if isinstance(text, str) and (found := surrogate.search(text)):
            raise UserError(
                f"A text has the lone surrogate U+{ord(found.group()):04X} at character {found.start()}, which is not a character. Remove it from the data."
            )


def _parse(json_text: str) -> Tokenizer:
    """A `tokenizers` BPE from its JSON, checked first in Python because the Rust reader's messages name lines, not mistakes."""
    try:
        content = json.loads(json_text)
    except (ValueError, RecursionError) as error:
        raise UserError("This is not JSON, or it is cut off. Download or save the tokenizer.json again.") from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or "merges" not in model or model.get("type", "BPE") != "BPE":
        raise UserError("This is not a BPE tokenizer.json, which has a 'model' of type BPE with 'vocab' and 'merges'. Give one that is.")
    try:
        return Tokenizer.from_str(json_text)
    except BaseException as error:
        # The Rust reader raises plain Exception; where it panics, a PanicException, which is not one and cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"The tokenizer.json is damaged: {error}. Download or save it again.") from error


def _configured_names(file: Path) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json names, as `{role: token}`; none where there is no such file."""
    if not file.is_file():
        return {}
    try:
        config = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.name} beside it is not JSON. Repair it or remove it.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file.name} beside it is not a JSON object. Repair it or remove it.")
    names: dict[str, str] = {}
    for role in KNOWN_NAMES:
        entry = config.get(role)
        name = entry.get("content") if isinstance(entry, dict) else entry
        if not isinstance(name, str | None):
            raise UserError(f"{file.name} beside it gives {role} as {entry!r}, which is no token. Give the token's text.")
        if name is not None:
            names[role] = name
    return names


def _special_tokens(vocabulary: dict[str, int], named: dict[str, str | None]) -> dict[str, str]:
    """The token of each role: as named, else by known names, else the end-of-text token."""
    special: dict[str, str] = {}
    for role, known in KNOWN_NAMES.items():
        name = named[role] or next((candidate for candidate in known if candidate in vocabulary), None)
        if name is not None and name not in vocabulary:
            raise UserError(f"The tokenizer's {role} {name!r} is not in its vocabulary. Correct its tokenizer_config.json.")
        if name is not None:
            special[role] = name
    if "eos_token" not in special:
        tried = ", ".join(KNOWN_NAMES["eos_token"])
        raise UserError(f"The tokenizer has no end-of-text token (looked for {tried}). Name its eos_token in a tokenizer_config.json beside it.")
    return {role: special.get(role, special["eos_token"]) for role in KNOWN_NAMES}
