"""From written files to a checkpoint: what is flushed, what is removed, and what processes tell."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from consyn_jax.training.checkpointing import commit
from consyn_jax.training.checkpointing.checkpoint_files import damage, file_hash
from consyn_jax.training.checkpointing.commit import (
    BEGUN,
    WrittenPart,
    discard,
    give_name,
    merge_parts,
    remove_unfinished,
    unfinished,
)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A checkpoint of step 3 that is being written."""
    target = tmp_path / "run" / "checkpoints" / unfinished(3)
    (target / "state").mkdir(parents=True)
    for name in (BEGUN, "state/known", "state/new"):
        (target / name).write_text(name)
    return target


def test_all_is_on_the_disk_before_a_checkpoint_has_its_name(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Orbax wrote was flushed when it was hashed, so its hash is taken as it is."""
    flushed: list[Path] = []
    place, known = target.with_name("3"), file_hash(target / "state/known")

    def fsync(descriptor: int) -> None:
        assert not place.exists()
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    provenance = Mock(return_value="{}")
    monkeypatch.setattr(os, "fsync", fsync)
    new = file_hash(target / "state/new")
    give_name(target, place, {"step": 3}, {"state/known": known}, provenance)
    names = ("state/new", "run.json", "provenance.json", "CHECKSUMS", "state", "")
    assert {*flushed} == {target / name for name in names}
    provenance.assert_called_once_with({"state/known": known, "state/new": new})
    monkeypatch.undo()
    assert damage(place) is None
    assert not target.exists()
    assert not (place / BEGUN).exists()


def test_a_file_is_flushed_when_it_is_hashed(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = Mock(side_effect=os.fsync)
    monkeypatch.setattr(os, "fsync", flush)
    content_hash, seconds = commit._hash_and_flush(target / "state/new")
    assert content_hash == file_hash(target / "state/new")
    assert 0 <= seconds < 100
    assert flush.call_count == 1


def gone(target: Path) -> None:
    (target / BEGUN).unlink()  # Orbax makes the directories of a deleted run again


def absent(target: Path) -> None:
    gone(target)
    discard(target)
    target.parent.mkdir(parents=True)


def beside(target: Path) -> None:
    gone(target)
    (target.parents[1] / "theirs").touch()


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda target: None, ["run", "run/checkpoints"]),
        (gone, []),
        (absent, []),
        (beside, ["run", "run/theirs"]),
    ],
)
def test_a_failed_write_leaves_nothing_and_makes_no_deleted_run_again(
    change: Callable[[Path], None], left: list[str], target: Path, tmp_path: Path
) -> None:
    change(target)
    discard(target)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == left


def test_what_cannot_be_removed_hinders_no_save(target: Path) -> None:
    (target.parent / unfinished(2)).touch()  # no directory
    remove_unfinished(target.parent)
    assert [path.name for path in target.parent.iterdir()] == [unfinished(2)]


def test_processes_tell_each_other_hashes_and_errors() -> None:
    first, second = WrittenPart({"a": "1"}), WrittenPart({"b": "2"})
    full = WrittenPart(error=OSError(errno.ENOSPC, "No space left on device"))
    broken = WrittenPart(error=TypeError("a defect"))

    def merged(own: WrittenPart, *parts: WrittenPart) -> tuple[str | None, dict[str, str]]:
        return merge_parts(own, [part.message() for part in parts], 3)

    assert merged(first, first, second) == (None, {"a": "1", "b": "2"})
    assert merged(first, first, full) == ("No space left on device", {"a": "1"})
    with pytest.raises(TypeError, match="a defect"):
        merged(broken, full, broken)
    with pytest.raises(
        RuntimeError, match=r"of step 3 failed in process 1: TypeError\('a defect'\)"
    ):
        merged(first, first, broken, full)
