"""SentencePiece models give the ids that SentencePiece 0.2 gave.

`sentencepiece_golden.json` holds four small models that it trained on the texts of `published.py`
(BPE with byte fallback as Llama 2, Unigram, BPE without a space in front, BPE that removes extra
spaces and has user-defined symbols), and its ids for texts of random pieces.
"""

import base64
import json
from pathlib import Path

import pytest

from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.data.sources import chunking
from consyn_jax.data.sources.chunking import parts
from consyn_jax.errors import UserError
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.tokenization.sentencepiece_model import sentencepiece_json

GOLDEN = json.loads((Path(__file__).parent / "sentencepiece_golden.json").read_text())


@pytest.fixture(params=GOLDEN)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def directory(name: str, tmp_path: Path) -> Path:
    model = base64.b64decode(GOLDEN[name]["model"])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.model").write_bytes(model)
    return tmp_path / "model"


def test_ids_are_those_of_sentencepiece(name: str, directory: Path) -> None:
    tokenizer = BPETokenizer.from_file(directory)
    texts = GOLDEN[name]["ids"]
    assert len(texts) > 40
    assert dict(zip(texts, tokenizer.encode_batch([*texts]), strict=True)) == texts
    assert tokenizer.special_tokens["bos_token"] == "<s>"
    assert tokenizer.first_id == 1
    assert tokenizer.eos_token_id == 2
    assert tokenizer.decode(tokenizer.encode("Größe 日本語 \u2603")) == "Größe 日本語 \u2603"


def test_what_has_no_token_is_counted(tmp_path: Path) -> None:
    vocabulary = [["<unk>", 0.0], ["</s>", -3.0], ["▁", -2.0], ["a", -1.0]]
    content = json.loads(BPETokenizer.bytes().to_json())
    content |= {"pre_tokenizer": None, "decoder": None, "post_processor": None}
    content["model"] = {"type": "Unigram", "unk_id": 0, "vocab": vocabulary}
    content["added_tokens"] = []
    content["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tokenizer = BPETokenizer(json.dumps(content), {"eos_token": "</s>"})
    assert tokenizer.encode("a a☃") == [3, 2, 3, 0]
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "a a☃"}\n{"text": "☃a☃ a☃a"}\n{"text": "a"}\n', encoding="utf-8")
    prepared = prepare(CorpusOptions(data=(str(file),), validation_fraction=0.0), tokenizer)
    assert prepared.report.changed["unknown"] == 4
    assert BPETokenizer().unknown_id is None
    assert not tokenizer.drops_text
    assert not BPETokenizer().drops_text
    content["model"] = {"type": "BPE", "vocab": {"</s>": 0, "a": 1}, "merges": []}
    letters = BPETokenizer(json.dumps(content), {"eos_token": "</s>"})
    assert letters.encode("a☃") == [1]
    assert letters.drops_text


def test_the_model_stays_as_it_came(directory: Path, tmp_path: Path) -> None:
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer = BPETokenizer.from_file(directory)
    tokenizer.save(tmp_path / "saved", "llama")
    saved = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    assert saved == {file.name: file.read_bytes() for file in directory.iterdir()}
    assert BPETokenizer.from_file(tmp_path / "saved").sha256 == tokenizer.sha256
    named = BPETokenizer.from_file(directory / "tokenizer.model")
    assert named.sha256 == tokenizer.sha256


def test_the_config_beside_it_decides(directory: Path) -> None:
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": False, "eos_token": "<unk>", "pad_token": None})
    )
    tokenizer = BPETokenizer.from_file(directory)
    assert tokenizer.first_id is None
    assert tokenizer.eos_token_id == 0
    assert tokenizer.pad_token_id is None


def test_parts_have_the_ids_of_the_whole(
    name: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunking, "PART_BYTES", 300)
    monkeypatch.setattr(chunking, "LIMIT", 600)
    monkeypatch.setattr(chunking, "WINDOW", 64)
    tokenizer = BPETokenizer.from_file(directory)
    whole = "The quick brown fox. Hello world,\nsaid the lazy dogs; 12345 is a number. " * 20
    pieces = [data.decode() for data, _ in parts([whole.encode()], tokenizer)]
    assert len(pieces) > 2
    ids = tokenizer.encode_batch(pieces, [None, *["text"] * (len(pieces) - 1)])
    assert [i for piece in ids for i in piece] == tokenizer.encode(whole)


@pytest.mark.parametrize("cut", [0, 1, 100, -50])
def test_what_is_no_model_is_refused(cut: int, tmp_path: Path) -> None:
    model = base64.b64decode(GOLDEN["llama"]["model"])
    file = tmp_path / "tokenizer.model"
    file.write_bytes(model[:cut])
    with pytest.raises(UserError, match=r"tokenizer\.model: This .*SentencePiece model"):
        BPETokenizer.from_file(file)


def test_a_tiktoken_file_of_that_name_is_refused(tmp_path: Path) -> None:
    """Llama 3's original/tokenizer.model is text in base64."""
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n" * 100)
    with pytest.raises(UserError, match=r"/tokenizer\.model: This .*SentencePiece model"):
        BPETokenizer.from_file(tmp_path)


def test_a_piece_without_a_text_is_answered() -> None:
    piece = b"\x15\x00\x00\x00\x00"  # a score alone
    with pytest.raises(UserError, match="a piece has no text"):
        sentencepiece_json(b"\x0a" + bytes([len(piece)]) + piece)
