import gzip
import json
from pathlib import Path

import pytest

from consyn_jax.data.preparation.workers.worker import Worker
from consyn_jax.data.sources.discovery import Corpus, find_sources
from consyn_jax.data.sources.huggingface import hub
from consyn_jax.data.sources.json_reader import is_array
from consyn_jax.data.sources.reader import START, Reading
from consyn_jax.data.sources.sample_reader import sample_texts
from consyn_jax.errors import UserError
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.tokenization import BPETokenizer


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def find(*names: object, dataset_type: str = "auto", **options: str) -> Corpus:
    return find_sources([str(name) for name in names], dataset_type, **options)


def kinds(*names: object, dataset_type: str = "auto") -> dict[str, str]:
    return {
        Path(source.name).name: source.kind
        for source in find(*names, dataset_type=dataset_type).sources
    }


def test_sample_is_the_language_reference() -> None:
    texts = sample_texts()
    assert len(texts) >= 79
    assert any("lambda" in text for text in texts)
    (source,) = find("sample").sources
    assert (source.kind, source.num_bytes) == ("sample", sum(len(text.encode()) for text in texts))


def test_a_file_called_sample_is_read_as_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "sample", "text")
    monkeypatch.chdir(tmp_path)
    assert kinds("./sample") == {"sample": "text"}
    assert kinds("sample") == {"sample": "sample"}
    write(tmp_path / "sample", '{"body": "one"}\n{"body": "two"}\n')
    worker = Worker(CorpusOptions(text_key="body"), BPETokenizer.bytes())
    (source,) = find("./sample").sources
    (block,) = source.blocks(START, Reading(worker.options, worker.tokenizer))
    assert worker.work(block).documents == 2
    assert len(find("sample", "./sample").sources) == 2


MANIFEST = json.dumps({"format": "consyn token store"}, indent=1)
ROWS = '{"text": "one"}\n{"text": "two"}\n'


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.txt", "text", "text"),
        ("README.md", "# text", "text"),
        ("Makefile", "all:\n\techo", "text"),
        ("rows.txt", ROWS, "text"),
        ("rows.json", ROWS, "jsonl"),
        ("rows", ROWS, "jsonl"),
        ("rows.jsonl", "broken", "jsonl"),
        ("array.json", '[{"text": "one"}]', "jsonl"),
        ("bom.json", b"\xef\xbb\xbf[{}]", "jsonl"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0), "text"),
        ("rows.jsonl.gz", gzip.compress(ROWS.encode(), mtime=0), "jsonl"),
        ("rows.gz", gzip.compress(ROWS.encode(), mtime=0), "jsonl"),
        ("array.json.gz", gzip.compress(b'[{"text": "one"}]', mtime=0), "jsonl"),
        ("misnamed.txt", gzip.compress(b"text", mtime=0), "text"),
    ],
)
def test_files_are_recognised_by_name_and_content(
    tmp_path: Path, name: str, content: str | bytes, kind: str
) -> None:
    assert kinds(write(tmp_path / name, content)) == {name: kind}


def test_the_requested_type_wins_if_both_fit(tmp_path: Path) -> None:
    assert kinds(write(tmp_path / "rows.txt", ROWS), dataset_type="jsonl") == {"rows.txt": "jsonl"}
    assert is_array(write(tmp_path / "a.json", "  [1]"))
    assert not is_array(write(tmp_path / "a.jsonl", "[1]\n[2]"))


def test_zstandard_is_recognised(tmp_path: Path) -> None:
    import pyarrow

    with pyarrow.CompressedOutputStream(str(tmp_path / "rows.jsonl.zst"), "zstd") as file:
        file.write(ROWS.encode())
    assert kinds(tmp_path / "rows.jsonl.zst") == {"rows.jsonl.zst": "jsonl"}


