"""Tokenizers of others: ids as their references give them, and files kept as they came."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from published import LLAMA_TEMPLATE, QWEN_TEMPLATE, TEXT, llama3, qwen, sentencepiece_json
from tokenizers import Tokenizer

from consyn_jax.data.sources import chunking
from consyn_jax.data.sources.chunking import parts
from consyn_jax.errors import UserError
from consyn_jax.tokenization import BPETokenizer

KINDS = {
    "qwen": qwen,
    "llama3": llama3,
    "prepend": lambda path: sentencepiece_json(path, "prepend"),
    "first": lambda path: sentencepiece_json(path, "first"),
    "unigram": lambda path: sentencepiece_json(path, "unigram"),
}
TEXTS = [*TEXT, "", " ", "  two", "a\n\n b", "▁ literal", "tail  \n"]


@pytest.fixture(params=KINDS)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return KINDS[request.param](tmp_path / request.param)


@pytest.mark.torch
def test_ids_are_those_of_transformers(directory: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = BPETokenizer.from_file(directory)
    ours.save(tmp_path / "saved")
    for path in (directory, tmp_path / "saved"):
        theirs = AutoTokenizer.from_pretrained(path)
        roles = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
        assert roles == (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id)
        front = [] if ours.first_id is None else [ours.first_id]
        for text in TEXTS:
            plain = text.replace("<s>", "").replace("</s>", "")  # special there, text here
            ids = ours.encode(plain)
            assert theirs(plain)["input_ids"] == front + ids
            assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_files_stay_as_they_came(directory: Path, tmp_path: Path) -> None:
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    tokenizer = BPETokenizer.from_file(directory)
    tokenizer.save(tmp_path / "saved", "qwen3")
    BPETokenizer.from_file(tmp_path / "saved").save(tmp_path / "again", "llama")
    files = [f for f in directory.rglob("*") if f.is_file() and f.name != "generation_config.json"]
    for file in files:
        for place in ("saved", "again"):
            kept = tmp_path / place / file.relative_to(directory)
            assert kept.read_bytes() == file.read_bytes(), kept
    assert len([f for f in (tmp_path / "again").rglob("*") if f.is_file()]) == len(files)


@pytest.mark.torch
@pytest.mark.parametrize("as_file", [True, False])
def test_a_chat_template_comes_back_as_a_file_or_a_field(as_file: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    qwen(tmp_path / "qwen", as_file)
    BPETokenizer.from_file(tmp_path / "qwen").save(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").is_file() == as_file
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert ("chat_template" in config) != as_file
    assert config["split_special_tokens"] is False
    assert config["model_max_length"] == 131072
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == QWEN_TEMPLATE
    llama3(tmp_path / "llama")
    BPETokenizer.from_file(tmp_path / "llama").save(tmp_path / "llama_saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "llama_saved").chat_template == LLAMA_TEMPLATE


@pytest.mark.torch
def test_beside_a_model_of_another_type_the_words_stay(tmp_path: Path) -> None:
    """GPT-2's files name no class, and transformers would take Qwen2's beside a qwen3 model."""
    from transformers import AutoTokenizer

    made = BPETokenizer.train_from_iterator(
        TEXT, 400, pattern=r"\w+|\W", special_tokens=["<|endoftext|>"]
    )
    (tmp_path / "tokenizer.json").write_text(made.to_json())
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    tokenizer = BPETokenizer.from_file(tmp_path)
    for model_type in ("qwen3", "llama"):
        tokenizer.save(tmp_path / model_type, model_type)
        (tmp_path / model_type / "config.json").write_text(json.dumps({"model_type": model_type}))
        theirs = AutoTokenizer.from_pretrained(tmp_path / model_type)
        assert [theirs(text)["input_ids"] for text in TEXTS] == tokenizer.encode_batch(TEXTS)
        assert theirs.model_max_length == 1024
        assert theirs.eos_token == "<|endoftext|>"


# --------------------------------------------------------------------------------------- segments


def cut(text: str, tokenizer: BPETokenizer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(chunking, "PART_BYTES", 300)
    monkeypatch.setattr(chunking, "LIMIT", 600)
    monkeypatch.setattr(chunking, "WINDOW", 64)
    return [data.decode() for data, _ in parts([text.encode()], tokenizer)]


def test_parts_of_a_document_have_the_ids_of_the_whole(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = BPETokenizer.from_file(directory)
    whole = " ".join(TEXT * 8)
    pieces = cut(whole, tokenizer, monkeypatch)
    assert len(pieces) > 4
    after = [None, *["text"] * (len(pieces) - 1)]
    ids = [i for piece in tokenizer.encode_batch(pieces, after) for i in piece]
    assert ids == tokenizer.encode(whole)
    assert all(len(piece) < 600 for piece in pieces)


def test_a_space_in_front_follows_special_tokens_as_in_the_reference(directory: Path) -> None:
    reference = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer = BPETokenizer.from_file(directory)
    end = tokenizer.special_tokens["eos_token"]
    expected = reference.encode(f"Hello{end}world", add_special_tokens=False).ids
    first, second = tokenizer.encode_batch(["Hello", "world"], [None, "token"])
    assert [*first, tokenizer.eos_token_id, *second] == expected


# ----------------------------------------------------------------------------------- other formats


@pytest.mark.torch
def test_vocabulary_and_merges_are_read_through_transformers(tmp_path: Path) -> None:
    qwen(tmp_path)
    whole = BPETokenizer.from_file(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *map(" ".join, model["merges"]), ""]
    (tmp_path / "merges.txt").write_text("\n".join(lines))
    tokenizer = BPETokenizer.from_file(tmp_path)
    assert tokenizer.special_tokens == whole.special_tokens
    assert tokenizer.encode_batch(TEXTS) == whole.encode_batch(TEXTS)
    tokenizer.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "merges.txt").read_text() == "\n".join(lines)
    assert BPETokenizer.from_file(tmp_path / "saved").sha256 == tokenizer.sha256
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"only vocab\.json, merges\.txt, which do not define how"):
        BPETokenizer.from_file(tmp_path)


@pytest.mark.parametrize("names", [["tekken.json"], ["merges.txt", "vocab.json"]])
def test_without_transformers_the_files_are_named(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError) as refused:
        BPETokenizer.from_file(tmp_path)
    assert all(name in str(refused.value) for name in names)
    assert "pip install transformers" in str(refused.value)


# ------------------------------------------------------------------------------------ added tokens


def declared(directory: Path, entries: dict[str, Any]) -> Path:
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["added_tokens_decoder"] |= entries
    file.write_text(json.dumps(config))
    return directory


@pytest.mark.torch
def test_tokens_that_only_the_config_declares_are_added_as_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    size = BPETokenizer.from_file(qwen(tmp_path)).vocab_size
    declared(tmp_path, {str(size): {"content": "<tool>", "special": False, "normalized": False}})
    tokenizer = BPETokenizer.from_file(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size == size + 1
    assert tokenizer.encode("a<tool>b") == theirs("a<tool>b")["input_ids"]
    tokenizer.save(tmp_path / "saved")
    assert BPETokenizer.from_file(tmp_path / "saved").sha256 == tokenizer.sha256


def test_a_declared_id_that_cannot_be_is_refused(tmp_path: Path) -> None:
    declared(qwen(tmp_path), {"9999": {"content": "<tool>", "special": True}})
    with pytest.raises(UserError, match="gives '<tool>' the id 9999, but the vocabulary gives it"):
        BPETokenizer.from_file(tmp_path)


def test_a_damaged_list_of_added_tokens_is_refused(tmp_path: Path) -> None:
    declared(qwen(tmp_path), {"x": {"content": 5}})
    with pytest.raises(UserError, match="damaged added_tokens_decoder"):
        BPETokenizer.from_file(tmp_path)


def test_workers_make_the_same_ids(directory: Path) -> None:
    tokenizer = BPETokenizer.from_file(directory)
    worker = BPETokenizer(**json.loads(json.dumps(tokenizer.settings())))
    after = [None, "text", "token"] * 4
    texts = TEXTS[: len(after)]
    assert worker.encode_batch(texts, after[: len(texts)]) == tokenizer.encode_batch(
        texts, after[: len(texts)]
    )
    assert worker.eos_token_id == tokenizer.eos_token_id


def test_a_bare_file_gets_a_config_that_names_its_roles(tmp_path: Path) -> None:
    (llama3(tmp_path / "all") / "tokenizer_config.json").unlink()
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "all" / "tokenizer.json", tmp_path / "bare")
    tokenizer = BPETokenizer.from_file(tmp_path / "bare" / "tokenizer.json")
    tokenizer.save(tmp_path / "saved")
    again = BPETokenizer.from_file(tmp_path / "saved")
    assert again.special_tokens == tokenizer.special_tokens
    assert again.sha256 == tokenizer.sha256
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert "split_special_tokens" not in config
