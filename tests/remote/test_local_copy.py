"""Copies of objects in the cache."""

from pathlib import Path

import pytest
from memory_bucket import MemoryBucket

from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.data.sources.discovery import find_sources
from consyn_jax.data.sources.recognition.unread_structure import unused_separator
from consyn_jax.errors import UserError, with_urls
from consyn_jax.files import cache_directory
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.remote import local_copy as module
from consyn_jax.remote.bucket import BucketError, Stored, without_keys
from consyn_jax.remote.local_copy import local_copy


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryBucket:
    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path / "cache"))
    found = MemoryBucket()
    monkeypatch.setattr(module, "open_bucket", lambda place: found)
    local_copy.cache_clear()
    for name in ("corpus/a.txt", "corpus/deep/b.txt", "corpus/c.jsonl", "corpus2/d.txt"):
        found._write(name, f'{{"text": "of {name}"}}'.encode())
    found._write("corpus/", b"")  # as consoles make directories
    return found


def names(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*.*") if p.name != ".lock")


def test_an_object_a_directory_and_the_whole_bucket(bucket: MemoryBucket) -> None:
    assert local_copy("s3://bucket/corpus/a.txt").read_bytes() == b'{"text": "of corpus/a.txt"}'
    assert names(local_copy("s3://bucket/corpus")) == ["a.txt", "c.jsonl", "deep/b.txt"]
    assert len(names(local_copy("s3://bucket"))) == 4


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("corpus/*.txt", ["corpus/a.txt"]),
        ("corpus/**/*.txt", ["corpus/a.txt", "corpus/deep/b.txt"]),
        ("corpus*/?.txt", ["corpus/a.txt", "corpus2/d.txt"]),
    ],
)
def test_a_pattern_copies_what_matches(
    bucket: MemoryBucket, pattern: str, found: list[str]
) -> None:
    sources = find_sources([f"s3://bucket/{pattern}"]).sources
    assert [s.name.rpartition("buckets/s3/bucket/")[2].partition("/")[2] for s in sources] == [
        name.removeprefix("corpus/" if pattern.startswith("corpus/") else "") for name in found
    ]


