"""The directory of a job: nothing that is not from consyn-prepare is deleted, or used."""

import json
import os
from pathlib import Path

import pytest
from segment_stores import RULES, by_many, by_one, files, stopped

from consyn_jax.cli.prepare import main
from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.data.preparation.segments import job_directory
from consyn_jax.data.preparation.segments.job_directory import (
    check_shared_directory,
    clear,
    open_directory,
    remove_scratch,
    scratch_name,
)
from consyn_jax.errors import UserError
from consyn_jax.prepare_config import CorpusOptions, EngineOptions

GENERATION = "0123456789abcdef" * 2


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A user's directory, with names that a job also uses."""
    path = tmp_path / "thesis"
    (path / "tokenizer").mkdir(parents=True)
    (path / "segments").mkdir()
    for name in ("job.json", "tokenizer/notes.txt", "segments/a.txt", ".hidden"):
        (path / name).write_text("mine")
    return path


def test_a_link_is_not_followed(tmp_path: Path, foreign: Path) -> None:
    before, root = files(foreign), tmp_path / "root"
    root.symlink_to(foreign)
    with pytest.raises(UserError, match=r"root is a link, where consyn-prepare needs files of its"):
        open_directory(root)
    assert files(foreign) == before


def test_a_link_in_place_of_a_job_is_not_followed(
    tmp_path: Path, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `consyn-prepare` meets it: also one to a directory with the very names of a job."""
    data = tmp_path / "a.txt"
    data.write_text("some text")
    job = stopped(monkeypatch, data, tmp_path / "many", 0, "segments")
    other = tmp_path / "other"
    job.root.rename(other)
    for target in (foreign, other):
        before = files(target)
        job.root.symlink_to(target)
        with pytest.raises(UserError, match="is a link, where"):
            by_many(data, tmp_path / "many")
        assert files(target) == before
        job.root.unlink()
    other.rename(job.root)
    assert by_many(data, tmp_path / "many")


def test_a_users_directory_is_refused(foreign: Path) -> None:
    before = files(foreign)
    with pytest.raises(UserError) as refused:
        open_directory(foreign)
    assert str(refused.value).startswith(
        f"{foreign} contains .hidden, segments, which is not from consyn-prepare and is not deleted"
    )
    assert files(foreign) == before


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("mine")
    with pytest.raises(UserError, match="root is a file, where consyn-prepare needs"):
        open_directory(tmp_path / "root")


def test_links_inside_are_refused(tmp_path: Path, foreign: Path) -> None:
    before, root = files(foreign), tmp_path / "root"
    open_directory(root)
    for name in ("tokenizer", GENERATION, f".tokenizer.{GENERATION[:16]}.new"):
        (root / name).symlink_to(foreign)
        with pytest.raises(UserError, match=f"{name} is a link, where consyn-prepare needs"):
            open_directory(root)
        (root / name).unlink()
    assert files(foreign) == before


def test_another_users_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the storage gives all directories to that user."""
    root, me = tmp_path / "root", os.geteuid()
    open_directory(root)
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    open_directory(root)  # a new directory belongs to the same user
    monkeypatch.setattr(job_directory, "_owner_of_new", lambda path: me + 1)
    with pytest.raises(UserError, match="root belongs to another user"):
        open_directory(root)


def test_only_files_of_a_job_are_removed(tmp_path: Path) -> None:
    root = tmp_path / "shared" / "root"
    open_directory(root)
    assert root.stat().st_mode & 0o777 == 0o700
    fresh = f".tokenizer.{GENERATION[:16]}.new"
    for name in ("tokenizer", GENERATION, fresh):
        (root / name).mkdir()
        (root / name / "a").write_text("a")
    (root / "job.json").write_text("{}")
    (root / ".nfs00a1").write_text("a removed file that is still open")
    open_directory(root)
    left = [".nfs00a1", GENERATION, "job.json", "tokenizer"]
    assert sorted(path.name for path in root.iterdir()) == left
    (root / ".nfs00a1").unlink()
    (root / "notes.txt").write_text("mine")  # came later
    clear(root, kept=("tokenizer",))
    assert sorted(path.name for path in root.iterdir()) == ["notes.txt", "tokenizer"]
    clear(root)
    assert files(root) == {"notes.txt": b"mine"}


def noted(output: Path) -> list[str]:
    found: list[str] = json.loads((output / "preparing" / "scratch.json").read_text())
    return found


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_local_command_removes_the_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """One that finishes the store, and one that overwrites it, also with other data."""
    data, output = tmp_path / "a.txt", tmp_path / "many"
    data.write_text("some text")
    job = stopped(monkeypatch, data, output, 0, "segments")
    assert noted(output) == [str(job.root)]
    if overwrite:
        data.write_text("other text")
        flags = ("--data", str(data), "--output", str(output), "--tokenizer", "bytes")
        assert main([*flags, "--overwrite", "--quiet"]) == 0
    else:
        by_one(data, output)
    assert list(job.root.parent.iterdir()) == []
    assert not (output / "preparing").exists()


def test_another_shared_directory_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = tmp_path / "a.txt", tmp_path / "many"
    data.write_text("some text")
    job = stopped(monkeypatch, data, output, 0, "segments")
    rules = CorpusOptions(data=(str(data),), **RULES)
    other = EngineOptions(shared_directory=str(tmp_path / "other"))
    prepare(rules, output=output, test_fraction=0.05, engine=other)
    assert [list(path.iterdir()) for path in (job.root.parent, tmp_path / "other")] == [[], []]


def test_segments_that_cannot_be_removed_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "a.txt", tmp_path / "many"
    data.write_text("some text")
    job = stopped(monkeypatch, data, output, 0, "segments")
    (job.root / "notes.txt").write_text("mine")
    flags = ("--data", str(data), "--output", str(output), "--tokenizer", "bytes")
    assert main([*flags, "--overwrite"]) == 0
    said = capfd.readouterr()
    assert f"{job.root} has segments of this store" in said.err + said.out
    assert (job.root / "job.json").exists()


def test_a_note_about_other_directories_is_not_followed(tmp_path: Path, foreign: Path) -> None:
    """As in a store that was copied, or that another user wrote."""
    before, output = files(foreign), tmp_path / "store"
    (output / "preparing").mkdir(parents=True)
    mine = tmp_path / scratch_name("0" * 32, output)
    mine.symlink_to(foreign)
    other = tmp_path / scratch_name("0" * 32, tmp_path / "another")
    open_directory(other)
    note = output / "preparing" / "scratch.json"
    for content in (f'["{foreign}", "{mine}", "{other}", 5]', "{}", "broken", "5"):
        note.write_text(content)
        assert remove_scratch(output) == ([mine] if "other" in content else [])
    assert files(foreign) == before
    assert other.is_dir()


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cases below name paths."""
    monkeypatch.chdir(tmp_path)
    for name in ("corpus/a", "scratch", "held"):
        Path(name).mkdir(parents=True)
    Path("scratch", f"consyn-{'0' * 32}-{'1' * 8}").mkdir()
    Path("file").write_text("text")
    Path("dangling").symlink_to("nowhere")
    Path("linked").symlink_to("corpus")
    return tmp_path


SEGMENTS = f"scratch/consyn-{'0' * 32}-{'1' * 8}"


@pytest.mark.parametrize(
    ("shared", "output", "data", "fault"),
    [
        ("corpus", "tokens", "corpus", "and --data corpus overlap"),
        ("corpus/a/b", "tokens", "corpus", "and --data corpus overlap"),
        ("linked/b", "tokens", "corpus", "and --data corpus overlap"),
        ("corpus/b", "tokens", "linked", "and --data linked overlap"),
        ("scratch", "tokens", SEGMENTS, "and --data scratch/consyn-0"),
        ("scratch", f"{SEGMENTS}/tokens", "corpus", "and --output scratch/consyn-0"),
        ("tokens", "tokens", "corpus", "and --output tokens overlap"),
        ("tokens/scratch", "tokens", "corpus", "and --output tokens overlap"),
        ("scratch", "tokens", "*", "and --data * overlap"),
        ("scratch", "tokens", "**/*.txt", "and --data **/*.txt overlap"),
        ("scratch", "tokens", "scr*/*", "and --data scr*/* overlap"),
        ("held/b", "tokens", "corpus", "and --validation held overlap"),
        ("file", "tokens", "corpus", "--shared_directory file is a file. Give another directory"),
        ("file/a/b", "tokens", "corpus", "file/a/b cannot be made: file is a file. Give another"),
        ("dangling", "tokens", "corpus", "cannot be used: dangling is a broken link. Give another"),
        ("dangling/a", "tokens", "corpus", "cannot be used: dangling is a broken link. Give"),
        ("/proc/a/b", "tokens", "corpus", "/proc/a/b cannot be written: No such file or directory"),
    ],
)
@pytest.mark.usefixtures("places")
def test_a_shared_directory_that_cannot_be_used(
    shared: str, output: str, data: str, fault: str
) -> None:
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError) as refused:
        check_shared_directory(
            shared, Path(output), CorpusOptions(data=(data,), validation=("held",))
        )
    assert fault in str(refused.value)
    assert "Give" in str(refused.value)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("shared", "output", "data"),
    [
        ("scratch", "tokens", "corpus"),
        (".", "tokens", "corpus"),
        ("new/deep", "tokens", "corpus/*.txt"),
        (".", "tokens", "*.txt"),
        ("scratch", "scratch/tokens", "sample"),
    ],
)
@pytest.mark.usefixtures("places")
def test_a_shared_directory_beside_the_data(shared: str, output: str, data: str) -> None:
    check_shared_directory(shared, Path(output), CorpusOptions(data=(data,)))
