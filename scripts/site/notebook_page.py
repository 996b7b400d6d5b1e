"""A notebook as a page: its text, its code, and what the code printed."""

from __future__ import annotations

import json
from typing import Any


def notebook_page(source: str) -> str:
    """Markdown of a notebook in format 4, whose outputs are text."""
    parts = []
    for cell in json.loads(source)["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
        else:
            parts.append(f"~~~~python\n{text}\n~~~~")
            printed = "".join(map(output_text, cell["outputs"])).rstrip("\n")
            if printed:
                parts.append(f"~~~~text\n{printed}\n~~~~")
    return "\n\n".join(parts) + "\n"


def output_text(output: dict[str, Any]) -> str:
    """What an output shows as text."""
    if output["output_type"] == "stream":
        return "".join(output["text"])
    return "".join(output["data"]["text/plain"]) + "\n"
