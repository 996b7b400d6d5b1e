"""The directory of a job: nothing that is not from consyn-prepare is deleted, or used."""

import os
from pathlib import Path

import pytest
from segment_stores import by_many, files, stopped

from consyn_jax.data.preparation.segments import job_directory
from consyn_jax.data.preparation.segments.job_directory import clear, open_directory
from consyn_jax.errors import UserError

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
