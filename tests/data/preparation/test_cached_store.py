import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consyn_jax.data.preparation import cached_store
from consyn_jax.data.preparation.cached_store import Prepared
from consyn_jax.data.preparation.preparation_spec import Progress
from consyn_jax.data.preparation.workers.worker_pool import WorkerPool
from consyn_jax.data.sources import json_reader
from consyn_jax.data.store import TokenStore, TokenStoreWriter
from consyn_jax.errors import UserError
from consyn_jax.files import cache_directory
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.tokenization import BPETokenizer


def prepare(
    data: str | list[str],
    tokenizer: BPETokenizer | str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Prepared:
    """`cached_store.prepare` with the options as keywords."""
    given = CorpusOptions(
        data=(data,) if isinstance(data, str) else tuple(data),
        tokenizer=tokenizer if isinstance(tokenizer, str) else None,
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in options.items()
        },
    )
    return cached_store.prepare(
        given, None if isinstance(tokenizer, str) else tokenizer, progress=progress
    )


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def rows(path: Path, n: int, start: int = 0) -> Path:
    path.write_text(
        "".join(
            json.dumps({"text": f"row {i} " * (i % 5 + 1)}) + "\n" for i in range(start, start + n)
        )
    )
    return path


def texts(store: TokenStore, split: str) -> list[str]:
    tokens, begins, _ = store.split(split).windows(np.array([0]), store.split(split).num_tokens)
    return [
        store.tokenizer.decode(part.tolist())
        for part in np.split(tokens[0, 1:], np.flatnonzero(begins[0])[1:])
        if len(part)
    ]


def test_documents_are_kept_whole_in_their_splits(tmp_path: Path) -> None:
    prepared = prepare(str(rows(tmp_path / "a.jsonl", 300)), "bytes", validation_fraction=0.2)
    train, held_out = texts(prepared.store, "train"), texts(prepared.store, "validation")
    assert len(held_out) > 30
    assert sorted(train + held_out) == sorted(f"row {i} " * (i % 5 + 1) for i in range(300))
    assert prepared.store.split("train").num_bytes == sum(len(text.encode()) for text in train)
    assert (prepared.report.kept, prepared.from_cache, prepared.validation_is_empty) == (
        300,
        False,
        False,
    )


def test_the_store_does_not_depend_on_the_size_of_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(rows(tmp_path / "a.jsonl", 300))
    first = prepare(file, "bytes", validation_fraction=0.2).store.fingerprint
    monkeypatch.setattr(json_reader, "BLOCK_BYTES", 100)
    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path / "other"))
    assert prepare(file, "bytes", validation_fraction=0.2).store.fingerprint == first


