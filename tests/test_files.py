"""Files are written whole, and never through somebody else's link."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from consyn_jax.errors import UserError
from consyn_jax.files import (
    aside,
    irregular,
    make_directory,
    open_regular,
    refuse_strays,
    remove,
    replace_directory,
    restore_replaced,
    write_whole,
)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    file = tmp_path / "outside"
    file.write_text("theirs")
    return file


def test_what_is_written_replaces_a_link_and_does_not_follow_it(
    tmp_path: Path, outside: Path
) -> None:
    (tmp_path / "config.yaml").symlink_to(outside)
    write_whole(tmp_path / "config.yaml", "ours")
    assert outside.read_text() == "theirs"
    assert not (tmp_path / "config.yaml").is_symlink()
    assert (tmp_path / "config.yaml").read_text() == "ours"
    assert len(list(tmp_path.iterdir())) == 2


def test_names_of_unfinished_files_cannot_be_guessed_and_fit_every_file_system(
    tmp_path: Path,
) -> None:
    names = {aside(tmp_path / "config.yaml").name for _ in range(100)}
    assert len(names) == 100
    longest = tmp_path / ("ü" * 127)
    write_whole(longest, "x")
    assert longest.read_text() == "x"


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR | os.O_CREAT])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [("link", "a link"), ("dangling", "a link"), ("pipe", "No such device|not a regular file")],
)
def test_only_regular_files_are_opened(
    kind: str, reason: str, flags: int, tmp_path: Path, outside: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(outside if kind == "link" else tmp_path / "nowhere")
    # A pipe would block an ordinary `open` for good.
    errors: list[OSError] = []

    def look() -> None:
        try:
            os.close(open_regular(path, flags))
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(5)
    assert [error.errno in (errno.ELOOP, errno.EINVAL, errno.ENXIO) for error in errors] == [True]
    assert not (tmp_path / "nowhere").exists()


def test_a_file_with_a_second_name_is_read_and_not_written(tmp_path: Path, outside: Path) -> None:
    os.link(outside, tmp_path / "lock")
    os.close(open_regular(tmp_path / "lock", os.O_RDONLY))
    with pytest.raises(OSError, match="hard link"):
        open_regular(tmp_path / "lock", os.O_RDWR)


def test_what_is_opened_for_writing_is_never_writable_by_all(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_whole(tmp_path / "a", "x")
        os.close(open_regular(tmp_path / "b", os.O_RDWR | os.O_CREAT))
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"} == {0o644}


def directory(path: Path, content: str) -> Path:
    make_directory(path)
    (path / "file").write_text(content)
    return path


def test_a_directory_is_replaced_and_a_crash_in_between_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = directory(tmp_path / "best", "first")
    replace_directory(directory(aside(best), "second"), best)
    assert (best / "file").read_text() == "second"
    assert list(tmp_path.iterdir()) == [best]

    fresh, renamed = directory(aside(best), "third"), []
    rename = Path.rename

    def cut(self: Path, target: Path) -> Path:
        renamed.append(target)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", cut)
        with pytest.raises(KeyboardInterrupt):
            replace_directory(fresh, best)
    assert not best.exists()
    restore_replaced(tmp_path, ["best"])
    assert (best / "file").read_text() == "second"
    assert list(tmp_path.iterdir()) == [best]


def test_what_was_being_removed_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = directory(tmp_path / "best", "first")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remove(best)
    restore_replaced(tmp_path, ["best"])
    assert list(tmp_path.iterdir()) == []
    remove(best)  # nothing of that name


def test_other_hidden_files_are_left_alone(tmp_path: Path) -> None:
    for name in (".bashrc.old", ".notes.0123456789abcdef.new", "best.old"):
        (tmp_path / name).write_text("mine")
    restore_replaced(tmp_path, ["best", "config.yaml"])
    assert len(list(tmp_path.iterdir())) == 3


def test_the_first_thing_that_is_no_file_is_named(tmp_path: Path) -> None:
    inner = tmp_path / "checkpoints" / "3"
    inner.mkdir(parents=True)
    assert irregular(tmp_path / "checkpoints") is None
    assert irregular(tmp_path / "nothing") is None
    os.mkfifo(inner / "pipe")
    assert irregular(tmp_path / "checkpoints") == (inner / "pipe", "a pipe")
    assert irregular(tmp_path / "checkpoints", inside=False) is None
    (tmp_path / "best").symlink_to(tmp_path)
    assert irregular(tmp_path / "best") == (tmp_path / "best", "a link")


def test_links_out_of_a_model_directory_are_refused_and_those_of_the_hubs_cache_are_not(
    tmp_path: Path, outside: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "also.json").symlink_to("config.json")
    (model / "notes.txt").symlink_to(outside)
    refuse_strays(model, ["*.json"])
    (model / "tokenizer.json").symlink_to(outside)
    with pytest.raises(UserError, match=r"tokenizer\.json is a link to .*outside"):
        refuse_strays(model, ["*.json"])
    refuse_strays(model, ["*.json"], named=model / "tokenizer.json")
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a regular file"):
        refuse_strays(model, ["*.json"])
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to("tokenizer.json")  # to itself
    refuse_strays(model, ["*.json"])
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").touch()
    os.truncate(model / "tokenizer.json", 1 << 40)
    with pytest.raises(UserError, match="has 1,099,511,627,776 bytes, too many for this kind"):
        refuse_strays(model, ["*.json"])

    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    refuse_strays(snapshot, ["*.json"])
    (snapshot / "other.json").symlink_to(outside)
    with pytest.raises(UserError, match=r"other\.json is a link"):
        refuse_strays(snapshot, ["*.json"])