def test_directories_are_sorted_and_list_what_is_left_out(tmp_path: Path) -> None:
    used = {"b.txt": "b", "a/z.md": "z", "c.jsonl": '{"text": "c"}\n'}
    not_used = {
        "settings.json": '{\n "x": 1\n}',
        ".hidden.txt": "h",
        "empty.txt": "",
        "model.pt": "x",
        "picture.png": b"\x89PNG\x00\x00",
        "t.bin": b"\0\0",
        # what consyn-generate has written so far
        "texts.jsonl.partial": '{"text": "t"}\n{"text": "u"}\n{"te',
    }
    for name, content in {**used, **not_used}.items():
        write(tmp_path / name, content)
    corpus = find(tmp_path)
    assert [Path(source.name).name for source in corpus.sources] == ["z.md", "b.txt", "c.jsonl"]
    reasons = {Path(name).name: reason for name, reason in corpus.left_out}
    assert reasons.keys() == not_used.keys() - {".hidden.txt"}
    assert reasons["empty.txt"] == "is empty"
    assert reasons["picture.png"] == "is binary: byte 4 is NUL"
    assert (
        reasons["settings.json"]
        == "is JSON but not rows (neither JSON Lines of two or more rows nor one array)"
    )
    assert reasons["t.bin"] == "is a token file among other files; give its path to use it"
    assert "pickle" in reasons["model.pt"]
    assert reasons["texts.jsonl.partial"] == "is an unfinished file; give its path to use it"


def test_globs_are_sorted_and_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        write(tmp_path / name, name)
    assert list(kinds(tmp_path / "*.txt", tmp_path / "a.txt")) == ["a.txt", "b.txt"]
    assert list(kinds(tmp_path / "**" / "*.txt")) == ["a.txt", "b.txt", "c.txt"]
    assert find(tmp_path / "*.txt", tmp_path / "a.txt").left_out == (
        (str(tmp_path / "a.txt"), "is named twice"),
    )


@pytest.mark.parametrize(
    ("content", "name", "options", "message"),
    [
        ("", "a.txt", {}, r"a\.txt is empty"),
        (b"ab\0cd", "a.txt", {}, r"a\.txt is binary: byte 2 is NUL"),
        (b"ab\ncd\xff", "a.txt", {}, r"a\.txt is not UTF-8 text: byte 5 \(line 2\) is 0xff"),
        (b"ab\0\xff", "a.txt", {"invalid_utf8": "replace"}, r"a\.txt is binary: byte 2 is NUL"),
        (gzip.compress(b"text" * 100, mtime=0)[:-20], "a.gz", {}, r"a\.gz is cut off or damaged"),
        ("just text", "a.json", {}, r"a\.json is JSON but not rows"),
        (
            "text",
            "a.txt",
            {"dataset_type": "jsonl"},
            r"a\.txt holds text, not JSON rows as --dataset_type jsonl wants",
        ),
        (
            ROWS,
            "a.jsonl",
            {"dataset_type": "text"},
            r"a\.jsonl holds JSON rows, not text as --dataset_type text wants",
        ),
        (
            "text",
            "a.txt",
            {"dataset_type": "sharded"},
            r"a\.txt holds text, not tokens as --dataset_type sharded wants",
        ),
        ("x", "a.pkl", {}, r"a\.pkl .*pickle.*\. Save the token ids with numpy\.save"),
        (
            b"PK\x03\x04...",
            "a.xlsx",
            {},
            r"is an Excel workbook, which has to be exported as CSV\.",
        ),
        (b"PK\x03\x04...", "a.txt", {}, r"is a zip archive, .*\. Give the resulting files"),
        (b"%PDF-1.7\n", "a.pdf", {}, r"is a PDF, which has to be converted to text"),
        (
            "one two three".encode("utf-16-le"),
            "a.txt",
            {},
            r"UTF-16 .*\. Convert the file to UTF-8",
        ),
        ('{"data": [{"text": "a"}]}', "a.json", {}, r"may be the array under 'data'\. Write the"),
        (
            gzip.compress(b"text" * 100, mtime=0)[:-20],
            "a.gz",
            {},
            r"\. Make or download the file again",
        ),
    ],
)
def test_an_unusable_file_is_named_with_the_reason(
    tmp_path: Path, content: str | bytes, name: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        find(write(tmp_path / name, content), **options)


def test_text_with_invalid_bytes_is_text_if_they_are_replaced(tmp_path: Path) -> None:
    assert (
        find(write(tmp_path / "a.txt", b"caf\xe9"), invalid_utf8="replace").sources[0].kind
        == "text"
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["corpsu"], r"corpsu in --data does not exist; did you mean corpus\?"),
        (["*.xyz"], r"\*\.xyz in --data matches no file"),
        (["hollow"], r"Nothing in the directory .*hollow can be used: it holds no files"),
        (["binaries"], r"Nothing in the directory .*binaries can be used: x\.dat is binary"),
        (["corpus", "store"], r"store in --data is a token store, but other items are not"),
        (
            ["unfinished"],
            r"unfinished is an unfinished token store\. "
            r"Run its consyn-prepare command again",
        ),
    ],
)
def test_paths_that_cannot_be_used(tmp_path: Path, names: list[str], message: str) -> None:
    write(tmp_path / "corpus" / "a.txt", "a")
    write(tmp_path / "binaries" / "x.dat", b"\0")
    write(tmp_path / "store" / "manifest.json", MANIFEST)
    (tmp_path / "hollow").mkdir()
    (tmp_path / "unfinished" / "preparing").mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        find(*[tmp_path / name for name in names])