def test_adding_documents_moves_no_old_one_to_another_split(tmp_path: Path) -> None:
    old = prepare(str(rows(tmp_path / "a.jsonl", 200)), "bytes", validation_fraction=0.2).store
    rows(tmp_path / "b.jsonl", 100, start=200)
    new = prepare(
        [str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")], "bytes", validation_fraction=0.2
    ).store
    for split in ("train", "validation"):
        assert texts(new, split)[-len(texts(old, split)) :] == texts(old, split)


def test_the_cache_depends_on_content_and_not_on_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = rows(tmp_path / "a.jsonl", 50)
    first = prepare(str(file), "bytes")
    (tmp_path / "moved").mkdir()
    moved = file.rename(tmp_path / "moved" / "b.jsonl")
    monkeypatch.setattr(BPETokenizer, "encode_batch", lambda *_: pytest.fail("tokenised again"))
    again = prepare(str(moved), BPETokenizer.bytes())
    assert again.from_cache
    assert again.store.directory == first.store.directory
    assert again.report == first.report


@pytest.mark.parametrize(
    "change",
    [
        {"validation_fraction": 0.3},
        {"tokenizer": "train:300"},
        {"text_key": "other"},
        {"validation": ("b.jsonl",)},
    ],
)
def test_options_that_change_the_tokens_change_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(
        "".join(json.dumps({"text": f"text {i}", "other": f"other {i}"}) + "\n" for i in range(50))
    )
    rows(Path("b.jsonl"), 5)
    options: dict[str, object] = {"tokenizer": "bytes", "validation_fraction": 0.2}
    first = prepare("a.jsonl", **options)  # type: ignore[arg-type]
    other = prepare("a.jsonl", **{**options, **change})  # type: ignore[arg-type]
    assert not other.from_cache
    assert other.store.fingerprint != first.store.fingerprint


def test_changed_content_makes_another_store(tmp_path: Path) -> None:
    first = prepare(str(rows(tmp_path / "a.jsonl", 50)), "bytes")
    second = prepare(str(rows(tmp_path / "a.jsonl", 51)), "bytes")
    assert not second.from_cache
    assert second.store.split("train").num_documents > first.store.split("train").num_documents


def test_separate_validation_data(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", 50)
    (tmp_path / "v.txt").write_text("held out")
    store = prepare(str(tmp_path / "a.jsonl"), "bytes", validation=[str(tmp_path / "v.txt")]).store
    assert texts(store, "validation") == ["held out"]
    assert len(texts(store, "train")) == 50


def test_validation_files_are_not_trained_on(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "valid.txt"):
        (tmp_path / name).write_text(name)
    prepared = prepare(str(tmp_path), "bytes", validation=[str(tmp_path / "." / "valid.txt")])
    assert texts(prepared.store, "train") == ["a.txt", "b.txt"]
    assert texts(prepared.store, "validation") == ["valid.txt"]
    assert prepared.left_out == ((str(tmp_path / "valid.txt"), "is validation data"),)
    with pytest.raises(UserError, match="nothing is left to train on"):
        prepare(str(tmp_path / "a.txt"), "bytes", validation=[str(tmp_path / "a.txt")])


def test_a_tokenizer_is_learned_from_the_train_split_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    learn = BPETokenizer.train_from_iterator

    def spy(documents: object, vocab_size: int) -> BPETokenizer:
        seen.extend(documents)  # type: ignore[call-overload]
        return learn(seen, vocab_size)

    monkeypatch.setattr(BPETokenizer, "train_from_iterator", spy)
    store = prepare(
        str(rows(tmp_path / "a.jsonl", 100)), "train:300", validation_fraction=0.2
    ).store
    assert seen == texts(store, "train")
    assert store.tokenizer.vocab_size <= 300
    assert prepare(str(tmp_path / "a.jsonl"), "train:300", validation_fraction=0.2).from_cache


@pytest.mark.parametrize("now", [("skip", "error"), ("skip", "replace")])
@pytest.mark.parametrize("before", [("error", "error"), ("skip", "error"), ("skip", "replace")])
def test_a_learned_tokenizer_depends_on_the_current_flags_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: tuple[str, str], now: tuple[str, str]
) -> None:
    """Flags of an earlier command, which was stopped, make no difference."""
    words = [b'{"text": "some more and other words %d"}' % (7 * n) for n in range(50)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([b'{"text": "t\xffo t\xffo t\xffo"}', *words]))

    def learned(leniency: tuple[str, str], output: Path | None) -> str:
        options = CorpusOptions(
            data=(str(tmp_path / "a.jsonl"),),
            tokenizer="train:300",
            on_bad_rows=leniency[0],
            invalid_utf8=leniency[1],
        )
        return cached_store.prepare(options, output=output).store.tokenizer.sha256

    with monkeypatch.context() as patch:
        patch.setattr(WorkerPool, "results", interrupt)
        with pytest.raises((KeyboardInterrupt, UserError)):
            learned(before, None)
    assert learned(now, None) == learned(now, tmp_path / "fresh")


def test_progress_reaches_the_total_in_every_stage(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    file = rows(tmp_path / "a.jsonl", 2000)
    prepare(str(file), "train:270", progress=lambda *now: told.append(now))
    size = file.stat().st_size
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == [
        "hash",
        "train tokenizer",
        "tokenize",
    ]
    for stage in ("hash", "train tokenizer", "tokenize"):
        done = [d for s, d, _ in told if s == stage]
        assert done == sorted(done)
        assert done[-1] == size
    assert {total for _, _, total in told} == {size}
    assert len(told) < 250


def test_skipped_rows_are_also_reported_from_the_cache(tmp_path: Path) -> None:
    file = rows(tmp_path / "a.jsonl", 20)
    file.write_text(file.read_text() + "broken\n")
    with pytest.raises(UserError, match=r"a\.jsonl:21 is broken JSON"):
        prepare(str(file), "bytes")
    for _ in range(2):
        report = prepare(str(file), "bytes", on_bad_rows="skip").report
        assert report.dropped == {"bad row": 1}
        assert "a.jsonl:21" in report.examples["bad row"][0]
    with pytest.raises(
        UserError, match=r"a\.jsonl:21 is broken JSON"
    ):  # the store exists, but these flags do not allow it
        prepare(str(file), "bytes")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("  \n\n", {}, "There is no text in .*a.txt: nothing but white space"),
        ("é", {"validation_fraction": 0.6}, "none is left to train on"),
    ],
)
def test_data_with_nothing_to_train_on(
    tmp_path: Path, content: str, options: dict[str, float], message: str
) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        prepare(str(tmp_path / "a.txt"), "bytes", **options)  # type: ignore[arg-type]


