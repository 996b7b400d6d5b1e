"""Recognise files that are not data but accompany it: descriptions, licences, scripts, settings."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from consyn_jax.data.sources.reader import inner_suffix
from consyn_jax.data.sources.recognition.found import Found
from consyn_jax.data.sources.recognition.splits import carries_split, split_of_path
from consyn_jax.data.sources.text_reader import TextReader

REASON = "accompanies the data; give its path to train on it"
MANY_TIMES = 10
_DESCRIPTIONS = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|authors|code_of_conduct"
    r"|dataset_?infos?|dataset_dict|dataset_card|croissant)(?![a-z])",
    re.IGNORECASE,
)
_SCRIPTS = (
    *(".py", ".sh", ".bash", ".bat", ".ps1", ".ipynb", ".r", ".jl", ".js", ".ts", ".pl", ".lua"),
    *(".yaml", ".yml", ".toml", ".cfg", ".ini", ".lock", ".log"),
)
_SCRIPT_NAMES = (
    "makefile",
    "dockerfile",
    "requirements.txt",
    "checksums.txt",
    "md5sums",
    "urls.txt",
)


def without_companions(found: Sequence[Found]) -> list[Found]:
    """Find files that only accompany the data, and give each a reason to leave it out.

    A description or licence is left out if its directory, or a directory below it, has rows, tables
    or `.txt` files. A script or settings file is left out if there are rows, tables or text files
    named after a split. It is also left out if the `.txt` files in its directory are at least ten
    times as large, as with a download script and its corpus. Otherwise scripts are data, as in a
    directory of programs. A file whose path the user gave is always data.
    """
    used = [item for item in found if item.is_used]
    data = {item for item in used if not _is_description(item) and not _is_script(item)}
    beside_any = _directories([item for item in data if carries_split(item)])
    beside_rows = _directories([item for item in data if _is_rows(item)])
    beside_rows |= _corpora(data, [item for item in used if _is_script(item)])
    marked = []
    for item in found:
        place = Path(item.source.name).parent
        is_companion = (_is_description(item) and place in beside_any) or (
            _is_script(item) and place in beside_rows
        )
        if item.is_used and not item.is_named and is_companion:
            item = dataclasses.replace(item, reason=REASON)
        marked.append(item)
    return marked


def _is_description(item: Found) -> bool:
    return bool(_DESCRIPTIONS.match(item.inside.name))


def _is_script(item: Found) -> bool:
    """Whether a file is a script or contains settings."""
    name = item.inside.name.lower()
    is_script = item.inside.suffix.lower() in _SCRIPTS or name in _SCRIPT_NAMES
    return item.source.kind == TextReader.kind and is_script


def _is_rows(item: Found) -> bool:
    return carries_split(item) and (
        item.source.kind != TextReader.kind or split_of_path(item.inside) is not None
    )


def _directories(items: Sequence[Found]) -> set[Path]:
    """Return the directories that contain one of the files, directly or in a subdirectory."""
    return {parent for item in items for parent in Path(item.source.name).parents}


def _corpora(data: Collection[Found], scripts: Sequence[Found]) -> set[Path]:
    """Return directories whose `.txt` files are `MANY_TIMES` times as large as the scripts."""
    texts = [item for item in data if inner_suffix(item.inside) == ".txt"]
    of_texts, of_scripts = _sizes(texts), _sizes(scripts)
    return {place for place in of_scripts if of_texts[place] >= MANY_TIMES * of_scripts[place]}


def _sizes(items: Sequence[Found]) -> Counter[Path]:
    """Sum the sizes of files by directory, in bytes; files that no longer exist count as 0."""
    sizes: Counter[Path] = Counter()
    for item in items:
        path = Path(item.source.name)
        with suppress(OSError):
            sizes[path.parent] += path.stat().st_size
    return sizes
