"""Origins of the documents of a store: `sources.json`, and the content of `.origins` files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from consyn_jax.data.preparation.preparation_spec import Spec
from consyn_jax.data.sources.reader import Block
from consyn_jax.data.sources.text_reader import separator


def document_origins(
    block: Block, numbers: Int64[np.ndarray, " n"], source: int, spec: Spec
) -> Int64[np.ndarray, "n 3"]:
    """The origins of the documents of a block, in the format of `store/manifest.py`.

    Args:
        numbers: numbers of the documents or rows in their source, from 1.
        source: number of the source.
    """
    found = np.zeros((len(numbers), 3), np.int64)
    found[:, 0] = source
    if block.kind == "rows":
        found[:, 1] = numbers
        return found
    ends = separator(spec.options)
    pieces = block.data.split(ends) if block.kind == "text" else [block.data]
    stops = block.offset + np.cumsum([len(piece) + len(ends) for piece in pieces]) - len(ends)
    here = numbers - block.first
    found[:, 2] = stops[here]
    found[:, 1] = stops[here] - np.array([len(piece) for piece in pieces])[here]
    return found


def sources_page(spec: Spec, contents: Sequence[Sequence[Any]]) -> str:
    """The content of `sources.json`.

    Args:
        contents: identity of each source, as `preparation_spec.contents_of` returns it.
    """
    entries = [
        {
            "name": source.shown,
            "kind": source.kind,
            "is_validation": number < spec.num_validation,
            "sha256": content[-1] if source.files or source.kind == "sample" else [],
        }
        for number, (source, content) in enumerate(zip(spec.sources, contents, strict=True))
    ]
    text = json.dumps(entries, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()  # names of files need not be UTF-8
