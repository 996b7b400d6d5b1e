"""Loading tokenizer.json files of others, and files that are not tokenizers."""

import json
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.errors import UserError
from consyn_jax.tokenization import GPT2_PATTERN, BPETokenizer, load_tokenizer
from consyn_jax.tokenization.special_tokens import find_special_tokens

TEXTS = ["", "Hello, world! don't", "a<|eos|>b <|bos|><|pad|> <|endoftext|>", " , . ' n't ' s"]
SMALL = BPETokenizer.train_from_iterator(TEXTS, 300)
OLD = BPETokenizer.train_from_iterator(
    TEXTS, 300, pattern=GPT2_PATTERN, special_tokens=["<|endoftext|>"]
)


def saved(content: dict[str, Any], folder: Path, config: str | None = None) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
    return folder


def test_a_file_that_is_far_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="has 1,099,511,627,776 bytes, too many for this"):
        BPETokenizer.from_file(tmp_path / "tokenizer.json")


def test_absent_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer at"):
        BPETokenizer.from_file(tmp_path)
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer("no-such-tokenizer")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "hello",
        "[]",
        "null",
        "[" * 100_000,
        SMALL.to_json()[:-100],
        "{}",
        '{"model": 3}',
        '{"model": {"type": "BPE"}}',
        "\x00\x01",
    ],
    ids=lambda text: repr(text[:20]),
)
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json: (This is n|The tokenizer)"):
        BPETokenizer.from_file(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "type"), "WordPiece"),
        (("model", "vocab"), [["a", 0.0]]),
        (("model", "vocab", "a"), -1),
        (("model", "vocab", "a"), 1 << 30),
        (("model", "vocab", "a"), {"nested": []}),
        (("model", "merges"), [["no", "such"]]),
        (("model", "merges"), None),
        (("normalizer",), {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        (
            ("pre_tokenizer",),
            {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        ),
        (("pre_tokenizer",), {"type": "pickle"}),
        (("added_tokens",), 7),
    ],
)
def test_damaged_parts_are_refused(path: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    content = json.loads(SMALL.to_json())
    part = content
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(UserError):
        BPETokenizer.from_file(saved(content, tmp_path))


def test_settings_that_change_documents_are_switched_off(tmp_path: Path) -> None:
    content = json.loads(SMALL.to_json())
    content["truncation"] = {
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }
    content["model"]["dropout"] = 0.5
    assert BPETokenizer.from_file(saved(content, tmp_path)).encode_batch(
        TEXTS
    ) == SMALL.encode_batch(TEXTS)


def without_specials() -> dict[str, Any]:
    content = json.loads(OLD.to_json())
    content["added_tokens"] = []
    content["model"]["vocab"]["text"] = content["model"]["vocab"].pop("<|endoftext|>")
    return content


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no end-of-text token"):
        BPETokenizer.from_file(saved(without_specials(), tmp_path))


def test_the_tokenizer_config_names_the_special_tokens(tmp_path: Path) -> None:
    config = json.dumps({"eos_token": {"content": "text"}, "bos_token": None, "pad_token": "!"})
    tokenizer = BPETokenizer.from_file(saved(without_specials(), tmp_path, config))
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, None, 1)


@pytest.mark.parametrize(
    "config",
    [
        "",
        "[]",
        '{"eos_token": 3}',
        '{"eos_token": "<|absent|>"}',
        '{"eos_token": {"content": []}}',
        "[" * 100_000,
    ],
)
def test_a_broken_tokenizer_config_is_refused(config: str, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        BPETokenizer.from_file(saved(json.loads(OLD.to_json()), tmp_path, config))


def test_a_token_around_texts_that_the_vocabulary_lacks_is_answered() -> None:
    content = json.loads(BPETokenizer.bytes().to_json())
    around = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
    around["single"] = [{"SpecialToken": {"id": "<|bosl>", "type_id": 0}}]
    with pytest.raises(UserError, match=r"puts '<\|bosl>' around texts, but its vocabulary has no"):
        find_special_tokens({**content, "post_processor": around}, {"<|eos|>": 1}, {})