def test_an_empty_validation_split_is_reported(tmp_path: Path) -> None:
    assert prepare(
        str(rows(tmp_path / "a.jsonl", 20)), "bytes", validation_fraction=0.0
    ).validation_is_empty


def test_the_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("CONSYN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_directory() == Path("/somewhere/consyn_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "consyn_jax"


# ------------------------------------------------------------------------------------- given stores


def test_a_token_store_given_as_data_is_used_in_place(tmp_path: Path) -> None:
    tokenizer = BPETokenizer.bytes()
    with TokenStoreWriter(tmp_path / "store", tokenizer) as writer:
        writer.add("train", tokenizer.encode("hello"), 5)
    for spec in (None, "bytes", tokenizer):
        for kind in ("auto", "sharded"):
            prepared = prepare(str(tmp_path / "store"), spec, dataset_type=kind)
            assert prepared.store.directory == tmp_path / "store"
            assert prepared.validation_is_empty
    with pytest.raises(UserError, match="made with a tokenizer other than"):
        prepare(str(tmp_path / "store"), BPETokenizer.train_from_iterator(["abab"], 260))
    with pytest.raises(UserError, match="is tokenised already, so --tokenizer train:300 cannot be"):
        prepare(str(tmp_path / "store"), "train:300")
    with pytest.raises(UserError, match="has its own validation split"):
        prepare(str(tmp_path / "store"), validation=["sample"])
    with pytest.raises(UserError, match="One of --data and --validation has files of tokens"):
        prepare("sample", "bytes", validation=[str(tmp_path / "store")])


# ---------------------------------------------------------------------------------------- real data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "documents"),
    [
        ("tinyshakespeare/input.txt", {"validation_fraction": 0.1}, 2),
        ("gutenberg/*-*.txt", {"validation": "gutenberg/carroll-alice.txt"}, 11),
        ("jsonl/gsm8k_train.jsonl", {"text_key": "question"}, 7473),
        ("jsonl/alpaca_en_demo.json", {"text_key": "output"}, 999),
        ("jsonl/udhr.jsonl", {}, 266),
    ],
)
def test_real_corpora_keep_every_byte(
    shared_data: Path, tmp_path: Path, name: str, options: dict[str, object], documents: int
) -> None:
    paths = [
        str(path)
        for path in sorted(shared_data.glob(name))
        if path.name not in ("shakespeare-caesar.txt", "bible-kjv.txt")
    ]
    if "validation" in options:
        options = {"validation": [str(shared_data / str(options["validation"]))]}
    prepared: Prepared = prepare(paths, "bytes", deduplicate=False, normalize="none", **options)  # type: ignore[arg-type]
    splits = [prepared.store.split(split) for split in ("train", "validation")]
    assert sum(split.num_documents for split in splits) == documents
    for split in splits:
        assert (
            split.num_tokens == split.num_bytes + split.num_documents
        )  # one token a byte, one EOS a document


def test_tiny_shakespeare_token_by_token(shared_data: Path) -> None:
    data = (shared_data / "tinyshakespeare" / "input.txt").read_bytes()
    store = prepare(
        str(shared_data / "tinyshakespeare" / "input.txt"), "bytes", validation_fraction=0.1
    ).store
    cut = int(len(data) * 0.9)
    for split, part in (("train", data[:cut]), ("validation", data[cut:])):
        tokens = np.empty(store.split(split).num_tokens, np.uint16)
        store.split(split).read(0, tokens)
        assert tokens[:-1].astype(np.uint8).tobytes() == part
        assert tokens[-1] == store.tokenizer.eos_token_id
