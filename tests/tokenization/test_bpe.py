"""Round trips, special tokens, saving and loading, agreement with transformers, compression."""

import json
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from consyn_jax.errors import UserError
from consyn_jax.tokenization import GPT2_PATTERN, SPECIAL_TOKENS, BPETokenizer, load_tokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_tokenizer.py"
TEXTS = [
    "",
    " ",
    "Hello, world! don't  DON'T\r\n\r\n\tif x == 12345:\n        return f'{x}'  \n",
    "a<|eos|>b <|bos|><|pad|> <|endoftext|>",
    "नमस्ते दुनिया 你好，世界 مرحبا 👩‍👩‍👧 e\u0301 \ufeff\x00\u2028",
    " , . ' n't ' s",
]

DEFAULT = BPETokenizer()
BYTES = BPETokenizer.bytes()
SMALL = BPETokenizer.train_from_iterator(TEXTS, 300)
OLD = BPETokenizer.train_from_iterator(
    TEXTS, 300, pattern=GPT2_PATTERN, special_tokens=["<|endoftext|>"]
)
ALL = {"default": DEFAULT, "bytes": BYTES, "small": SMALL, "old": OLD}


@pytest.fixture(params=ALL)
def tokenizer(request: pytest.FixtureRequest) -> BPETokenizer:
    return ALL[request.param]


# ------------------------------------------------------------------------------------- text and ids


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(st.text(), st.sampled_from(sorted(ALL)))
@example("<|eos|> <|pad|><|bos|>", "default")
@example("é e\u0301 \u212b \ufb01", "default")
@example(" ' s n't , .", "old")
def test_every_text_comes_back(text: str, name: str) -> None:
    tokenizer = ALL[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False) == text
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)
    assert all(0 <= index < tokenizer.vocab_size for index in ids)


@pytest.mark.slow
def test_every_language_comes_back(shared_data: Path) -> None:
    texts = [
        json.loads(line)["text"]
        for line in (shared_data / "jsonl/udhr.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(texts) == 266
    for tokenizer in (DEFAULT, BYTES):
        assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts


@pytest.mark.parametrize("character", ["A", "中", " ", "\n", "aB", "\u0301"])
def test_long_runs_come_back(character: str) -> None:
    text = character * 200_000
    assert DEFAULT.decode(DEFAULT.encode(text)) == text


def test_a_batch_equals_its_single_texts(tokenizer: BPETokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_switches_add_bos_and_eos(tokenizer: BPETokenizer) -> None:
    ids = tokenizer.encode("text")
    assert tokenizer.encode("text", add_bos=True, add_eos=True) == [
        tokenizer.bos_token_id,
        *ids,
        tokenizer.eos_token_id,
    ]
    assert tokenizer.decode(tokenizer.encode("text", add_bos=True, add_eos=True)) == "text"


def test_decoding_special_tokens_and_broken_utf8() -> None:
    assert (
        DEFAULT.decode(
            [DEFAULT.bos_token_id, *DEFAULT.encode("x"), DEFAULT.eos_token_id],
            skip_special_tokens=False,
        )
        == "<|bos|>x<|eos|>"
    )
    assert BYTES.decode([0xE4, 0xBD]) == "\ufffd"


def test_byte_values_are_their_own_ids() -> None:
    assert [BYTES.encode(text) for text in TEXTS] == [list(text.encode("utf-8")) for text in TEXTS]
    assert (BYTES.pad_token_id, BYTES.bos_token_id, BYTES.eos_token_id, BYTES.vocab_size) == (
        256,
        257,
        258,
        259,
    )


def test_a_lone_surrogate_is_named() -> None:
    for encode in (
        lambda: BYTES.encode("ab\ud800"),
        lambda: BYTES.encode_batch(["fine", "ab\ud800"]),
    ):
        with pytest.raises(UserError, match=r"U\+D800 at position 2"):
            encode()


# ----------------------------------------------------------------------------------- special tokens


def test_special_tokens_are_distinct() -> None:
    for tokenizer in (DEFAULT, BYTES, SMALL):
        assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_training_text_never_becomes_a_special_token() -> None:
    tokenizer = BPETokenizer.train_from_iterator(
        ["eos bos pad " * 50], 290, special_tokens=["pad", "bos", "</s>"]
    )
    assert not {0, 1, 2} & set(tokenizer.encode("eos bos pad</s>"))
    assert tokenizer.decode(tokenizer.encode("eos bos pad</s>")) == "eos bos pad</s>"


def test_training_is_deterministic_and_reads_files_whole(tmp_path: Path) -> None:
    files = [tmp_path / f"{index}.txt" for index in range(len(TEXTS))]
    for file, text in zip(files, TEXTS, strict=True):
        file.write_bytes(text.encode("utf-8"))
    assert BPETokenizer.train(files, 300).sha256 == SMALL.sha256
    assert SMALL.vocab_size == 300
    vocabulary = json.loads(SMALL.to_json())["model"]["vocab"]
    assert [token for token, index in vocabulary.items() if index < 3] == list(SPECIAL_TOKENS)
    assert sorted(vocabulary.values()) == list(range(300))


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="too small for 256 bytes"):
        BPETokenizer.train_from_iterator(iter(["never read"]), 258)


def test_training_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"ok\xff")
    with pytest.raises(UserError, match=r"binary is not UTF-8 text \(byte 2\)"):
        BPETokenizer.train(tmp_path / "binary", 300)
    with pytest.raises(UserError, match="No such file"):
        BPETokenizer.train(tmp_path / "absent", 300)


# ------------------------------------------------------------------------------------ save and load


@pytest.mark.slow
def test_saved_and_loaded_is_the_same(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new" / "folder")
    for loaded in (
        BPETokenizer.from_file(tmp_path / "new/folder"),
        BPETokenizer.from_file(str(tmp_path / "new/folder/tokenizer.json")),
        load_tokenizer(str(tmp_path / "new/folder")),
        BPETokenizer(tokenizer.to_json()),
        pickle.loads(pickle.dumps(tokenizer)),  # noqa: S301 - worker processes receive it so
    ):
        assert loaded.sha256 == tokenizer.sha256
        assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        )


def test_a_file_is_not_a_place_to_save(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        BYTES.save(tmp_path / "file")


def test_hashes_tell_tokenizers_apart() -> None:
    assert len({tokenizer.sha256 for tokenizer in ALL.values()}) == len(ALL)


def test_load_by_name() -> None:
    assert load_tokenizer("default").sha256 == DEFAULT.sha256
    assert load_tokenizer("bytes").sha256 == BYTES.sha256


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [None, "llama", "qwen3"])
def test_transformers_gives_the_same_ids(
    tokenizer: BPETokenizer, tmp_path: Path, model_type: str | None
) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": model_type}), encoding="utf-8"
        )
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    has_bos = "<|bos|>" in json.loads(tokenizer.to_json())["model"]["vocab"]
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text, add_bos=has_bos)
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        assert (
            theirs.decode(
                tokenizer.encode(text, add_bos=True, add_eos=True), skip_special_tokens=True
            )
            == text
        )
    theirs.save_pretrained(tmp_path / "again")
    assert BPETokenizer.from_file(tmp_path / "again").sha256 == tokenizer.sha256


