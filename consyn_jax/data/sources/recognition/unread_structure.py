"""Detect structure that is lost in plain text: ends of documents, tables, rows and notebooks.

Also detect files in which `--document_separator` separates nothing.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from consyn_jax.data.sources.byte_stream import ByteStream
from consyn_jax.data.sources.reader import inner_suffix
from consyn_jax.data.sources.source import READERS, Source
from consyn_jax.data.sources.text_reader import TextReader
from consyn_jax.errors import UserError, counted, listed
from consyn_jax.prepare_config import CorpusOptions

# Markers that programs put between documents: those of GPT-2 and its successors, Llama 2, Llama 3,
# Gemma and chat templates.
END_MARKERS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>")
# Limits of the search: bytes of all files together, fewest bytes per file, number of files.
TOTAL_BYTES, LEAST_BYTES, MOST_FILES = 64 << 20, 1 << 16, 1000
FEWEST_MARKERS = 2
TABLE_LINES = 10
MOST_NAMES = 100  # number of files whose line ends are checked


def unread_structure(
    sources: Sequence[Source], options: CorpusOptions, end_text: str | None = None
) -> list[str]:
    """Describe text files whose structure is lost in plain text, and suggest flags.

    Args:
        end_text: the tokenizer's EOS token.
    """
    if options.document_separator is not None:
        return []
    texts = [source for source in sources if source.kind == TextReader.kind][:MOST_FILES]
    markers = tuple(dict.fromkeys([*([end_text] if end_text else []), *END_MARKERS]))
    found: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for source in texts:
        for key, count in _structure(source, markers, TOTAL_BYTES // len(texts)).items():
            found.setdefault(key, []).append((source.shown, count))
    return [_sentence(*key, places) for key, places in found.items()]


def unused_separator(sources: Sequence[Source], separator: str) -> str:
    """Describe a `--document_separator` that separates nothing; mention CRLF if that is the cause.

    Args:
        sources: the text files that are read as one document each.
        separator: the separator itself, without escapes.
    """
    wanted = separator.replace("\\", "\\\\").replace("'", "\\'").replace("\t", "\\t")
    said = wanted.replace("\n", "\\n").replace("\r", "\\r")
    names = [source.shown for source in sources]
    text = f"--document_separator $'{said}' separates no documents in {listed(names)}"
    if "\n" not in separator or "\r" in separator:
        return text
    with_returns = [
        source.shown
        for source in sources[:MOST_NAMES]
        if _ends_lines_with_returns(Path(source.name))
    ]
    if not with_returns:
        return text
    wanted = wanted.replace("\n", "\\r\\n")
    return (
        f"{text}. Lines end with CRLF in {listed(with_returns)}, so write the separator as "
        f"$'{wanted}' there."
    )


def _ends_lines_with_returns(path: Path) -> bool:
    try:
        with ByteStream(path) as stream:
            return b"\r\n" in stream.read(LEAST_BYTES)
    except UserError:  # the file no longer exists
        return False


def _structure(source: Source, markers: Sequence[str], size: int) -> Counter[tuple[str, str]]:
    """Count the structures (kind, detail) in one file."""
    path, found = Path(source.name), Counter[tuple[str, str]]()
    try:
        with ByteStream(path) as stream:
            text = stream.read(max(size, LEAST_BYTES))
    except UserError:  # reading the file for training raises the same error
        return found
    for marker in markers:
        count = text.count(marker.encode())
        if count >= FEWEST_MARKERS:
            found["marker", marker] = count
    lines = text[:LEAST_BYTES].splitlines()
    if inner_suffix(path) == ".ipynb":
        found["notebook", ""] = 1
    elif _are_rows(lines):
        found["rows", "jsonl"] = 1
    # Look for a table only if no markers were found: bars in markers look like column separators.
    elif not found and "csv" in READERS and (columns := _columns(lines[: 2 * TABLE_LINES])):
        found["table", "csv"] = columns
    return found


def _are_rows(lines: Sequence[bytes]) -> bool:
    """Whether the first two lines are JSON objects."""
    try:
        return len(lines) > 1 and all(isinstance(json.loads(line), dict) for line in lines[:2])
    except (ValueError, RecursionError):
        return False


def _columns(lines: Sequence[bytes]) -> int:
    """Return the number of columns, if it is the same in all lines; 0 otherwise."""
    if len(lines) < TABLE_LINES:
        return 0
    for delimiter, fewest in ((b"\t", 1), (b",", 2), (b";", 2), (b"|", 2)):
        counts = {line.count(delimiter) for line in lines}
        if len(counts) == 1 and min(counts) >= fewest:
            return counts.pop() + 1
    return 0


def _sentence(what: str, detail: str, places: Sequence[tuple[str, int]]) -> str:
    names, many = listed([name for name, _ in places]), len(places) > 1
    count = sum(count for _, count in places)
    if what == "marker":
        read = "are read as one document each" if many else "is read as one document"
        return (
            f"{names} {read}, although {detail!r} occurs {counted(count, 'time')} in the part "
            "that was checked. To end documents there, add --document_separator "
            f"{shlex.quote(detail)}."
        )
    if what == "notebook":
        noun, them = ("notebooks", "them") if many else ("a notebook", "it")
        verb = "are" if many else "is"
        return (
            f"{names} {verb} read as plain text, with the JSON of {noun}. To train on the cells "
            f"only, convert {them} to text or scripts."
        )
    read = f"{names} {'are' if many else 'is'} read as plain text and {'look' if many else 'looks'}"
    if what == "rows":
        return f"{read} like JSON rows. To read the rows, add --dataset_type {detail}."
    columns = sorted({columns for _, columns in places})
    like = f"{'tables' if many else 'a table'} of {' or '.join(map(str, columns[:3]))}"
    like += " or more columns" if len(columns) > 3 else " columns"
    return f"{read} like {like}. To read {'them' if many else 'it'}, add --dataset_type {detail}."
