"""Special tokens have their roles by what files say, never by a lucky name in the vocabulary."""

import json
from pathlib import Path
from typing import Any

import pytest
from published import TEXT, llama3, qwen, sentencepiece_json

from consyn_jax.errors import UserError
from consyn_jax.tokenization import GPT2_PATTERN, BPETokenizer
from consyn_jax.tokenization.special_tokens import begins_documents

NONE = {"bos_token": None, "eos_token": None, "pad_token": None}


def changed(directory: Path, **changes: Any) -> Path:
    """A tokenizer directory with other values in tokenizer_config.json; ... removes a key."""
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not ...}
    file.write_text(json.dumps(kept))
    return directory


def test_an_ordinary_word_never_becomes_bos(tmp_path: Path) -> None:
    tokenizer = BPETokenizer.from_file(qwen(tmp_path))
    assert "<s>" in json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert tokenizer.special_tokens == NONE | {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    assert tokenizer.bos_token_id is None
    assert tokenizer.first_id is None
    with pytest.raises(UserError, match="has no BOS token"):
        tokenizer.encode("text", add_bos=True)


@pytest.mark.parametrize("role", ["bos_token", "pad_token"])
def test_null_means_none_even_for_a_known_name(role: str, tmp_path: Path) -> None:
    directory = changed(sentencepiece_json(tmp_path, "first"), **{role: None})
    assert BPETokenizer.from_file(directory).special_tokens[role] is None


def test_a_tokenizer_whose_eos_is_null_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="eos_token is null in its"):
        BPETokenizer.from_file(changed(llama3(tmp_path), eos_token=None))


def test_without_a_config_only_added_special_tokens_count(tmp_path: Path) -> None:
    (qwen(tmp_path) / "tokenizer_config.json").unlink()
    tokenizer = BPETokenizer.from_file(tmp_path)
    assert tokenizer.special_tokens == NONE | {"eos_token": "<|endoftext|>"}, "</s> is a word"


def test_without_a_config_the_post_processor_names_bos(tmp_path: Path) -> None:
    (llama3(tmp_path) / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").unlink()
    tokenizer = BPETokenizer.from_file(tmp_path)
    assert tokenizer.special_tokens["bos_token"] == "<|begin_of_text|>"
    content = json.loads((tmp_path / "tokenizer.json").read_text().replace("begin_of", "start_of_"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert BPETokenizer.from_file(tmp_path).special_tokens["bos_token"] == "<|start_of__text|>"


def test_the_older_file_names_what_the_config_does_not(tmp_path: Path) -> None:
    directory = changed(llama3(tmp_path), eos_token=..., bos_token=...)
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": None, "eos_token": {"content": "<|eom_id|>"}})
    )
    tokenizer = BPETokenizer.from_file(directory)
    assert tokenizer.special_tokens == NONE | {"eos_token": "<|eom_id|>"}
    assert tokenizer.first_id is None


@pytest.mark.parametrize(
    ("flag", "first"), [(True, "<s>"), (False, None), (..., "<s>")], ids=["added", "not", "unsaid"]
)
def test_bos_is_put_in_front_where_the_tokenizer_does(
    flag: Any, first: str | None, tmp_path: Path
) -> None:
    directory = changed(sentencepiece_json(tmp_path, "first"), add_bos_token=flag)
    tokenizer = BPETokenizer.from_file(directory)
    assert tokenizer.bos_token_id == 1
    assert tokenizer.first_id == (None if first is None else 1)


def test_a_bos_that_the_tokenizer_never_uses_is_not_put_in_front(tmp_path: Path) -> None:
    """SmolLM2's BOS is `<|im_start|>`, which begins a turn and no document."""
    tokenizer = BPETokenizer.from_file(changed(qwen(tmp_path), bos_token="<|im_start|>"))
    assert tokenizer.bos_token_id is not None
    assert tokenizer.first_id is None


def test_the_only_special_token_has_all_roles() -> None:
    gpt2 = BPETokenizer.train_from_iterator(
        TEXT, 300, pattern=GPT2_PATTERN, special_tokens=["<|endoftext|>"]
    )
    assert gpt2.first_id == gpt2.bos_token_id == gpt2.eos_token_id == gpt2.fill_id == 0
    assert BPETokenizer(gpt2.to_json(), {"bos_token": None}).first_id is None


def test_which_tokenizers_differ(tmp_path: Path) -> None:
    """A tokenizer that puts BOS in front is another one than the same without."""
    first = BPETokenizer.from_file(sentencepiece_json(tmp_path, "first")).sha256
    assert BPETokenizer.from_file(changed(tmp_path, add_bos_token=True)).sha256 == first
    assert BPETokenizer.from_file(changed(tmp_path, add_bos_token=False)).sha256 != first
    assert BPETokenizer.from_file(changed(tmp_path, bos_token=None)).sha256 != first


def test_roberta_and_sequences_of_processors_put_a_token_in_front() -> None:
    roberta = {"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 2]}
    wrapped = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, roberta]}
    roles = {"bos_token": "<s>", "eos_token": "</s>"}
    assert begins_documents({"post_processor": wrapped}, roles, None)
    assert not begins_documents({"post_processor": {"type": "ByteLevel"}}, roles, None)
    assert not begins_documents({"post_processor": None}, roles, None)