def test_gpt2_begins_ends_and_pads_with_its_only_special_token(
    shared_data: Path, tmp_path: Path
) -> None:
    gpt2 = BPETokenizer.from_file(shared_data / "tokenizers/gpt2")
    assert gpt2.vocab_size == 50_257
    assert gpt2.bos_token_id == gpt2.eos_token_id == gpt2.pad_token_id == 50_256
    assert gpt2.encode("Hello world") == [15496, 995]
    assert 50_256 not in gpt2.encode("<|endoftext|>")
    gpt2.save(tmp_path)
    assert BPETokenizer.from_file(tmp_path).sha256 == gpt2.sha256


def test_importing_tokenization_is_light() -> None:
    code = (
        "import sys, consyn_jax.tokenization;"
        "print(sorted({'jax', 'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


# -------------------------------------------------------------------------------------- compression


def test_the_bundled_vocabulary_has_49152_entries() -> None:
    assert DEFAULT.vocab_size == len(json.loads(DEFAULT.to_json())["model"]["vocab"]) == 49_152


@pytest.mark.slow
def test_the_bundled_vocabulary_compresses_as_promised(shared_data: Path) -> None:
    gpt2 = BPETokenizer.from_file(shared_data / "tokenizers/gpt2")
    limits = {
        "WikiText-2 test": 1.05,
        "tiny Shakespeare (90 % trained on)": 1.05,
        "Python, held-out files": 1.05,
        "UDHR, non-Latin (trained on)": 0.7,
    }
    texts = dict(runpy.run_path(str(SCRIPT))["held_out"](shared_data))
    for name, limit in limits.items():
        ours, theirs = (
            sum(map(len, candidate.encode_batch(texts[name]))) for candidate in (DEFAULT, gpt2)
        )
        assert ours <= limit * theirs, f"{name}: {ours} tokens, GPT-2 {theirs}"


@pytest.mark.parametrize("ids", [5, "ab", [[1], [2, 3]], [[1, 2]], [1.0], [-100, 3], None, [None]])
def test_decode_refuses_what_is_not_the_ids_of_a_text(ids: Any) -> None:
    with pytest.raises(UserError, match="decode takes the ids of one text"):
        BPETokenizer.bytes().decode(ids)
    assert BPETokenizer.bytes().decode(np.array([104, 105])) == "hi"
    assert BPETokenizer.bytes().decode([]) == ""


@pytest.mark.parametrize("text", [["a", "b"], None, 5, b"a"])
def test_encode_refuses_what_is_not_a_text(text: Any) -> None:
    with pytest.raises(UserError, match="A tokenizer encodes text, not"):
        BPETokenizer.bytes().encode(text)
    with pytest.raises(UserError, match="encode_batch takes a list of texts, not a single text"):
        BPETokenizer.bytes().encode_batch("text")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("text", "trained on a list of texts. Pass a single"),
        ([{"text": "a"}], "not on a dict. Pass"),
    ],
)
def test_a_vocabulary_is_learned_from_texts(texts: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        BPETokenizer.train_from_iterator(texts, 300)


def test_a_path_names_a_tokenizer(tmp_path: Path) -> None:
    BPETokenizer.bytes().save(tmp_path)
    assert load_tokenizer(tmp_path).sha256 == BPETokenizer.bytes().sha256
