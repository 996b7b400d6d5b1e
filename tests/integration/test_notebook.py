"""The notebook of the quickstart: every cell runs, in a directory of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = ROOT / "docs" / "quickstart.ipynb"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "site" / "run_notebook.py", notebook],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "notebook" / "final" / "model.safetensors").is_file()
