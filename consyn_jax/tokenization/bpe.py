"""`BPETokenizer`: encode text and decode it exactly, based on the `tokenizers` package.

Vocabularies trained here have a token for every byte, so any text can be encoded. If a document
contains the text of a special token, it is encoded as ordinary text and never as the special id. So
no document can contain a false end-of-text token.
"""

from __future__ import annotations

import builtins
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

from consyn_jax.errors import UserError
from consyn_jax.files import write_whole
from consyn_jax.hub_download import download, is_elsewhere
from consyn_jax.tokenization.byte_level import BYTE_SYMBOLS, SPLIT_PATTERN, build_json, spelling
from consyn_jax.tokenization.chat import template_files as chat_templates
from consyn_jax.tokenization.encoding import TextEncoder, plain_ids, switch_off_changes
from consyn_jax.tokenization.merges import count_words, learn_merges
from consyn_jax.tokenization.special_tokens import (
    SPECIAL_TOKENS,
    Roles,
    begins_documents,
    find_special_tokens,
)
from consyn_jax.tokenization.tokenizer_files import (
    CONFIG,
    JSON,
    KEPT,
    TokenizerFiles,
    add_declared,
    holds_tokenizer,
    read_tokenizer,
)
from consyn_jax.tokenization.tokenizer_json import bundled_json, parse, read_text

LARGEST_ID = 1 << 24


