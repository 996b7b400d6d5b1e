import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consyn_jax.data.store import TokenStore, TokenStoreWriter
from consyn_jax.data.store.manifest import is_store, token_dtype
from consyn_jax.data.store.shard_writer import ShardWriter
from consyn_jax.errors import UserError
from consyn_jax.tokenization import BPETokenizer

TEXTS = [f"document {i} " * (i % 7) for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.bytes()


def build(directory: Path, tokenizer: BPETokenizer, shard_tokens: int = 500) -> TokenStore:
    with TokenStoreWriter(directory, tokenizer, shard_tokens) as writer:
        writer.add_many("train", tokenizer.encode_batch(TEXTS), [len(text) for text in TEXTS])
        writer.add("validation", tokenizer.encode("held out"), 8)
    return TokenStore(directory)


def documents(store: TokenStore, split: str) -> list[list[int]]:
    tokens, begins, _ = store.split(split).windows(np.array([0]), store.split(split).num_tokens)
    return [part.tolist() for part in np.split(tokens[0, 1:], np.flatnonzero(begins[0])[1:])]


def test_documents_are_read_back_with_eos(tmp_path: Path, tokenizer: BPETokenizer) -> None:
    store = build(tmp_path / "store", tokenizer)
    assert documents(store, "train") == [
        [*tokenizer.encode(text), tokenizer.eos_token_id] for text in TEXTS
    ]
    assert documents(store, "validation") == [
        [*tokenizer.encode("held out"), tokenizer.eos_token_id]
    ]
    assert store.split("train").num_bytes == sum(map(len, TEXTS))
    assert store.split("train").num_tokens == sum(map(len, TEXTS)) + len(TEXTS)
    assert store.split("test").num_tokens == 0
    assert store.tokenizer.sha256 == tokenizer.sha256


def test_the_files_are_as_documented(tmp_path: Path, tokenizer: BPETokenizer) -> None:
    store = build(tmp_path / "store", tokenizer)
    shards = store.manifest["splits"]["train"]["shards"]
    assert [s["file"] for s in shards] == [f"train-{i:05d}.tokens" for i in range(len(shards))]
    assert len(shards) > 2
    assert all(s["tokens"] >= 500 for s in shards[:-1])
    for entry in shards:
        data = (store.directory / entry["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert len(np.frombuffer(data, "<u2")) == entry["tokens"]
        starts = np.frombuffer((store.directory / entry["index"]).read_bytes(), "<u8")
        assert starts[0] == 0
        assert len(starts) == entry["documents"]
    assert store.manifest["splits"]["train"]["documents"] == len(TEXTS)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_documents_can_be_added_one_by_one_or_together(
    tmp_path: Path, tokenizer: BPETokenizer
) -> None:
    build(tmp_path / "a", tokenizer)
    with TokenStoreWriter(tmp_path / "b", tokenizer, 500) as writer:
        for text in TEXTS:
            writer.add("train", tokenizer.encode(text), len(text))
        writer.add("validation", tokenizer.encode("held out"), 8)
    for file in (tmp_path / "a").rglob("*"):
        if file.is_file():
            assert (
                file.read_bytes()
                == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
            )


def test_the_fingerprint_depends_on_the_content_only(
    tmp_path: Path, tokenizer: BPETokenizer
) -> None:
    first = build(tmp_path / "a", tokenizer)
    assert build(tmp_path / "elsewhere", tokenizer).fingerprint == first.fingerprint
    with TokenStoreWriter(tmp_path / "c", tokenizer, 500) as writer:
        writer.add_many(
            "train", tokenizer.encode_batch(TEXTS[::-1]), [len(text) for text in TEXTS[::-1]]
        )
        writer.add("validation", tokenizer.encode("held out"), 8)
    assert TokenStore(tmp_path / "c").fingerprint != first.fingerprint


def test_large_vocabularies_take_four_bytes() -> None:
    assert token_dtype(65_536) == np.dtype("<u2")
    assert token_dtype(65_537) == np.dtype("<u4")


def test_nothing_is_left_when_writing_fails(tmp_path: Path, tokenizer: BPETokenizer) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        TokenStoreWriter(tmp_path / "store", tokenizer) as writer,
    ):
        writer.add("train", [1, 2, 3], 3 // len(writer._open_shards))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [-1, 259, 1 << 40])
def test_ids_outside_the_vocabulary_are_refused(
    tmp_path: Path, tokenizer: BPETokenizer, wrong: int
) -> None:
    with (
        pytest.raises(UserError, match=f"Token id {wrong} is outside .* vocabulary of 259"),
        TokenStoreWriter(tmp_path / "store", tokenizer) as writer,
    ):
        writer.add("train", [1, wrong, 3], 3)


def test_a_directory_that_exists_or_cannot_be_written(
    tmp_path: Path, tokenizer: BPETokenizer
) -> None:
    build(tmp_path / "store", tokenizer)
    with pytest.raises(UserError, match="store already exists"):
        TokenStoreWriter(tmp_path / "store", tokenizer)
    with pytest.raises(UserError, match=r"cannot be written to .*: Not a directory"):
        TokenStoreWriter(tmp_path / "store" / "manifest.json" / "inner", tokenizer)


def test_a_directory_is_no_store_before_it_is_finished(
    tmp_path: Path, tokenizer: BPETokenizer
) -> None:
    writer = TokenStoreWriter(tmp_path / "store", tokenizer)
    writer.add("train", [1, 2, 3], 3)
    with pytest.raises(UserError, match="is not a token store"):
        TokenStore(tmp_path / "store")
    with pytest.raises(UserError, match="already exists"):
        TokenStoreWriter(tmp_path / "store", tokenizer)
    writer.finish()
    assert documents(TokenStore(tmp_path / "store"), "train") == [[1, 2, 3, tokenizer.eos_token_id]]


def everything(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize("stop", range(0, 40, 3))
def test_a_writer_resumed_from_any_checkpoint_writes_the_same_bytes(
    tmp_path: Path, tokenizer: BPETokenizer, stop: int
) -> None:
    encoded = tokenizer.encode_batch(TEXTS)

    def add(writer: TokenStoreWriter, start: int, end: int) -> None:
        for i in range(start, end):
            ids = np.array([*encoded[i], tokenizer.eos_token_id], np.uint16)
            if i % 5 == 0:  # in parts; some documents are dropped again
                writer.append_part("train", ids[:2])
                if i % 10 == 0:
                    writer.drop_document("train")
                    continue
                writer.append_part("train", ids[2:])
                writer.end_document("train", len(TEXTS[i]))
            else:
                targets = (np.arange(len(ids)) % 2).astype(np.uint8) if i > 20 else None
                writer.append(
                    "train", ids, np.array([len(ids)]), np.array([len(TEXTS[i])]), targets
                )

    whole = TokenStoreWriter(tmp_path / "whole", tokenizer, 300)
    add(whole, 0, len(TEXTS))
    whole.finish()
    first = TokenStoreWriter(tmp_path / "store", tokenizer, 300)
    add(first, 0, stop)
    state = json.loads(json.dumps(first.checkpoint()))
    add(first, stop, min(stop + 7, len(TEXTS)))
    first.close()
    left = tmp_path / "store" / "tokenizer" / ".tokenizer.json.0123456789abcdef.new"
    left.touch()  # by a kill
    second = TokenStoreWriter(tmp_path / "store", tokenizer, 300, state)
    add(second, stop, len(TEXTS))
    assert second.snapshot("train").num_documents == len(TEXTS) - len(TEXTS) // 10
    assert second.totals["train"]["tokens"] == second.snapshot("train").num_tokens
    snapshot = second.snapshot("train")
    second.finish()
    assert everything(tmp_path / "store") == everything(tmp_path / "whole")
    read = np.empty(snapshot.num_tokens, np.uint16)
    TokenStore(tmp_path / "store").split("train").read(0, read)
    again = np.empty(snapshot.num_tokens, np.uint16)
    snapshot.read(0, again)
    assert np.array_equal(read, again)


def test_a_resumed_shard_has_the_same_entry_to_the_byte(tmp_path: Path) -> None:
    """With targets, which come after origins in a first start, and before them in a resumed one."""

    def add(shard: ShardWriter, number: int) -> ShardWriter:
        shard.append(
            np.array([1, 2]), np.array([2]), 2, np.array([0, 1], np.uint8), np.full(3, number)
        )
        return shard

    entries = []
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        about = tmp_path / name, "train-00000", np.dtype("<u2")
        shard = add(ShardWriter(*about), 1)
        if name == "stopped":
            state = shard.state()
            shard.abandon()
            shard = ShardWriter(*about, state)
        entries.append(json.dumps(add(shard, 2).close()))
    assert entries[0] == entries[1]


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.update(version=4),
            "has format version 4, but this consyn_jax reads 1, 2 and 3",
        ),
        (lambda m: m.update(format="other"), "is not the manifest of a token store"),
        (lambda m: m.update(vocab_size="259"), "vocab_size is '259'"),
        (lambda m: m.update(vocab_size=-1), "vocab_size is -1"),
        (
            lambda m: m.update(dtype="uint32"),
            "dtype is 'uint32', but a vocabulary of 259 needs uint16",
        ),
        (lambda m: m.update(splits=[]), "splits is missing"),
        (lambda m: m["splits"]["train"].update(shards=None), "split 'train' has no list of shards"),
        (
            lambda m: m["splits"]["train"].update(tokens=1),
            "counts of split 'train' are not the sums",
        ),
        (
            lambda m: m["splits"]["train"]["shards"][1].update(file="../x.tokens"),
            r"shard 1 of split 'train': file is '../x.tokens', not a plain",
        ),
        (
            lambda m: m["splits"]["train"]["shards"][1].update(index="/etc/passwd"),
            "index is '/etc/passwd', not a plain file name",
        ),
        (lambda m: m["splits"]["train"]["shards"][1].update(tokens=True), "tokens is True"),
        (lambda m: m["splits"]["train"]["shards"][1].update(documents=0), "documents is 0"),
        (lambda m: m["splits"]["train"]["shards"][1].pop("sha256"), "sha256 is missing"),
        (lambda m: m["splits"]["train"]["shards"].append(3), "not an object"),
        (
            lambda m: m["splits"]["train"]["shards"][1].update(targets="../t"),
            "targets is '../t', not a plain",
        ),
        (
            lambda m: m["splits"]["train"]["shards"][1].update(targets="t.targets"),
            "target_tokens is None",
        ),
    ],
)
def test_an_invalid_manifest_is_refused(
    tmp_path: Path,
    tokenizer: BPETokenizer,
    change: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    build(tmp_path / "store", tokenizer)
    edit(tmp_path / "store" / "manifest.json", change)
    with pytest.raises(UserError, match=message):
        TokenStore(tmp_path / "store")


def test_missing_and_foreign_manifests(tmp_path: Path, tokenizer: BPETokenizer) -> None:
    with pytest.raises(UserError, match=r"it has no manifest\.json"):
        TokenStore(tmp_path)
    for content, fault in (
        ("{", "is not JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ("9" * 5000, "has a number of more than 4,300 digits"),
        ("\xff", "is not UTF-8 text"),
    ):
        (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match=rf"manifest\.json {fault}"):
            TokenStore(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="is not the manifest of a token store"):
        TokenStore(tmp_path)


def test_files_of_the_wrong_size_are_named_when_the_store_is_opened(
    tmp_path: Path, tokenizer: BPETokenizer
) -> None:
    build(tmp_path / "store", tokenizer)
    file = tmp_path / "store" / "train-00001.tokens"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(
        UserError, match=r"train-00001\.tokens has [\d,]+ bytes, but the manifest says"
    ):
        TokenStore(tmp_path / "store")
    file.unlink()
    with pytest.raises(UserError, match=r"train-00001\.tokens is missing"):
        TokenStore(tmp_path / "store")


@pytest.mark.parametrize("name", ["train-00001.tokens", "train-00001.index"])
def test_a_changed_byte_is_found_on_the_first_read_of_that_shard(
    tmp_path: Path, tokenizer: BPETokenizer, name: str
) -> None:
    build(tmp_path / "store", tokenizer)
    data = bytearray((tmp_path / "store" / name).read_bytes())
    data[10] ^= 1
    (tmp_path / "store" / name).write_bytes(data)
    shards = TokenStore(tmp_path / "store").split("train").shards
    shards[0].verify()
    with pytest.raises(UserError, match=rf"{name} does not match its checksum"):
        shards[1].read(0, np.empty(1, np.uint16))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "validation-00000.tokens",
            np.full(9, 300, "<u2"),
            "token id 300 outside the vocabulary of 259",
        ),
        ("validation-00000.index", np.array([5], "<u8"), "do not begin at 0, or"),
        ("validation-00000.index", np.array([2**63], "<u8"), "do not begin at 0, or"),
    ],
)
def test_content_is_checked_even_if_the_checksums_fit(
    tmp_path: Path, tokenizer: BPETokenizer, name: str, content: np.ndarray, message: str
) -> None:
    build(tmp_path / "store", tokenizer)
    (tmp_path / "store" / name).write_bytes(content.tobytes())
    key = "sha256" if name.endswith("tokens") else "index_sha256"
    digest = hashlib.sha256(content.tobytes()).hexdigest()
    edit(
        tmp_path / "store" / "manifest.json",
        lambda m: m["splits"]["validation"]["shards"][0].update({key: digest}),
    )
    with pytest.raises(UserError, match=message):
        TokenStore(tmp_path / "store").split("validation").shards[0].verify()


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "sources.json", "tokenizer/tokenizer.json", "tokenizer", "train-00000.index"],
)
def test_links_out_of_a_store_are_not_followed(
    name: str, tmp_path: Path, tokenizer: BPETokenizer
) -> None:
    store = build(tmp_path / "store", tokenizer).directory
    path = store / name
    if path.exists():
        path.rename(tmp_path / "elsewhere")
    else:
        (tmp_path / "elsewhere").write_text("[]")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"{path} is a link to .*elsewhere, outside"):
        TokenStore(store)
    for shard in store.glob("*.tokens"):
        shard.unlink()
    assert is_store(store) == (name != "manifest.json")


def test_a_manifest_without_end_is_refused(tmp_path: Path, tokenizer: BPETokenizer) -> None:
    store = build(tmp_path / "store", tokenizer).directory
    os.truncate(store / "manifest.json", 1 << 40)
    with pytest.raises(UserError, match=r"has 1,099,511,627,776 bytes, too many for this kind"):
        TokenStore(store)


def test_another_tokenizer_in_the_store_is_refused(tmp_path: Path, tokenizer: BPETokenizer) -> None:
    store = build(tmp_path / "store", tokenizer)
    BPETokenizer.train_from_iterator(TEXTS, 270).save(store.directory / "tokenizer")
    with pytest.raises(UserError, match="does not match the hash in its manifest"):
        _ = TokenStore(store.directory).tokenizer
