import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consyn_jax.config import UserError
from consyn_jax.data import sources
from consyn_jax.data.sources import ReadReport, Source, find_sources, read_documents


def read(*names: object, dataset_type: str = "auto", **options: str) -> list[str]:
    return list(read_documents(find_sources([str(n) for n in names], dataset_type).sources, ReadReport(), **options))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_sample_is_the_language_reference() -> None:
    documents = read("sample")
    assert len(documents) >= 79
    assert any("lambda" in text for text in documents)


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    text = "first\r\nsecond\n\n é 日本 \u2028 end"
    assert read(write(tmp_path / "a.txt", text)) == [text]
    assert read(write(tmp_path / "Makefile", "all:\n\techo")) == ["all:\n\techo"]
    assert read(write(tmp_path / "bom.txt", b"\xef\xbb\xbfhello")) == ["hello"]


def test_json_lines_in_order_with_blank_lines_and_nested_keys(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"a": {"b": "one"}}\n\n  {"a.b": "two", "a": {"b": "no"}}\r\n{"a": {"b": "three"}}')
    assert read(file, text_key="a.b") == ["one", "two", "three"]


def test_files_are_known_by_what_is_in_them(tmp_path: Path) -> None:
    rows = '{"text": "one"}\n{"text": "two"}\n'
    assert read(write(tmp_path / "rows.json", rows)) == ["one", "two"]
    assert read(write(tmp_path / "rows", rows)) == ["one", "two"]
    assert read(write(tmp_path / "array.json", '[{"text": "one"}]')) == ["one"]
    assert read(write(tmp_path / "rows.txt", rows)) == [rows]
    assert read(tmp_path / "rows.txt", dataset_type="jsonl") == ["one", "two"]


texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    rows=st.lists(st.dictionaries(texts, st.integers() | texts)),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 9),
)
def test_arrays_come_out_as_json_reads_them_whatever_the_chunk(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]], indent: int | None, ascii_only: bool, chunk: int
) -> None:
    file = write(tmp_path_factory.mktemp("array") / "a.json", json.dumps(rows, indent=indent, ensure_ascii=ascii_only))
    with pytest.MonkeyPatch.context() as patch, file.open("rb") as handle:
        patch.setattr(sources, "CHUNK_BYTES", chunk)
        assert [row for _, row in sources._rows(file, handle)] == rows


def test_array_rows_know_their_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", '[\n {"text": "one"},\n\n {"tekst":\n "two"}\n]')
    with pytest.raises(UserError, match=r"a\.json:4 has no key 'text'; its keys are 'tekst'"):
        read(file)


def test_directories_are_sorted_and_say_what_they_leave_out(tmp_path: Path) -> None:
    used = {"b.txt": "b", "a/z.md": "z", "c.jsonl": '{"text": "c"}\n'}
    not_used = {"settings.json": '{\n "x": 1\n}', ".hidden.txt": "h", "empty.txt": ""}
    for name, content in {**used, **not_used}.items():
        write(tmp_path / name, content)
    write(tmp_path / "pixels.bin", b"\x89PNG\x00\x00")
    corpus = find_sources([str(tmp_path)])
    assert [Path(s.name).name for s in corpus.sources] == ["z.md", "b.txt", "c.jsonl"]
    assert [(Path(name).name, reason) for name, reason in corpus.left_out] == [
        ("empty.txt", "is empty"),
        ("pixels.bin", "is binary: byte 4 is NUL"),
        ("settings.json", "is JSON but not rows (neither JSON Lines of two or more rows nor one array)"),
    ]


def test_globs_are_sorted_and_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        write(tmp_path / name, name)
    assert read(tmp_path / "*.txt", tmp_path / "a.txt") == ["a.txt", "b.txt"]
    assert read(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "sub/c.txt"]
    assert find_sources([str(tmp_path / "*.txt"), str(tmp_path / "a.txt")]).left_out == ((str(tmp_path / "a.txt"), "is named twice"),)


