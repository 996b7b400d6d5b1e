"""Requests from the sentences of a text."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def story_rows(text: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of every kind, from the sentences of a text; contexts of very unlike lengths."""
    words, draws = text.split(), np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        start = int(draws.integers(0, len(words) - 700))
        size = int(draws.integers(0, 40)) if number % 50 else int(draws.integers(300, 600))
        context = " ".join(words[start : start + size])
        choices = [
            " " + " ".join(words[at : at + 1 + number % 4])
            for at in (start + size, *draws.integers(0, len(words) - 9, 3))
        ]
        if number % 3 == 0:
            rows.append({"context": context, "continuation": choices[0]})
        elif number % 3 == 1:
            rows.append({"context": context, "choices": choices, "gold": 0})
        else:
            rows.append({"context": context + " ", "continuations": [c[1:] for c in choices[:2]]})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
