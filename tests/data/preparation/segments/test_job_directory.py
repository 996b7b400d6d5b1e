"""The directory of a job: nothing that is not from consyn-prepare is deleted, or used."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from segment_stores import RULES, by_many, by_one, files, stopped

from consyn_jax.cli.prepare import main
from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.data.preparation.segments import job_directory
from consyn_jax.data.preparation.segments.job import Job
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


def opened(root: Path) -> None:
    os.close(open_directory(root))


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
    with pytest.raises(UserError, match=r"root is a link, but consyn-prepare needs files of its"):
        opened(root)
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
        with pytest.raises(UserError, match="is a link, but"):
            by_many(data, tmp_path / "many")
        assert files(target) == before
        job.root.unlink()
    other.rename(job.root)
    assert by_many(data, tmp_path / "many")


def test_a_users_directory_is_refused(foreign: Path) -> None:
    before = files(foreign)
    with pytest.raises(UserError) as refused:
        opened(foreign)
    assert str(refused.value).startswith(
        f"{foreign} contains .hidden, segments, which is not from consyn-prepare and is not deleted"
    )
    assert files(foreign) == before


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("mine")
    with pytest.raises(UserError, match="root is a file, but consyn-prepare needs"):
        opened(tmp_path / "root")


def test_links_inside_are_refused(tmp_path: Path, foreign: Path) -> None:
    before, root = files(foreign), tmp_path / "root"
    opened(root)
    for name in ("tokenizer", GENERATION, f".tokenizer.{GENERATION[:16]}.new"):
        (root / name).symlink_to(foreign)
        with pytest.raises(UserError, match=f"{name} is a link, but consyn-prepare needs"):
            opened(root)
        (root / name).unlink()
    assert files(foreign) == before


def test_another_users_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the storage gives all directories to that user."""
    root, me = tmp_path / "root", os.geteuid()
    opened(root)
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    opened(root)  # a new directory belongs to the same user
    monkeypatch.setattr(job_directory, "_owner_of_new", lambda path: me + 1)
    with pytest.raises(UserError, match="root belongs to another user"):
        opened(root)


def test_only_files_of_a_job_are_removed(tmp_path: Path) -> None:
    root = tmp_path / "shared" / "root"
    opened(root)
    assert root.stat().st_mode & 0o777 == 0o700
    fresh = f".tokenizer.{GENERATION[:16]}.new"
    for name in ("tokenizer", GENERATION, fresh):
        (root / name).mkdir()
        (root / name / "a").write_text("a")
    (root / "job.json").write_text("{}")
    (root / ".nfs00a1").write_text("a removed file that is still open")
    opened(root)
    left = [".nfs00a1", GENERATION, "job.json", "lock", "tokenizer"]
    assert sorted(path.name for path in root.iterdir()) == left
    (root / ".nfs00a1").unlink()
    (root / "notes.txt").write_text("mine")  # came later
    clear(root, kept=("tokenizer",))
    assert sorted(path.name for path in root.iterdir()) == ["lock", "notes.txt", "tokenizer"]
    clear(root)
    assert files(root) == {"lock": b"", "notes.txt": b"mine"}


Killed = tuple[Path, Path, Job]  # the data, the output and the job of a command


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Killed:
    """A command that was killed among its segments."""
    data, output = tmp_path / "a.txt", tmp_path / "many"
    data.write_text("some text")
    return data, output, stopped(monkeypatch, data, output, 0, "segments")


def test_a_directory_serves_one_command_at_a_time(killed: Killed) -> None:
    """As of two hosts, each with an output of its own under the same path."""
    data, output, job = killed
    lock = open_directory(job.root)
    before, in_use = files(job.root), f"{job.root} is in use by another command, here or on another"
    with pytest.raises(UserError, match=f"{in_use} machine. Wait for it, or give another"):
        by_many(data, output)
    assert remove_scratch(output) == [f"{in_use} machine."]  # which needs what it has there
    assert files(job.root) == before
    os.close(lock)
    assert by_many(data, output)


def test_storage_without_locks_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(descriptor: int) -> bool:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(job_directory, "try_lock", fails)
    with pytest.raises(UserError, match=r"root cannot be locked: No locks available. Give"):
        opened(tmp_path / "root")


def test_a_lock_that_was_just_removed_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another command removes the directory's files between `open` and `flock`."""
    root = tmp_path / "root"

    def removed(descriptor: int) -> bool:
        (root / "lock").unlink()
        return True

    monkeypatch.setattr(job_directory, "try_lock", removed)
    with pytest.raises(UserError, match=r"root is in use by another command"):
        opened(root)


