"""Every reader gives the exact documents, from every position where reading can resume."""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consyn_jax.data.preparation.workers import worker as worker_module
from consyn_jax.data.preparation.workers.worker import Result, Worker
from consyn_jax.data.sources import byte_stream, chunking, json_reader, reader, text_reader
from consyn_jax.data.sources.byte_stream import ByteStream
from consyn_jax.data.sources.huggingface import dataset_rows
from consyn_jax.data.sources.reader import START, Block, Position, Reading
from consyn_jax.data.sources.sample_reader import sample_texts
from consyn_jax.data.sources.source import Source
from consyn_jax.data.split import cut, joined_digest
from consyn_jax.errors import UserError
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.tokenization import BPETokenizer

BYTES = BPETokenizer.bytes()
EOS = BYTES.eos_token_id
texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \nab"), max_size=60)


@pytest.fixture(autouse=True)
def small_blocks() -> Iterator[None]:
    """Make many blocks and parts of a few hundred bytes."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, 64)
        yield


def shrink(patch: pytest.MonkeyPatch, block: int) -> None:
    patch.setattr(chunking, "PART_BYTES", block)
    for module in (chunking, text_reader, worker_module):
        patch.setattr(module, "LIMIT", block + block // 2)
    for module in (text_reader, json_reader, reader):
        patch.setattr(module, "BLOCK_BYTES", block)
    for module in (text_reader, json_reader, byte_stream):
        patch.setattr(module, "CHUNK_BYTES", 16)


def read(
    source: Source, options: CorpusOptions, start: Position = START, single: bool = False
) -> list[Block]:
    return list(source.blocks(start, Reading(options, BYTES, single)))


def documents(
    found: Sequence[Block], options: CorpusOptions, single: bool = False
) -> list[tuple[int, str, bytes, str]]:
    """(number, text, digest, split) of every document."""
    worker = Worker(options, BYTES, single=single)
    made: list[tuple[int, str, bytes, str]] = []
    ids: list[int] = []
    digests: list[bytes] = []
    for block in found:
        result: Result = worker.work(block)
        assert not result.fault
        kept = result.kept
        ends = np.cumsum(kept.lengths).tolist()
        for number, end, length, digest, split in zip(
            kept.numbers.tolist(),
            ends,
            kept.lengths.tolist(),
            kept.digests,
            kept.splits.tolist(),
            strict=True,
        ):
            part = kept.ids[end - length : end]
            if block.begins:
                ids, digests, first_split = [], [], worker_module.SPLITS[split]
            ids += part.tolist()
            digests.append(digest.tobytes())
            if block.last:
                assert ids.pop() == EOS
                made.append((number, bytes(ids).decode(), joined_digest(digests), first_split))
    return made


def check(source: Source, options: CorpusOptions, expected: Sequence[tuple[int, str]]) -> None:
    """Check that all documents are read, and the remaining ones from the end of every block."""
    found = read(source, options)
    everything = documents(found, options)
    assert [(number, text) for number, text, _, _ in everything] == [
        (number, text) for number, text in expected if text.strip()
    ]
    for at, block in enumerate(found):
        if block.end is not None:
            assert (
                documents([*found[: at + 1], *read(source, options, block.end)], options)
                == everything
            )
    if found:
        assert found[-1].end is not None


PLAIN = CorpusOptions(normalize="none", control_characters="keep")
counter = iter(range(1 << 30))


def written(directory: Path, name: str, data: bytes, compression: str = "") -> Source:
    """A file with `data` in a new directory."""
    place = directory / f"{next(counter)}"
    place.mkdir()
    if compression == "gz":
        half = len(data) // 2
        path, data = (
            place / f"{name}.gz",
            gzip.compress(data[:half]) + gzip.compress(data[half:]),
        )  # of two members
    elif compression == "zst":
        half = len(data) // 2
        frames = [
            pyarrow.compress(part, "zstd", asbytes=True) for part in (data[:half], data[half:])
        ]
        path, data = place / f"{name}.zst", b"".join(frames)
    else:
        path = place / name
    path.write_bytes(data)
    return Source(str(path), "jsonl" if ".json" in name else "text")


compressions = st.sampled_from(["", "gz", "zst"])


@given(
    text=st.lists(texts).map("".join).filter(lambda text: not text.startswith("\ufeff")),
    compression=compressions,
)
def test_a_file_is_one_document(
    tmp_path_factory: pytest.TempPathFactory, text: str, compression: str
) -> None:
    source = written(tmp_path_factory.getbasetemp(), "a.txt", text.encode(), compression)
    check(source, PLAIN, [(1, text)])


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    check(written(tmp_path, "a.txt", b"\xef\xbb\xbf" + b"word " * 100), PLAIN, [(1, "word " * 100)])
    check(
        written(tmp_path, "b.txt", b"\xef\xbb\xbfone|two", "gz"),
        CorpusOptions(document_separator="|"),
        [(1, "one"), (2, "two")],
    )
    check(
        written(tmp_path, "c.jsonl", b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n'),
        PLAIN,
        [(1, "one"), (2, "two")],
    )


@pytest.mark.slow
@given(
    pieces=st.lists(
        st.text(st.sampled_from("a-\né"), max_size=12) | st.text("ab\n", min_size=60, max_size=300),
        max_size=30,
    ),
    separator=st.sampled_from(["\n\n", "---", "-", "\n-\n", "<|end|>"]),
    compression=compressions,
    block=st.sampled_from([8, 64, 200]),
)
def test_documents_between_separators(
    tmp_path_factory: pytest.TempPathFactory,
    pieces: list[str],
    separator: str,
    compression: str,
    block: int,
) -> None:
    text = separator.join(pieces)
    expected = text.split(separator)
    source = written(tmp_path_factory.getbasetemp(), "a.txt", text.encode(), compression)
    options = CorpusOptions(normalize="none", document_separator=separator.replace("\n", "\\n"))
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, block)
        # The worker drops blank documents, but not blank parts of long documents.
        check(source, options, list(enumerate(expected, 1)))


@given(
    rows=st.lists(texts, max_size=30),
    ends=st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]),
    closed=st.booleans(),
    ascii_only=st.booleans(),
    compression=compressions,
)
def test_json_lines(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[str],
    ends: str,
    closed: bool,
    ascii_only: bool,
    compression: str,
) -> None:
    lines = [json.dumps({"text": row}, ensure_ascii=ascii_only) for row in rows]
    data = ends.join(lines) + (ends if closed else "")
    step = ends.count("\n")
    source = written(tmp_path_factory.getbasetemp(), "a.jsonl", data.encode(), compression)
    check(source, PLAIN, [(1 + at * step, row) for at, row in enumerate(rows)])


@pytest.mark.slow
@pytest.mark.exhaustive
@given(
    rows=st.lists(texts, max_size=30),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    compression=compressions,
)
def test_json_arrays(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[str],
    indent: int | None,
    ascii_only: bool,
    compression: str,
) -> None:
    data = json.dumps(
        [{"text": row, "n": at} for at, row in enumerate(rows)],
        indent=indent,
        ensure_ascii=ascii_only,
    )
    source = written(tmp_path_factory.getbasetemp(), "a.json", data.encode(), compression)
    lines = [2 + at * 4 if indent is not None else 1 for at in range(len(rows))]
    check(source, PLAIN, list(zip(lines, rows, strict=True)))


def test_invalid_utf8_in_an_array_concerns_only_its_row(tmp_path: Path) -> None:
    data = b'[{"text": "one"},\n {"text": "t\xffo"},\n {"text": "three"}]'
    source = written(tmp_path, "a.json", data)
    found = read(source, PLAIN)
    assert "a.json:2 is not UTF-8 (byte 11 of the row" in Worker(PLAIN, BYTES).work(found[0]).fault
    result = Worker(CorpusOptions(on_bad_rows="skip"), BYTES).work(found[0])
    assert [place.rpartition(":")[2] for _, place, _ in result.dropped] == ["2"]
    result = Worker(CorpusOptions(invalid_utf8="replace"), BYTES).work(found[0])
    assert result.changed == {"invalid_utf8": 1}
    assert len(result.kept.numbers) == 3


@pytest.mark.parametrize("rest", ["x", "\n\n[]", "   {}", "]", "\0"])
def test_anything_after_an_array_is_refused(tmp_path: Path, rest: str) -> None:
    for spaces in ("", " " * 500):
        with pytest.raises(
            UserError, match=r"a\.json: the array of rows ends in line 1, and more text follows it"
        ):
            read(written(tmp_path, "a.json", f'[{{"text": "one"}}]{spaces}{rest}'.encode()), PLAIN)
    assert len(read(written(tmp_path, "a.json", b'[{"text": "one"}]' + b" \n" * 500), PLAIN)) == 1


def test_rows_of_parquet(tmp_path: Path) -> None:
    rows = [f"row {at} " * (at % 7) for at in range(300)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path, row_group_size=50)
    assert dataset_rows.is_dataset(path)
    check(Source(str(path), "huggingface"), PLAIN, list(enumerate(rows, 1)))


def test_columns_that_are_not_read_are_known_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"body": ["a", "b"], "label": [0, 1], "text": ["c", None], "input_ids": [[1], [2]]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    (block,) = read(Source(str(path), "huggingface"), PLAIN)
    assert [json.loads(row) for row in block.data.splitlines()] == [
        {"label": 0, "text": "c"},
        {"label": 1, "text": None},
    ]
    result = Worker(CorpusOptions(on_bad_rows="skip"), BYTES).work(block)
    assert result.unread == {"label": 1, "body": 1, "input_ids": 1}
    del columns["text"]
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    (block,) = read(Source(str(path), "huggingface"), PLAIN)
    fault = Worker(PLAIN, BYTES).work(block).fault
    assert "holds token ids" in fault
    assert "its keys are 'body', 'input_ids', 'label'" in fault


def test_binary_columns_hold_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table(
            {"text": pyarrow.array(["é\n".encode(), b"two", b"t\xffo"], pyarrow.binary())}
        ),
        path,
    )
    found = read(Source(str(path), "huggingface"), PLAIN)
    assert "a.parquet:3" in Worker(PLAIN, BYTES).work(found[-1]).fault
    assert "--invalid_utf8 replace" in Worker(PLAIN, BYTES).work(found[-1]).fault
    assert [text for _, text, _, _ in documents(found, CorpusOptions(on_bad_rows="skip"))] == [
        "é\n",
        "two",
    ]
    assert [text for _, text, _, _ in documents(found, CorpusOptions(invalid_utf8="replace"))] == [
        "é\n",
        "two",
        "t\ufffdo",
    ]


def test_the_sample() -> None:
    found = documents(read(Source("sample", "sample"), PLAIN), PLAIN)
    assert [(number, text) for number, text, _, _ in found] == list(enumerate(sample_texts(), 1))
    assert read(Source("sample", "sample"), PLAIN, (0, len(sample_texts()) - 1))[-1].first == len(
        sample_texts()
    )


@given(
    text=st.lists(texts).map(lambda found: "t" + "".join(found)),
    rules=st.sampled_from([PLAIN, CorpusOptions()]),
)
def test_equal_documents_have_equal_digests_in_every_format(
    tmp_path_factory: pytest.TempPathFactory, text: str, rules: CorpusOptions
) -> None:
    place = tmp_path_factory.getbasetemp()
    with_separator = CorpusOptions(**{**vars(rules), "document_separator": "<|>"})
    ways = [
        (written(place, "a.txt", text.encode()), rules),
        (written(place, "a.txt", f"before<|>{text}<|>after".encode()), with_separator),
        (written(place, "a.txt", f"{text}".encode(), "gz"), with_separator),
        (written(place, "a.jsonl", (json.dumps({"text": text}) + "\n").encode()), rules),
        (written(place, "a.json", json.dumps([{"text": text}]).encode(), "zst"), rules),
    ]
    found: list[Any] = []
    for source, options in ways:
        everything = documents(read(source, options), options)
        found.append(everything[1][1:] if len(everything) > 1 else everything[0][1:])
    assert all(other == found[0] for other in found), found


@given(
    text=st.lists(texts).map(lambda found: "t" + "".join(found)),
    fraction=st.sampled_from([0.01, 0.1, 0.5, 0.9, 0.0]),
    compression=compressions,
)
def test_a_single_document_is_split_by_position(
    tmp_path_factory: pytest.TempPathFactory, text: str, fraction: float, compression: str
) -> None:
    place = tmp_path_factory.getbasetemp()
    at = cut(text.encode(), fraction)
    expected = [
        (split, part.decode())
        for split, part in (("train", text.encode()[:at]), ("validation", text.encode()[at:]))
        if part
    ]
    options = CorpusOptions(
        normalize="none", control_characters="keep", validation_fraction=fraction
    )
    source = written(place, "a.txt", text.encode(), compression)
    found = documents(read(source, options, single=True), options, single=True)
    assert [(split, part) for _, part, _, split in found] == [
        part for part in expected if part[1].strip()
    ]
    if fraction:
        row = documents(
            read(written(place, "a.jsonl", json.dumps({"text": text}).encode()), options),
            options,
            single=True,
        )
        assert [found[1:] for found in row] == [part[1:] for part in found]


@given(data=st.binary(max_size=400), skip=st.integers(0, 450), compression=compressions)
def test_a_stream_can_skip_to_any_byte(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, skip: int, compression: str
) -> None:
    path = Path(written(tmp_path_factory.getbasetemp(), "a.txt", b"text" + data, compression).name)
    with ByteStream(path) as stream:
        stream.skip(skip)
        assert stream.read(10_000) == (b"text" + data)[skip:]
        assert stream.file_bytes == path.stat().st_size or not compression


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_a_truncated_compressed_file_is_noticed_wherever_it_ends(
    tmp_path: Path, compression: str
) -> None:
    whole = Path(written(tmp_path, "a.txt", bytes(range(256)) * 4, compression).name)
    data, middle = whole.read_bytes(), 0
    expected = bytes(range(256)) * 4
    for length in range(4, len(data)):
        path = tmp_path / "cut"
        path.write_bytes(data[:length])
        try:
            with ByteStream(path) as stream:
                found = stream.read(10_000)
        except UserError as fault:
            assert str(fault).startswith(f"{path} is cut off or damaged (")  # noqa: PT017
            continue
        middle += 1
        assert found == expected[:512]  # a whole member is a whole file
    assert middle <= 1


def test_a_row_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_reader, "LONGEST_ROW", 1000)
    with pytest.raises(UserError, match=r"a\.jsonl:2 is a line of more than"):
        read(written(tmp_path, "a.jsonl", b'{"text": "one"}\n{"text": "' + b"a" * 5000), PLAIN)
    with pytest.raises(UserError, match=r"a\.json:2 is broken JSON \(no row ends within"):
        read(written(tmp_path, "a.json", b'[{"text": "one"},\n{"text": "' + b"a" * 5000), PLAIN)
