"""Commands where names of files and the screen are not in UTF-8."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .nursery import MODEL

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0"}
SHORT = [*MODEL, "--tokenizer", "bytes", "--max_tokens", "32", "--batch_size", "2"]


def command(place: Path, name: str, *args: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of a command in a directory with names that are not ASCII."""
    (place / "dätä").mkdir(exist_ok=True)
    text = "".join(f"Zeile {i}: äöü – 文\n" for i in range(99))
    (place / "dätä" / "prosä.txt").write_text(text, encoding="utf-8")
    (place / "dätä" / "läsmich.py").write_text("# ä\n", encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-m", f"consyn_jax.cli.{name}", *args],
        env={**os.environ, "CONSYN_CACHE": str(place / "cäche"), **environment},
        cwd=place,
        capture_output=True,
        check=False,
    )
    said = (ended.stdout + ended.stderr).decode("utf-8", "replace")
    assert "Traceback" not in said, said
    return ended.returncode, said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8:strict"])
def test_a_screen_that_lacks_characters_shows_escapes(tmp_path: Path, encoding: str) -> None:
    code, said = command(
        tmp_path, "train", "--data", "dätä", "--print_config", PYTHONIOENCODING=encoding
    )
    assert code == 0
    shown = {"ascii": "d\\xe4t\\xe4", "latin-1": "d�t�", "utf-8:strict": "dätä"}[encoding]
    assert shown in said or "d\\xE4t\\xE4" in said  # YAML has escapes of its own
    code, said = command(tmp_path, "train", "--data", "fehlt–é.txt", PYTHONIOENCODING=encoding)
    assert code == 2
    assert "does not exist" in said


def test_mistakes_are_named_in_the_locale_c(tmp_path: Path) -> None:
    code, said = command(tmp_path, "train", "--data", "dätä/prosa.txt", **ASCII)
    assert code == 2
    assert "dätä/prosa.txt in --data does not exist; did you mean prosä.txt?" in said


@pytest.mark.slow
def test_whole_runs_in_the_locale_c(tmp_path: Path) -> None:
    run = ["--data", "dätä", *SHORT, "--output", "läuf", "--save_steps", "2"]
    assert command(tmp_path, "train", *run, "--max_steps", "2", **ASCII)[0] == 0
    code, said = command(tmp_path, "train", *run, "--max_steps", "2", **ASCII)
    assert code == 0
    assert "This run is complete: 2 steps. Its model is in läuf/final." in said
    longer = [*run, "--max_steps", "4", "--overwrite_schedule"]
    assert command(tmp_path, "train", *longer)[0] == 0  # resumed in the usual locale
    assert (tmp_path / "läuf" / "report.html").is_file()
    assert command(tmp_path, "train", *longer, "--dry_run", **ASCII)[0] == 0
    config = ["--config", "läuf/config.yaml", "--print_config"]
    assert command(tmp_path, "train", *config, **ASCII)[0] == 0
    prepared = ["--data", "dätä", "--tokenizer", "bytes", "--output", "tökens"]
    code, said = command(tmp_path, "prepare", *prepared, **ASCII)
    assert code == 0
    assert "läsmich.py" not in said or "left out" in said


def test_an_output_with_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    name = os.fsdecode(b"run-\xff")
    code, said = command(tmp_path, "train", "--data", "dätä", *SHORT, "--output", name)
    assert code == 2
    assert "has characters that this locale cannot write" in said
