import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from consyn_jax.data.preparation import build, cached_store
from consyn_jax.data.preparation.cached_store import Prepared
from consyn_jax.data.sources import json_reader
from consyn_jax.data.store import TokenStoreWriter
from consyn_jax.errors import UserError
from consyn_jax.files import cache_directory
from consyn_jax.prepare_config import CorpusOptions


def prepare(data: Path) -> Prepared:
    return cached_store.prepare(CorpusOptions(data=(str(data),), tokenizer="bytes"))


def rows(path: Path, n: int) -> Path:
    path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(n)))
    return path


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


LENIENCIES = [("error", "replace"), ("skip", "error"), ("skip", "replace")]


@pytest.mark.parametrize(("before", "now"), list(itertools.permutations(LENIENCIES, 2)))
@pytest.mark.parametrize("place", ["cache", "output", "journal"])
def test_rows_that_are_not_utf_8_are_treated_by_the_current_flags(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: tuple[str, str],
    now: tuple[str, str],
    place: str,
) -> None:
    """The key of a store does not depend on these flags."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "t\xffo"}\n{"text": "one"}\n{"text": "three"}\n')
    monkeypatch.setattr(json_reader, "BLOCK_BYTES", 10)
    monkeypatch.setattr(build, "JOURNAL_SECONDS", 0)
    output = None if place == "cache" else tmp_path / "store"

    def make(leniency: tuple[str, str], output: Path | None) -> str:
        options = CorpusOptions(
            data=(str(file),),
            tokenizer="bytes",
            validation_fraction=0.0,
            on_bad_rows=leniency[0],
            invalid_utf8=leniency[1],
        )
        return cached_store.prepare(options, output=output).store.fingerprint

    expected = {
        leniency: make(leniency, tmp_path / "-".join(leniency)) for leniency in (before, now)
    }
    if place == "journal":
        with monkeypatch.context() as patch:
            patch.setattr(TokenStoreWriter, "finish", interrupt)
            with pytest.raises(KeyboardInterrupt):
                make(before, output)
    else:
        assert make(before, output) == expected[before]
    if output is not None and expected[before] != expected[now]:
        with pytest.raises(UserError, match="other data"):
            make(now, output)
    else:
        finished = (
            {path: path.read_bytes() for path in (cache_directory() / "stores").glob("*/*.*")}
            if place == "cache"
            else {}
        )
        assert make(now, output) == expected[now]
        assert all(
            path.read_bytes() == content for path, content in finished.items()
        )  # a run may be reading it


def test_a_failed_preparation_leaves_nothing(tmp_path: Path, empty_cache: Path) -> None:
    file = rows(tmp_path / "a.jsonl", 20)
    file.write_text(file.read_text() + "broken\n")
    with pytest.raises(UserError):
        prepare(file)
    assert list((empty_cache / "stores").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSYN_CACHE", str(rows(tmp_path / "a.jsonl", 3)))
    with pytest.raises(UserError, match=r"cannot be written: .* Set CONSYN_CACHE"):
        prepare(tmp_path / "a.jsonl")


def test_processes_at_the_same_time_make_one_store(tmp_path: Path, empty_cache: Path) -> None:
    file = rows(tmp_path / "a.jsonl", 3000)
    code = (
        "from consyn_jax.prepare_config import CorpusOptions;"
        "from consyn_jax.data.preparation.cached_store import prepare;"
        f"print(prepare(CorpusOptions(data=({str(file)!r},), tokenizer='bytes')).store.fingerprint)"
    )
    racing = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=240) for process in racing]
    assert [process.returncode for process in racing] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert len(list((empty_cache / "stores").iterdir())) == 1


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("manifest.json", "{"),
        ("manifest.json", None),
        ("tokenizer/tokenizer.json", "{}"),
        ("report.json", "[]"),
        ("report.json", None),
        ("train-00000.tokens", "x"),
    ],
)
def test_a_damaged_entry_of_the_cache_is_made_again(
    tmp_path: Path, file: str, content: str | None
) -> None:
    data = rows(tmp_path / "a.jsonl", 50)
    first = prepare(data)
    (first.store.directory / file).unlink()
    if content is not None:
        (first.store.directory / file).write_text(content)
    again = prepare(data)
    assert (again.from_cache, again.store.fingerprint, again.report) == (
        False,
        first.store.fingerprint,
        first.report,
    )
    assert prepare(data).from_cache
    assert [entry.name for entry in first.store.directory.parent.iterdir()] == [
        first.store.directory.name
    ]


def test_an_entry_with_the_tokenizer_of_an_older_version_is_made_again(tmp_path: Path) -> None:
    data = rows(tmp_path / "a.jsonl", 50)
    directory = prepare(data).store.directory
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**manifest, "tokenizer_sha256": "0" * 64}))
    assert not prepare(data).from_cache


@pytest.mark.parametrize(
    "name", ["preparing", "tokenizer", "train-00000.tokens", "preparing/digests", "sources.json"]
)
def test_a_link_in_an_unfinished_store_is_named_and_nothing_is_written_there(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output, outside = rows(tmp_path / "a.jsonl", 20), tmp_path / "store", tmp_path / "outside"
    options = CorpusOptions(data=(str(data),), tokenizer="bytes")
    with monkeypatch.context() as patch:
        patch.setattr(build, "JOURNAL_SECONDS", 0)
        patch.setattr(TokenStoreWriter, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cached_store.prepare(options, output=output)
    target = output / name
    outside.mkdir()
    if target.is_dir():
        target.rename(outside / "moved")
    else:
        target.unlink(missing_ok=True)
    place = outside / "moved"
    if not place.exists():
        place.write_text("somebody's")
    target.symlink_to(place)
    before = {path: path.stat().st_mtime_ns for path in outside.rglob("*")}
    with pytest.raises(UserError, match=f"{target} is a link, and a token store must not"):
        cached_store.prepare(options, output=output)
    assert {path: path.stat().st_mtime_ns for path in outside.rglob("*")} == before


# ------------------------------------------------------------------- a journal of somebody else


def unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[CorpusOptions, Path]:
    """A store that a killed process has left."""
    options = CorpusOptions(data=(str(rows(tmp_path / "a.jsonl", 30)),), tokenizer="bytes")
    with monkeypatch.context() as patch:
        patch.setattr(build, "JOURNAL_SECONDS", 0)
        patch.setattr(TokenStoreWriter, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cached_store.prepare(options, output=tmp_path / "store")
    return options, tmp_path / "store"


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["writer", "open", "train", "name"], "../../elsewhere"),
        (["writer", "open", "train", "name"], "validation-00000"),
        (["writer", "open", "train", "tokens"], None),
        (["writer", "open", "train", "target_tokens"], "nan"),
        (["writer", "open", "train"], []),
        (["writer", "open"], []),
        (["writer", "shards"], {"train": [{"file": "../x.tokens"}]}),
        (["report", "documents"], "many"),
        (["report", "dropped"], {"no rule": 1}),
        (["report", "sources"], []),
        (["report", "sources"], [{"name": "a", "kind": "jsonl"}]),
        (["position"], [0]),
        (["source"], 1),
        (["seen"], -1),
        (["near"], 1 << 80),
    ],
)
def test_a_journal_that_no_preparation_wrote_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str], value: object
) -> None:
    """A shard's name once led out of the store, where files were made and truncated."""
    options, store = unfinished(tmp_path, monkeypatch)
    journal = store / "preparing" / "journal.json"
    saved = json.loads(journal.read_text())
    place = saved
    for key in keys[:-1]:
        place = place[key]
    assert keys[-1] in place
    place[keys[-1]] = value
    journal.write_text(json.dumps(saved))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"journal\.json is damaged\. Delete .*store and prepare"):
        cached_store.prepare(options, output=store)
    assert sorted(tmp_path.iterdir()) == before


def test_a_journal_of_any_size_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, store = unfinished(tmp_path, monkeypatch)
    with (store / "preparing" / "journal.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"journal\.json cannot be read: it has 1,099,511,627,776"):
        cached_store.prepare(options, output=store)