@pytest.mark.parametrize(
    ("content", "name", "options", "message"),
    [
        ("", "a.txt", {}, r"a\.txt is empty"),
        (b"ab\0cd", "a.txt", {}, r"a\.txt is binary: byte 2 is NUL"),
        (b"ab\ncd\xff", "a.txt", {}, r"a\.txt is not UTF-8 text: byte 5 \(line 2\) is 0xff"),
        (b"x" * 100_000 + b"\xe9", "a.txt", {}, r"a\.txt is not UTF-8 text: byte 100000 \(line 1\) is 0xe9"),
        ("just text", "a.json", {}, r"a\.json is JSON but not rows"),
        ('{"text": "ok"}\n{"text": ', "a.jsonl", {}, r"a\.jsonl:2 is broken JSON \(Expecting value, column 10\)"),
        (b'{"text": "ok"}\n{"text": "' + b"x" * 70_000 + b'\xff"}', "a.jsonl", {}, r"a\.jsonl:2 is not UTF-8"),
        ("[" * 100_000, "a.jsonl", {}, r"a\.jsonl:1 is broken JSON \(nested too deeply\)"),
        ('{"text": "ok"}\n{"body": "x", "id": 1}', "a.jsonl", {}, r"a\.jsonl:2 has no key 'text'; its keys are 'body', 'id'"),
        ('{"text": {"body": "x"}}\n', "a.jsonl", {"text_key": "text.title"}, r"a\.jsonl:1 has no key 'text\.title'"),
        ('{"text": 3}\n', "a.jsonl", {}, r"a\.jsonl:1 holds a number under the key 'text', not a string"),
        ('{"text": null}\n', "a.jsonl", {}, r"a\.jsonl:1 holds null under the key 'text'"),
        ('"text"\n', "a.jsonl", {}, r"a\.jsonl:1 holds a string, not an object"),
        ('{"text": "\\ud800"}\n', "a.jsonl", {}, r"a\.jsonl:1 holds half of a surrogate pair"),
        ('[{"text": "ok"}, {"text" "x"}]', "a.json", {}, r"a\.json:1 is broken JSON"),
        ('[{"text": "ok"}', "a.json", {}, r"a\.json:1 is broken JSON"),
        (b'[{"text": "ok"}, {"text": "\xff"}]' + b" " * 70_000, "a.json", {}, r"a\.json is not UTF-8 text: byte 27"),
        (b'[{"text": "ok"},\n{"text": "' + b"x" * 70_000 + b'\xff"}]', "a.json", {}, r"a\.json is not UTF-8 text behind line 1 \(byte 0xff\)"),
        ("[" * 100_000, "a.json", {}, r"a\.json:1 is broken JSON"),
        ("text", "a.txt", {"dataset_type": "jsonl"}, r"a\.txt holds text, not JSON rows as --dataset_type jsonl wants"),
        ('{"text": "x"}\n', "a.jsonl", {"dataset_type": "text"}, r"a\.jsonl holds JSON rows, not text as --dataset_type text wants"),
        ("text", "a.txt", {"dataset_type": "sharded"}, r"a\.txt is not a token store"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_place(tmp_path: Path, content: str | bytes, name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / name, content), **options)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["corpsu"], r"corpsu in --data does not exist; did you mean corpus\?"),
        (["*.xyz"], r"\*\.xyz in --data matches no file"),
        (["hollow"], r"Nothing in the directory .*hollow can be used: it holds no files"),
        (["binaries"], r"Nothing in the directory .*binaries can be used: x\.bin is binary"),
        (["corpus", "store"], r"store is a token store, and a token store stands alone"),
    ],
)
def test_paths_that_cannot_be_used(tmp_path: Path, names: list[str], message: str) -> None:
    write(tmp_path / "corpus" / "a.txt", "a")
    write(tmp_path / "binaries" / "x.bin", b"\0")
    write(tmp_path / "store" / "manifest.json", "{}")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(UserError, match=message):
        find_sources([str(tmp_path / name) for name in names])


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "one"}\nbroken\n{"other": 1}\n{"text": "  "}\n{"text": "two"}\n')
    report = ReadReport()
    assert list(read_documents(find_sources([str(file)]).sources, report, on_bad_rows="skip")) == ["one", "two"]
    assert (report.documents, report.empty, report.bad_rows) == (2, 1, 2)
    assert report.bad_row_examples[0] == f"{file}:2 is broken JSON (Expecting value, column 1)."
    assert report.file_bytes == file.stat().st_size


def test_json_lines_are_streamed(tmp_path: Path) -> None:
    """A row is given out before the next one is looked at: the broken end of the file does not matter at its beginning."""
    file = write(tmp_path / "a.jsonl", '{"text": "one"}\n' * 100_000 + "broken")
    documents = read_documents([Source(str(file), "jsonl")], ReadReport())
    assert next(documents) == "one"


def test_the_corpora_of_the_shared_data(shared_data: Path) -> None:
    assert len(read(shared_data / "jsonl" / "gsm8k_train.jsonl", text_key="question")) == 7473
    assert len(read(shared_data / "jsonl" / "alpaca_en_demo.json", text_key="output")) == 999
    assert len(read(shared_data / "jsonl" / "udhr.jsonl")) == 266
    corpus = find_sources([str(shared_data / "gutenberg")])
    assert len(corpus.sources) + len(corpus.left_out) == 15
    assert all("UTF-8" in reason for _, reason in corpus.left_out)