def test_stores_and_messages_name_the_url_and_not_the_copy(
    bucket: MemoryBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a store does not depend on where the cache is."""
    bucket._write("set/a.jsonl", b'{"text": "a text"}\n{"text": "another text"}\n{bad\n')
    bucket._write("set/deep/empty.csv", b"")
    bucket._write("odd/x.npy", b"\xff")
    stores = []
    for name in ("one", "two"):
        monkeypatch.setenv("CONSYN_CACHE", str(tmp_path / f"cache-{name}"))
        local_copy.cache_clear()
        given = {"data": ("s3://bucket/set",), "tokenizer": "bytes", "num_workers": 0}
        with pytest.raises(UserError, match=r"^s3://bucket/set/a.jsonl:3 is broken JSON"):
            prepare(CorpusOptions(**given), output=tmp_path / "none")
        options = CorpusOptions(**given, on_bad_rows="skip")
        prepared = prepare(options, output=tmp_path / name)
        assert prepared.left_out == (("s3://bucket/set/deep/empty.csv", "is empty"),)
        content = {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.*")}
        assert b'"name": "s3://bucket/set/a.jsonl"' in content["sources.json"]
        assert b"s3://bucket/set/a.jsonl" in content["report.html"]
        assert not any(str(tmp_path).encode() in text for text in content.values())
        stores.append(content)
    assert stores[0] == stores[1]
    with pytest.raises(UserError, match=r"^Nothing in the directory s3://bucket/odd can be used"):
        find_sources(["s3://bucket/odd"])


def test_a_message_also_names_the_directory_of_the_copy(bucket: MemoryBucket) -> None:
    """So that a damaged copy can be deleted."""
    copy = local_copy("s3://bucket/corpus/a.txt")
    error = UserError(f"{copy} is damaged, and so is {copy}. Copy it again.")
    said = "s3://bucket/corpus/a.txt is damaged, and so is s3://bucket/corpus/a.txt. Copy it again."
    place = f" (s3://bucket/corpus is copied to {copy.parent})"
    assert str(error) == said + place
    assert str(UserError(f"--data: {error}")) == f"--data: {said}{place}", "once is enough"
    assert str(UserError("s3://bucket/corpus is empty.")) == "s3://bucket/corpus is empty."
    assert with_urls(f"{copy} is damaged") == "s3://bucket/corpus/a.txt is damaged"


def test_a_separator_that_separates_nothing_is_named_with_urls(bucket: MemoryBucket) -> None:
    bucket._write("plain/a.txt", b"one\r\n---\r\ntwo\r\n")
    sources = find_sources(["s3://bucket/plain"]).sources
    url = "s3://bucket/plain/a.txt"
    assert unused_separator(sources, "\n---\n") == (
        f"--document_separator $'\\n---\\n' separates no documents in {url}. Lines end with CRLF in "
        f"{url}, so write the separator as $'\\r\\n---\\r\\n' there."
    )


def test_what_is_in_the_cache_is_not_downloaded_again(bucket: MemoryBucket) -> None:
    first = local_copy("s3://bucket/corpus")
    local_copy.cache_clear()

    def refuse(name: str, key: str) -> None:
        assert name == "list"

    bucket.before = refuse
    assert local_copy("s3://bucket/corpus") == first


def test_a_change_gives_another_copy_and_leaves_the_old_one(bucket: MemoryBucket) -> None:
    first = local_copy("s3://bucket/corpus/a.txt")
    bucket._write("corpus/a.txt", b'{"text": "OF corpus/a.txt"}')
    assert local_copy("s3://bucket/corpus/a.txt") == first  # one start reads one version
    local_copy.cache_clear()
    second = local_copy("s3://bucket/corpus/a.txt")
    assert second.read_bytes() != first.read_bytes()


def test_a_download_that_fails_leaves_what_is_whole_and_continues(bucket: MemoryBucket) -> None:
    def fail(name: str, key: str) -> None:
        if key == "corpus/c.jsonl":
            raise BucketError("cannot be reached (x)")

    bucket.before = fail
    with pytest.raises(
        UserError, match=r"^s3://bucket/corpus cannot be reached \(x\)\. Check .* again\.$"
    ):
        local_copy("s3://bucket/corpus")
    (copy,) = (cache_directory() / "buckets/s3/bucket").iterdir()
    assert "corpus/c.jsonl" not in names(copy)
    asked: list[str] = []
    bucket.before = lambda name, key: asked.append(key) if name == "download" else None
    assert len(names(local_copy("s3://bucket/corpus"))) == 3
    assert "corpus/c.jsonl" in asked


def test_an_object_that_changes_meanwhile_is_said(bucket: MemoryBucket) -> None:
    def change(name: str, key: str) -> None:
        if name == "download":
            bucket._write(key, b"another")

    bucket.before = change
    with pytest.raises(UserError, match="was changed while it was read"):
        local_copy("s3://bucket/corpus/a.txt")


@pytest.mark.parametrize(
    "key", ["../../evil.txt", "corpus3/a//b.txt", "corpus3/x\ny", "corpus3/.."]
)
def test_a_key_leads_nowhere_else(bucket: MemoryBucket, key: str) -> None:
    bucket._write(key, b"text")
    with pytest.raises(UserError, match="not valid for a file"):
        local_copy("s3://bucket/" + ("corpus3" if key.startswith("corpus3") else ""))


def test_nothing_there_is_said_with_what_was_looked_for(bucket: MemoryBucket) -> None:
    with pytest.raises(UserError, match="s3://bucket/corpu: nothing is there"):
        local_copy("s3://bucket/corpu")
    with pytest.raises(UserError, match=r"there is no \*\.safetensors"):
        local_copy("s3://bucket/corpus", ("*.safetensors",))


def test_only_wanted_files_of_a_model_are_copied(bucket: MemoryBucket) -> None:
    for name in ("config.json", "model.safetensors", "optimizer.pt", "deep/other.json"):
        bucket._write(f"model/{name}", b"{}")
    copy = local_copy("s3://bucket/model", ("*.json", "*.safetensors"))
    assert names(copy) == ["config.json", "model.safetensors"]


def test_an_object_of_another_size_than_listed_gets_no_name(
    bucket: MemoryBucket, tmp_path: Path
) -> None:
    with pytest.raises(BucketError, match="too few or too many bytes"):
        module.fetch(
            bucket, Stored("corpus/a.txt", 3, bucket.objects["corpus/a.txt"][1]), tmp_path / "x"
        )
    assert not (tmp_path / "x").exists()
    assert list(tmp_path.glob("*.new")) == []


@pytest.mark.parametrize(
    "text",
    [
        "The key AKIAIOSFODNN7EXAMPLE is unknown",
        "GET https://h/b/k?X-Amz-Credential=AKIAIOSFODNN7EXAMPLE&x=1",
        "token: FwoGZXIvYXdzEBYaDHqa0AP1hJv3MbF2yyLA=",
    ],
)
def test_no_key_of_an_answer_gets_into_a_message(text: str) -> None:
    shown = without_keys(text)
    assert "AKIA" not in shown
    assert "FwoGZX" not in shown
