"""Faults of checkpoints that a stranger made: named, and nothing outside is read."""

import os
from pathlib import Path

import pytest

from consyn_jax.training.checkpointing.checkpoint_files import (
    CHECKSUMS,
    damage,
    file_hash,
    is_hollow,
    saved_steps,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    place = tmp_path / "checkpoints" / "4"
    (place / "state").mkdir(parents=True)
    (place / "state" / "a").write_text("weights")
    (place / CHECKSUMS).write_text(f"{file_hash(place / 'state' / 'a')}  state/a\n")
    assert damage(place) is None
    return place


@pytest.mark.parametrize("name", [CHECKSUMS, "state/a", "state/b", ".hidden"])
def test_a_link_is_a_fault_and_is_not_followed(checkpoint: Path, name: str) -> None:
    outside = checkpoint.parents[1] / "outside"
    os.mkfifo(outside)  # reading it would wait forever
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to(outside)
    assert damage(checkpoint) == f"{name} is a link"


def test_a_pipe_is_a_fault(checkpoint: Path) -> None:
    os.mkfifo(checkpoint / "state" / "pipe")
    assert str(damage(checkpoint)).startswith("state/pipe is a")


def test_a_file_is_hollow_if_it_is_large_and_has_almost_no_content(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An intact checkpoint has files of any size; a small file can be read, whatever it has."""
    monkeypatch.setattr("consyn_jax.training.checkpointing.checkpoint_files.LARGE", 1 << 20)
    full, small, huge = (checkpoint / "state" / name for name in ("full", "small", "huge"))
    with full.open("wb") as file:
        file.write(os.urandom(3 << 20))
        os.fsync(file.fileno())
    for file, size in ((small, 1 << 20), (huge, 1 << 30)):
        file.touch()
        os.truncate(file, size)
    assert [is_hollow(file) for file in (full, small, huge)] == [False, False, True]
    huge.unlink()
    with (checkpoint / CHECKSUMS).open("a") as sums:
        sums.writelines(f"{file_hash(file)}  state/{file.name}\n" for file in (full, small))
    assert damage(checkpoint) is None


def test_a_gibibyte_is_the_most_that_a_sparse_file_may_have(tmp_path: Path) -> None:
    for size, is_too_large in ((1 << 20, False), (1 << 30, False), ((1 << 30) + 1, True)):
        (tmp_path / "file").touch()
        os.truncate(tmp_path / "file", size)
        assert is_hollow(tmp_path / "file") == is_too_large


@pytest.mark.parametrize("name", ["state/a", "state/b"])
def test_every_file_is_verified(checkpoint: Path, name: str) -> None:
    (checkpoint / "state" / "b").write_text("weights")
    with (checkpoint / CHECKSUMS).open("a") as sums:
        sums.write(f"{file_hash(checkpoint / 'state' / 'b')}  state/b\n")
    assert damage(checkpoint) is None
    (checkpoint / name).write_text("weighty")
    assert damage(checkpoint) == f"{name} is not what was written"


def test_no_name_drives_the_terminal(checkpoint: Path) -> None:
    (checkpoint / "state" / "\x1b[2J\u202e").write_text("")
    assert damage(checkpoint) == rf"state/\x1b[2J\u202e is not in {CHECKSUMS}"


def test_only_the_name_of_a_step_makes_a_checkpoint(tmp_path: Path) -> None:
    for name in ("4", "020", "\u0662", "1" + 30 * "0", "20.damaged-1", "x"):
        (tmp_path / name).mkdir()
    (tmp_path / "5").touch()
    assert saved_steps(tmp_path) == [4]