def noted(output: Path) -> list[str]:
    found: list[str] = json.loads((output / "preparing" / "scratch.json").read_text())
    return found


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_local_command_removes_the_segments(killed: Killed, overwrite: bool) -> None:
    """One that finishes the store, and one that overwrites it, also with other data."""
    data, output, job = killed
    assert noted(output) == [str(job.root)]
    if overwrite:
        data.write_text("other text")
        flags = ("--data", str(data), "--output", str(output), "--tokenizer", "bytes")
        assert main([*flags, "--overwrite", "--quiet"]) == 0
    else:
        by_one(data, output)
    assert list(job.root.parent.iterdir()) == []
    assert not (output / "preparing").exists()


def test_another_shared_directory_takes_over(killed: Killed, tmp_path: Path) -> None:
    data, output, job = killed
    rules = CorpusOptions(data=(str(data),), **RULES)
    other = EngineOptions(shared_directory=str(tmp_path / "other"))
    prepare(rules, output=output, test_fraction=0.05, engine=other)
    assert [list(path.iterdir()) for path in (job.root.parent, tmp_path / "other")] == [[], []]


SAME = (
    *("--tokenizer", "bytes", "--near_duplicates", "0.8", "--validation_fraction", "0.1"),
    *("--test_fraction", "0.05", "--num_workers", "0"),
)


@pytest.mark.parametrize("flags", [("--overwrite",), SAME])
def test_segments_that_cannot_be_removed_are_named(
    killed: Killed, capfd: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    """Also with `--quiet`, and without advice to delete what may be a user's."""
    data, output, job = killed
    (job.root / "notes.txt").write_text("mine")
    assert main(["--data", str(data), "--output", str(output), "--quiet", *flags]) == 0
    said = capfd.readouterr().err
    assert f"warning: {job.root} contains notes.txt, which is not from consyn-prepare" in said
    assert "elete it" not in said
    assert (job.root / "job.json").exists()


@pytest.mark.parametrize("fails", ["is_dir", "iterdir", "rmdir"])
def test_storage_that_fails_is_named(
    killed: Killed, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    _, output, job = killed
    if fails == "is_dir":
        shutil.rmtree(job.root)

    def stale(path: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, fails, stale)
        (said,) = remove_scratch(output)
    assert said == (
        f"{job.root} cannot be deleted from here (Stale file handle). If it contains segments of "
        "this store, they are no longer needed. Delete the directory."
    )


def test_an_open_file_stays_in_its_directory_on_nfs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of a directory is open while the directory is removed."""
    data, output = tmp_path / "a.txt", tmp_path / "many"
    data.write_text("some text")
    hidden, unlink, close = dict[int, Path](), os.unlink, os.close

    def unlink_as_nfs(path: Any, *, dir_fd: int | None = None) -> None:
        if Path(path).name != "lock":
            unlink(path, dir_fd=dir_fd)
            return
        place = Path("" if dir_fd is None else f"/proc/self/fd/{dir_fd}", path).resolve()
        inode = place.stat().st_ino
        hidden[inode] = place.rename(place.with_name(".nfs0000a1"))

    def close_as_nfs(descriptor: int) -> None:
        place = hidden.pop(os.fstat(descriptor).st_ino, None)
        close(descriptor)
        if place is not None:
            unlink(place)

    stopped(monkeypatch, data, output, 0, "segments")
    monkeypatch.setattr(os, "unlink", unlink_as_nfs)
    monkeypatch.setattr(os, "close", close_as_nfs)
    data.write_text("other text")
    assert main(["--data", str(data), "--output", str(output), *SAME, "--overwrite"]) == 0
    assert list((tmp_path / "shared").iterdir()) == []
    assert not (output / "preparing").exists()


def test_a_note_about_other_directories_is_not_followed(tmp_path: Path, foreign: Path) -> None:
    """As in a store that was copied, or that another user wrote."""
    before, output = files(foreign), tmp_path / "store"
    (output / "preparing").mkdir(parents=True)
    mine = tmp_path / scratch_name("0" * 32, output)
    mine.symlink_to(foreign)
    other = tmp_path / scratch_name("0" * 32, tmp_path / "another")
    opened(other)
    note = output / "preparing" / "scratch.json"
    for content in (f'["{foreign}", "{mine}", "{other}", 5]', "{}", "broken", "5"):
        note.write_text(content)
        left = [each.split(",")[0] for each in remove_scratch(output)]
        assert left == ([f"{mine} is a link"] if content[0] == "[" else [])
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
