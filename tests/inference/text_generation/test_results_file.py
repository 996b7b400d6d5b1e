"""`--output` is whole under its name, or it is not there."""

import json
import os
from pathlib import Path

import pytest

from consyn_jax.errors import UserError
from consyn_jax.inference.text_generation.results_file import results_file


def test_rows_are_in_order_and_the_name_comes_last(tmp_path: Path) -> None:
    path, partial = tmp_path / "new" / "out.jsonl", tmp_path / "new" / "out.jsonl.partial"
    with results_file(path) as results:
        results.add(1, {"n": 1})
        assert partial.read_text() == ""
        results.add(0, {"n": "é"})
        assert [json.loads(line)["n"] for line in partial.read_text().splitlines()] == ["é", 1]
        assert not path.exists()
    assert path.read_text() == '{"n": "é"}\n{"n": 1}\n'
    assert not partial.exists()


def test_an_interruption_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")

    def interrupted() -> None:
        with results_file(path) as results:
            results.add(0, {"n": 0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old\n"
    assert (tmp_path / "out.jsonl.partial").read_text() == '{"n": 0}\n'


def test_a_full_disk_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory"), results_file(tmp_path):
        pass

    def write_to_a_full_disk() -> None:
        with results_file(tmp_path / "full") as results:
            os.dup2(os.open("/dev/full", os.O_WRONLY), results._file.fileno())
            results.add(0, {"text": "x" * 20_000})

    with pytest.raises(UserError, match=r"cannot be written: No space left on device\."):
        write_to_a_full_disk()


def test_a_link_with_the_name_of_the_unfinished_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("keep")
    (tmp_path / "o.jsonl.partial").symlink_to(tmp_path / "outside")
    with results_file(tmp_path / "o.jsonl") as results:
        results.add(0, {"text": "a"})
    assert (tmp_path / "outside").read_text() == "keep"
    assert (tmp_path / "o.jsonl").read_text() == '{"text": "a"}\n'