class BPETokenizer:
    """A tokenizer with an EOS token, and optional BOS and padding tokens.

    Attributes:
        drops_text: whether encoding drops text that the vocabulary cannot represent; true if it has
            neither an unknown token nor a token for every byte.
        kept_files: the original files of a published tokenizer, by name.

    `BPETokenizer()` is the bundled vocabulary of 49,152 tokens. Vocabularies trained here have the
    special tokens `<|pad|>`, `<|bos|>` and `<|eos|>`. The files of other vocabularies define their
    own special tokens.
    """

    def __init__(
        self,
        json_text: str | None = None,
        roles: Roles | None = None,
        *,
        files: TokenizerFiles | None = None,
    ) -> None:
        """Make a tokenizer from the text of a tokenizer.json, by default the bundled one.

        Args:
            roles: the token of each role "bos_token", "eos_token" and "pad_token", or None if no
                token has the role. A missing role is looked up in the tokenizer.json.
            files: the files of a published tokenizer, instead of `json_text` and `roles`.

        Raises:
            UserError: the tokenizer is neither BPE nor Unigram, lacks a token named in `roles`, or
                has no end-of-text token.
        """
        if files is None:
            files = TokenizerFiles(bundled_json() if json_text is None else json_text, roles or {})
        self._files, self._tokenizer = files, parse(files.json_text)
        self.kept_files = files.kept
        add_declared(self._tokenizer, files.declared)
        switch_off_changes(self._tokenizer)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._size = max(vocabulary.values()) + 1
        if self._size > LARGEST_ID:
            raise UserError(
                f"The tokenizer has token id {self._size - 1}, which is above the limit of "
                f"{LARGEST_ID - 1}. Check the ids in its tokenizer.json."
            )
        content = self._content
        self._special = find_special_tokens(content, vocabulary, files.roles)
        self._ids = {
            role: None if name is None else vocabulary[name] for role, name in self._special.items()
        }
        self._begins = begins_documents(content, self._special, files.add_bos)
        unknown = content["model"].get("unk_token")
        self._unknown = vocabulary.get(unknown, content["model"].get("unk_id"))
        has_bytes = vocabulary.keys() >= set(BYTE_SYMBOLS) or content["model"].get("byte_fallback")
        # Byte vocabularies need no unknown token. Some still declare EOS as their unknown token.
        if self._unknown == self.eos_token_id or vocabulary.keys() >= set(BYTE_SYMBOLS):
            self._unknown = None
        self.drops_text = self._unknown is None and not has_bytes
        self._encoder = TextEncoder(self._tokenizer)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(BPETokenizer, files=self._files), ()

    def __repr__(self) -> str:
        return f"BPETokenizer(vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"

    # -------------------------------------------------------------------------------------- making

    @classmethod
    def bytes(cls) -> BPETokenizer:
        """Build the byte tokenizer: byte b has id b; `<|pad|>`, `<|bos|>`, `<|eos|>` follow."""
        tokens = [*BYTE_SYMBOLS, *SPECIAL_TOKENS]
        return cls(build_json(tokens, [], SPECIAL_TOKENS, SPLIT_PATTERN))

    @classmethod
    def train(
        cls,
        files: str | Path | Sequence[str | Path],
        vocab_size: int,
        pattern: str = SPLIT_PATTERN,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
    ) -> BPETokenizer:
        """Train a tokenizer on UTF-8 text files. The vocabulary depends only on the text.

        Raises:
            UserError: a file is missing or not UTF-8, or `train_from_iterator` refuses an argument.
        """
        paths = [files] if isinstance(files, str | Path) else files
        return cls.train_from_iterator(
            (read_text(Path(path)) for path in paths), vocab_size, pattern, special_tokens
        )

    @classmethod
    def train_from_iterator(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        pattern: str = SPLIT_PATTERN,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
    ) -> BPETokenizer:
        """Train a tokenizer. Its ids are special tokens, 256 bytes in GPT-2's order, then merges.

        Args:
            vocab_size: maximum number of tokens; a text with few different words gives fewer.
            pattern: regular expression for words; no token crosses a word boundary.

        Raises:
            UserError: `vocab_size` is too small for the bytes and special tokens, or there is no
                end-of-text token among the special tokens.
        """
        _check_room(vocab_size, special_tokens)
        return cls.train_from_counts(
            count_words(texts, pattern), vocab_size, pattern, special_tokens
        )

    @classmethod
    def train_from_counts(
        cls,
        word_counts: Counter[builtins.bytes],
        vocab_size: int,
        pattern: str = SPLIT_PATTERN,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
    ) -> BPETokenizer:
        """Train as `train_from_iterator` does, given word counts, which may be weighted.

        Args:
            word_counts: result of `merges.count_words` with the same pattern.
        """
        _check_room(vocab_size, special_tokens)
        reserved = [token.encode("utf-8") for token in special_tokens]
        merges = learn_merges(word_counts, vocab_size - 256 - len(special_tokens), reserved)
        pairs = [(spelling(left), spelling(right)) for left, right in merges]
        merged = dict.fromkeys(left + right for left, right in pairs)
        tokens = [*special_tokens, *sorted(BYTE_SYMBOLS), *merged]
        return cls(build_json(tokens, pairs, special_tokens, pattern))

    @classmethod
    def from_file(cls, path: str | Path) -> BPETokenizer:
        """Load a tokenizer.json, a SentencePiece model, or the vocabulary in a directory.

        A tokenizer_config.json in the same directory names the special tokens.

        Raises:
            UserError: the tokenizer is missing, damaged, unsupported, or has no EOS token.
        """
        path = Path(path)
        try:
            return cls(files=read_tokenizer(path))
        except UserError as error:
            if str(path) in str(error):
                raise
            file = path / JSON if path.is_dir() else path
            raise UserError(f"{file}: {error}") from error

    # --------------------------------------------------------------------------------- text and ids

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Encode a text. Only `add_bos` and `add_eos` add special tokens; the text never does.

        Raises:
            UserError: the text contains a lone surrogate, or `add_bos` is set and there is no BOS.
        """
        if add_bos and self.bos_token_id is None:
            raise UserError("The tokenizer has no BOS token. Call encode without add_bos.")
        begin = [self.bos_token_id] if add_bos and self.bos_token_id is not None else []
        return begin + self.encode_batch([text])[0] + [self.eos_token_id] * add_eos

    def encode_batch(
        self, texts: Sequence[str], after: Sequence[str | None] | None = None
    ) -> list[list[int]]:
        """Encode many texts on all cores, without special tokens.

        Args:
            after: what precedes each text in its document: None (nothing), "token" (a special
                token) or "text". Some tokenizers add a space before a text, and this depends on
                what precedes it. By default, every text is the beginning of a document.

        Raises:
            UserError: a text contains a lone surrogate.
        """
        return self._encoder.encode(texts, after)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode ids. Invalid UTF-8, as at the end of a truncated text, becomes U+FFFD."""
        return self._tokenizer.decode(plain_ids(ids), skip_special_tokens=skip_special_tokens)

    # ------------------------------------------------------------------------------ size, ids, hash

    @property
    def vocab_size(self) -> int:
        """Number of embedding rows needed: the largest id plus one, special tokens included."""
        return self._size

    @property
    def special_tokens(self) -> dict[str, str | None]:
        """The text of the token with each role: "bos_token", "eos_token", "pad_token"."""
        return dict(self._special)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the BOS token, which begins a text; None if the tokenizer has none."""
        return self._ids["bos_token"]

    @property
    def eos_token_id(self) -> int:
        """Id of the EOS token, which ends a text."""
        eos = self._ids["eos_token"]
        assert eos is not None
        return eos

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token; None if the tokenizer has none."""
        return self._ids["pad_token"]

    @property
    def unknown_id(self) -> int | None:
        """Id of the unknown token; None if every byte has a token."""
        return self._unknown

    @property
    def first_id(self) -> int | None:
        """Id of BOS if the tokenizer puts it before every document, otherwise None."""
        return self.bos_token_id if self._begins else None

    @property
    def fill_id(self) -> int:
        """Id for padding, which never counts in the loss: PAD, or EOS if there is no PAD."""
        return self.eos_token_id if self.pad_token_id is None else self.pad_token_id

    @cached_property
    def sha256(self) -> str:
        """Hash of everything that affects encoding and decoding, for comparing tokenizers."""
        content = {**self._content, **self._special}
        # Encoding does not use the post-processor, and transformers adds an empty one to files.
        content.pop("post_processor", None)
        if self.first_id != self.bos_token_id:
            content["begins_documents"] = False
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()

    @property
    def _content(self) -> dict[str, Any]:
        """The parsed tokenizer.json that `tokenizers` writes."""
        return dict(json.loads(self._tokenizer.to_str()))

    def to_json(self) -> str:
        """Return the text of a tokenizer.json that `tokenizers` and transformers can read."""
        return self._tokenizer.to_str()

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's Jinja chat template; None if it has none.

        Raises:
            UserError: the file with the template is damaged.
        """
        return chat_templates.template_in(self._files.kept)

    @property
    def tool_template(self) -> str | None:
        """The separate chat template for conversations with tools; None if there is none."""
        return chat_templates.tool_template_in(self._files.kept)

    def with_chat_template(self, source: str) -> BPETokenizer:
        """Return a copy of the tokenizer with another chat template."""
        if source == self.chat_template:
            return self
        files = replace(self._files, kept=chat_templates.with_template(self._files.kept, source))
        return BPETokenizer(files=files)

    def settings(self) -> dict[str, Any]:
        """Return the arguments from which a worker process builds a tokenizer with the same ids."""
        return {"json_text": self.to_json(), "roles": self._special}

    def save(self, directory: str | Path, model_type: str | None = None) -> None:
        """Write the files that `from_file` and transformers' AutoTokenizer load.

        The original files of a published tokenizer are written unchanged.

        Args:
            model_type: type of the model in the same directory; None if there is none.

        Raises:
            UserError: the path of the directory is a file.
        """
        directory = Path(directory)
        if directory.exists() and not directory.is_dir():
            raise UserError(
                f"{directory} is a file, so a tokenizer cannot be saved in it. Give a directory."
            )
        directory.mkdir(parents=True, exist_ok=True)
        kept = self._files.kept
        for name, content in kept.items():
            (directory / name).parent.mkdir(exist_ok=True)
            write_whole(directory / name, content)
        if not self._files.is_complete:
            write_whole(directory / JSON, self.to_json())
        config = self._config(model_type)
        if config is not None:
            config_text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            write_whole(directory / CONFIG, config_text)

    def _config(self, model_type: str | None) -> dict[str, Any] | None:
        """Return the tokenizer_config.json to write; None to keep the original unchanged.

        If the original names no tokenizer class, transformers uses the class of the model type,
        which may split text differently. So the class is added, unless the tokenizer was published
        with a model of the type `model_type`.
        """
        kept = self._files.kept
        theirs = json.loads(kept[CONFIG]) if CONFIG in kept else {}
        own_type = model_type is not None and model_type == self._files.model_type
        if CONFIG in kept and ("tokenizer_class" in theirs or own_type):
            return None
        config = {**self._special, "tokenizer_class": "PreTrainedTokenizerFast"}
        if kept.keys() - {chat_templates.TEMPLATE}:
            return config | theirs
        # A chat template renders special tokens as text. Encoding must then recognise them.
        is_split = self.chat_template is None
        return config | {"clean_up_tokenization_spaces": False, "split_special_tokens": is_split}


@lru_cache(maxsize=2)
def own_tokenizer(directory: Path) -> BPETokenizer | None:
    """Load the tokenizer in a model's directory; None if there is none.

    Raises:
        UserError: the tokenizer is damaged, or of an unsupported kind.
    """
    return BPETokenizer.from_file(directory) if holds_tokenizer(directory) else None


def load_tokenizer(spec: str | Path) -> BPETokenizer:
    """Load the tokenizer of `--tokenizer`: `default`, `bytes`, a path, a Hub name or a URL.

    Raises:
        UserError: the download fails, or `from_file` cannot load the tokenizer.
    """
    if spec in ("default", "bytes"):
        return BPETokenizer() if spec == "default" else BPETokenizer.bytes()
    if is_elsewhere(name := str(spec)):
        return BPETokenizer.from_file(download(name, [*KEPT, "config.json"]))
    return BPETokenizer.from_file(spec)


def _check_room(vocab_size: int, special_tokens: Sequence[str]) -> None:
    if vocab_size < 256 + len(special_tokens):
        raise UserError(
            f"A vocabulary of {vocab_size} tokens is too small for 256 bytes and "
            f"{len(special_tokens)} special tokens. Give a larger size."
        )
