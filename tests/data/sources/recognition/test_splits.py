"""Splits that names tell, compared with what `datasets` makes of the same directories."""

import gzip
import json
from pathlib import Path

import datasets
import pytest

from consyn_jax.cli.choices.training_data import left_out_files
from consyn_jax.data.preparation.cached_store import prepare, start
from consyn_jax.data.sources.discovery import find_sources
from consyn_jax.data.sources.recognition.companions import REASON
from consyn_jax.data.sources.recognition.splits import IS_TEST, IS_VALIDATION, NO_SPLIT
from consyn_jax.errors import UserError
from consyn_jax.prepare_config import CorpusOptions

TRAIN, VALIDATION, TEST = "train", "validation", "test"


def rows(name: str) -> bytes:
    """Two rows that say in which file they are."""
    text = "".join(json.dumps({"text": f"{name} row {i}"}) + "\n" for i in range(2)).encode()
    return gzip.compress(text, mtime=0) if name.endswith(".gz") else text


def make(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            datasets.Dataset.from_dict({"text": [f"{name} row 0"]}).to_parquet(directory / name)
        else:
            is_rows = ".jsonl" in name
            (directory / name).write_bytes(rows(name) if is_rows else f"text of {name}".encode())
    return directory


def parted(*data: Path | str, **options: object) -> dict[str, list[str]]:
    """The names of files by what is done with them."""
    base = next(Path(d) for d in data if Path(d).is_dir()) if len(data) == 1 else Path("/")
    corpus = find_sources([str(d) for d in data], **options)  # type: ignore[arg-type]
    short = {
        s: Path(s).relative_to(base).as_posix() if base != Path("/") else Path(s).name
        for s in [
            *(c.name for c in (*corpus.sources, *corpus.validation)),
            *(name for name, _ in corpus.left_out),
        ]
    }
    return {
        TRAIN: [short[s.name] for s in corpus.sources],
        VALIDATION: [short[s.name] for s in corpus.validation],
        TEST: [short[name] for name, why in corpus.left_out if why == IS_TEST],
        "beside": [short[name] for name, why in corpus.left_out if why == REASON],
        "no split": [short[name] for name, why in corpus.left_out if why == NO_SPLIT],
    }


LAYOUTS = [
    ("train.jsonl", "val.jsonl", "test.jsonl"),
    (
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/validation-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
    ),
    ("data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"),
    ("train/a.jsonl", "train/b.jsonl", "validation/a.jsonl", "test/a.jsonl"),
    ("training/a.jsonl", "dev/b.jsonl", "eval/c.jsonl"),
    ("my_train_1.jsonl", "my-valid.jsonl", "my.evaluation.jsonl", "contest.jsonl"),
    ("en/train.jsonl.gz", "en/dev.jsonl.gz", "de/train.jsonl.gz", "de/testing.jsonl.gz"),
    ("a.jsonl", "b.jsonl"),
    ("questions.jsonl", "test.jsonl"),
]


@pytest.mark.parametrize("names", LAYOUTS)
def test_directories_are_parted_as_datasets_parts_them(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    make(tmp_path, *names)
    found = parted(tmp_path)
    patterns = datasets.data_files.get_data_patterns(str(tmp_path))
    theirs = datasets.data_files.DataFilesDict.from_patterns(patterns, str(tmp_path))
    expected = {
        str(split): sorted(Path(file).relative_to(tmp_path).as_posix() for file in files)
        for split, files in theirs.items()
    }
    for split in (TRAIN, VALIDATION, TEST):
        mine = [split_ for split_ in expected if split_.partition("_")[0] == split]
        wanted = sorted(file for split_ in mine for file in expected[split_])
        if names == ("questions.jsonl", "test.jsonl") and split == TRAIN:
            wanted = ["questions.jsonl"]  # which `datasets` does not read at all
        assert sorted(found[split]) == wanted, split


def test_what_lies_beside_data_is_left_out_and_listed_with_counts(tmp_path: Path) -> None:
    make(
        tmp_path,
        "data/train-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
        "README.md",
        "LICENSE",
        "load.py",
        "dataset_infos.json",
        "notes.md",
        "other.jsonl",
    )
    found = parted(tmp_path)
    assert found[TRAIN] == ["data/train-00000-of-00001.parquet", "notes.md"]
    assert found["beside"] == ["LICENSE", "README.md", "load.py"]
    assert found["no split"] == ["other.jsonl"]
    text = left_out_files(find_sources([str(tmp_path)]).left_out)
    assert text.startswith("6 files: ")
    assert f"(each {REASON})" in text
    assert f"test-00000-of-00001.parquet ({IS_TEST})" in text


def test_directories_of_programs_and_of_prose_stay_whole(tmp_path: Path) -> None:
    make(tmp_path / "code", "train.py", "test_train.py", "training/loop.py", "README.md", "dev/x.c")
    assert len(parted(tmp_path / "code")[TRAIN]) == 5
    make(tmp_path / "test" / "books", "a.txt", "b.txt", "contest.txt", "README.md")
    found = parted(tmp_path / "test" / "books")
    assert (found[TRAIN], found["beside"]) == (["a.txt", "b.txt", "contest.txt"], ["README.md"])


def test_a_script_beside_a_corpus_of_many_times_its_size_is_left_out(tmp_path: Path) -> None:
    """nanoGPT's data/shakespeare has input.txt, prepare.py and readme.md."""
    (tmp_path / "input.txt").write_text(
        "First Citizen: Before we proceed any further, hear me.\n" * 9
    )
    (tmp_path / "prepare.py").write_text("import os  # a script of a line\n")
    (tmp_path / "readme.md").write_text("# tiny shakespeare\n")
    found = parted(tmp_path)
    assert (found[TRAIN], found["beside"]) == (["input.txt"], ["prepare.py", "readme.md"])
    (tmp_path / "input.txt").write_text("A requirement.\n")
    assert parted(tmp_path)[TRAIN] == ["input.txt", "prepare.py"]


def test_globs_and_several_names_are_parted_too(tmp_path: Path) -> None:
    make(tmp_path, "train-1.jsonl", "train-2.jsonl", "dev.jsonl", "test.jsonl", "README.md")
    found = parted(f"{tmp_path}/*", tmp_path / "train-1.jsonl")
    assert found[TRAIN] == ["train-1.jsonl", "train-2.jsonl"]
    assert (found[VALIDATION], found[TEST]) == (["dev.jsonl"], ["test.jsonl"])
    assert found["beside"] == ["README.md"]
    named = parted(tmp_path / "train-1.jsonl", tmp_path / "dev.jsonl", tmp_path / "test.jsonl")
    assert (named[TRAIN], named[VALIDATION]) == (["train-1.jsonl"], ["dev.jsonl"])
    make(tmp_path / "s", "train/a.txt", "dev/a.txt", "more/a.txt")
    whole = find_sources([str(tmp_path / "s" / name) for name in ("train", "dev", "more")])
    assert [Path(s.name).parent.name for s in whole.sources] == ["train", "more"]
    assert [Path(s.name).parent.name for s in whole.validation] == ["dev"]


def test_a_file_that_is_named_is_read_whatever_its_name(tmp_path: Path) -> None:
    make(tmp_path, "test.jsonl", "val.jsonl", "README.md", "train.jsonl", "more.jsonl")
    for name in ("test.jsonl", "README.md"):
        assert [Path(s.name).name for s in find_sources([str(tmp_path / name)]).sources] == [name]
    found = parted(tmp_path / "train.jsonl", tmp_path / "more.jsonl")
    assert found[TRAIN] == ["train.jsonl", "more.jsonl"]
    (tmp_path / "only").mkdir()
    make(tmp_path / "only", "test-0.jsonl")
    with pytest.raises(
        UserError, match=r"All files in --data are named as validation or test data"
    ):
        find_sources([str(tmp_path / "only")])


def test_a_validation_directory_gives_its_validation_files(tmp_path: Path) -> None:
    make(tmp_path, "train.jsonl", "val.jsonl", "test.jsonl")
    corpus = find_sources([str(tmp_path)], flag="validation")
    assert [Path(s.name).name for s in corpus.sources] == ["val.jsonl"]


def test_a_store_is_made_of_train_and_validated_on_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path / "cache"))
    make(tmp_path / "d", "train.jsonl", "val.jsonl", "test.jsonl", "README.md")
    options = CorpusOptions(data=(str(tmp_path / "d"),), tokenizer="bytes", num_workers=0)
    prepared = prepare(options)
    splits = prepared.report.splits
    assert (splits[TRAIN]["documents"], splits[VALIDATION]["documents"]) == (2, 2)
    assert [Path(s.name).name for s in prepared.validation] == ["val.jsonl"]
    reasons = {Path(name).name: reason for name, reason in prepared.left_out}
    assert reasons == {"README.md": REASON, "test.jsonl": IS_TEST}
    growing = start(options)
    assert [Path(s.name).name for s in growing.validation] == ["val.jsonl"]
    growing.close()
    none = CorpusOptions(
        data=(str(tmp_path / "d"),), tokenizer="bytes", num_workers=0, validation_fraction=0.0
    )
    assert dict(prepare(none).left_out)[str(tmp_path / "d" / "val.jsonl")] == IS_VALIDATION
    other = CorpusOptions(
        data=(str(tmp_path / "d"),),
        validation=(str(tmp_path / "d" / "test.jsonl"),),
        tokenizer="bytes",
        num_workers=0,
    )
    prepared = prepare(other)
    assert [Path(s.name).name for s in prepared.validation] == ["test.jsonl"]
    assert dict(prepared.left_out)[str(tmp_path / "d" / "val.jsonl")] == IS_VALIDATION


def test_a_saved_dataset_dict_is_parted_by_its_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path / "cache"))
    made = {
        split: datasets.Dataset.from_dict({"text": [f"{split} {i}" for i in range(3)]})
        for split in ("train", "validation", "test", "unsupervised")
    }
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    place = str(tmp_path / "saved")
    prepared = prepare(CorpusOptions(data=(place,), tokenizer="bytes", num_workers=0))
    assert [s.name for s in prepared.validation] == [f"{place}:validation"]
    assert dict(prepared.left_out) == {
        f"{place}:test": IS_TEST,
        f"{place}:unsupervised": NO_SPLIT,
    }
    assert prepared.report.splits[TRAIN]["documents"] == 3
    assert prepared.report.splits[VALIDATION]["documents"] == 3