def test_names_like_those_of_datasets_are_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "identity", lambda name: f"{name}@{'0' * 40}::train")
    monkeypatch.setattr(hub, "other_splits", lambda name: ())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert find("owner/name").sources[0].kind == "huggingface"
    assert find("wikitext", dataset_type="huggingface").sources[0].name.startswith("wikitext@0")
    for name in ("wikitext", "here/name", "owner/train.jsonl", "./owner/name"):
        with pytest.raises(UserError, match="does not exist"):
            find(name)


def test_several_stores_can_be_read_together(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name / "manifest.json", MANIFEST)
    assert [source.is_store for source in find(tmp_path / "one", tmp_path / "two").sources] == [
        True,
        True,
    ]


def test_a_manifest_of_another_program_makes_no_store(tmp_path: Path) -> None:
    for name in ("corpus", "corpus/inner"):
        write(tmp_path / name / "manifest.json", '{\n "name": "x"\n}')
        write(tmp_path / name / "a.txt", "a")
    write(tmp_path / "corpus" / "ours" / "manifest.json", MANIFEST)
    write(tmp_path / "corpus" / "damaged" / "manifest.json", "{")
    write(tmp_path / "corpus" / "damaged" / "train-00000.tokens", "abc")
    corpus = find(tmp_path / "corpus")
    assert [
        (Path(source.name).relative_to(tmp_path).as_posix(), source.kind)
        for source in corpus.sources
    ] == [
        ("corpus/a.txt", "text"),
        ("corpus/inner/a.txt", "text"),
    ]
    reasons = {
        Path(name).relative_to(tmp_path / "corpus").as_posix(): reason
        for name, reason in corpus.left_out
    }
    assert reasons["damaged"] == reasons["ours"] == "is a token store; give its path to use it"
    assert "is JSON but not rows" in reasons["manifest.json"]


def test_the_corpora_of_the_shared_data(shared_data: Path) -> None:
    corpus = find(shared_data / "gutenberg")
    assert len(corpus.sources) + len(corpus.left_out) == 15
    assert all("UTF-8" in why or "accompanies" in why for _, why in corpus.left_out)
    assert kinds(shared_data / "enwik8") == {"enwik8.gz": "text"}
    assert kinds(shared_data / "jsonl") == {
        "alpaca_en_demo.json": "jsonl",
        "gsm8k_train.jsonl": "jsonl",
        "udhr.jsonl": "jsonl",
    }
