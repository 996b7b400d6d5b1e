"""Run the cells of a notebook in this process, and write what they print into it.

    python scripts/site/run_notebook.py docs/quickstart.ipynb [--write]

Without Jupyter, because the notebook is plain Python. Ends with the first cell that fails. What a
run prints as it goes (to the standard error) is shown here, and not kept in the notebook.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run_cells(notebook: dict[str, Any]) -> None:
    """Run the code cells in order, in one namespace, and replace their outputs."""
    names: dict[str, Any] = {"__name__": "__main__"}
    code = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    for number, cell in enumerate(code, 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        cell["execution_count"] = number
        text = printed.getvalue()
        output = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell["outputs"] = [output] if text else []


def main(file: Path, writes: bool) -> None:
    """Run the notebook in `file`."""
    notebook = json.loads(file.read_text(encoding="utf-8"))
    run_cells(notebook)
    if writes:
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), "--write" in sys.argv[2:])
