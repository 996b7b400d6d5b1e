"""Recognise splits by names of files and directories, as Hugging Face `datasets` does.

The keywords come from `datasets.data_files.SPLIT_KEYWORDS`. A keyword must be a whole word of a
name, delimited by `-`, `.`, `_`, spaces, digits or the ends of the name. The name of a directory
applies to everything below it, and takes precedence over names of files. Unlike in `datasets`, case
is ignored, and if a name has two keywords, the first counts. A file without a keyword is training
data, but it is not used if there are both training and held-out files beside it. Only files of
rows (such as .jsonl), tables and `.txt` files have splits, so `test_*.py` in a directory of
programs is not test data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from consyn_jax.data.sources.reader import inner_suffix
from consyn_jax.data.sources.recognition.found import Found
from consyn_jax.data.sources.sample_reader import SAMPLE
from consyn_jax.data.sources.text_reader import TextReader
from consyn_jax.data.sources.token_reader import TokenReader
from consyn_jax.data.split import TEST, TRAIN, VALIDATION, split_of_name
from consyn_jax.errors import UserError

IS_TEST = "is named as test data"
IS_VALIDATION = "is named as validation data"
NO_SPLIT = "has no split in its name, unlike the files beside it"


@dataclasses.dataclass(frozen=True)
class Parted:
    """Files for training, files for validation, and unused files.

    Attributes:
        train, validation: files of these splits, in the order found.
        rest: files that are not used, each with a reason.
    """

    train: tuple[Found, ...]
    validation: tuple[Found, ...]
    rest: tuple[Found, ...]


def by_split(found: Sequence[Found], flag: str) -> Parted:
    """Assign files to splits by their names.

    A file without a split in its name is training data. It is left out, however, if the same item
    of `--data` has files named for training and also files named for validation or test. If the
    user gave the path of every file, and every name says validation or test, all files are training
    data.

    Args:
        flag: "data" or "validation". For "validation", files of other splits are left out if any
            file is named for validation.

    Raises:
        UserError: no file is left to train on.
    """
    used = [item for item in found if item.is_used]
    rest = [item for item in found if not item.is_used]
    splits = _splits(used)
    names = set(splits.values())
    if flag == "validation":
        wanted = [item for item in used if splits[item] == VALIDATION] or used
        others = [
            dataclasses.replace(item, reason=_other(splits[item]))
            for item in used
            if item not in wanted
        ]
        return Parted(tuple(wanted), (), (*rest, *others))
    if names <= {TEST, VALIDATION} and all(item.is_named for item in used):
        return Parted(tuple(used), (), tuple(rest))
    held_out = {item.given for item in used if splits[item] in (VALIDATION, TEST)}
    with_splits = held_out & {item.given for item in used if splits[item] == TRAIN}
    train = [
        item
        for item in used
        if splits[item] == TRAIN
        or (splits[item] is None and (item.given not in with_splits or not carries_split(item)))
    ]
    if used and not train:
        raise UserError(
            f"All files in --{flag} are named as validation or test data, for example "
            f"{used[0].source.name}. To train on them, give the path of each file."
        )
    validation = [item for item in used if splits[item] == VALIDATION]
    others = [
        dataclasses.replace(item, reason=_other(splits[item]))
        for item in used
        if item not in train and item not in validation
    ]
    return Parted(tuple(train), tuple(validation), (*rest, *others))


def carries_split(item: Found) -> bool:
    """Whether the name of a source may determine its split, as for rows, tables and `.txt` files.

    Token files are split when they are read, and token stores already have splits.
    """
    if item.source.kind in (TokenReader.kind, SAMPLE):
        return False
    return item.source.kind != TextReader.kind or inner_suffix(item.inside) == ".txt"


def split_of_path(path: Path) -> str | None:
    """Find the split of a file by its path relative to the directory that the user gave.

    >>> split_of_path(Path("data/test-00000-of-00001.parquet")), split_of_path(Path("dev/a.txt"))
    ('test', 'validation')
    >>> split_of_path(Path("train/test.jsonl")), split_of_path(Path("contest.jsonl"))
    ('train', None)
    """
    names = (*path.parts[:-1], path.name)
    return next((split for split in map(split_of_name, names) if split), None)


def _splits(used: Sequence[Found]) -> dict[Found, str | None]:
    """Find the split of each file; if several directories are given, their names count as well."""
    own = {item.given: split_of_name(Path(item.given).name) for item in used if not item.is_named}
    beside = TRAIN in own.values() and len(own) > 1
    return {
        item: (
            (own.get(item.given) if beside else None) or split_of_path(item.inside)
            if carries_split(item)
            else None
        )
        for item in used
    }


def _other(split: str | None) -> str:
    return {TEST: IS_TEST, VALIDATION: IS_VALIDATION, TRAIN: "is named as training data"}.get(
        split or "", NO_SPLIT
    )
