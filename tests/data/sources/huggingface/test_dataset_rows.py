"""Rows of files that pyarrow and datasets wrote."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from consyn_jax.data.sources.huggingface import arrow_tables
from consyn_jax.data.sources.huggingface.dataset_rows import (
    RowBatch,
    files,
    is_dataset,
    rows,
    size,
)
from consyn_jax.errors import UserError

UNREAD = "unread"
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def example(num_rows: int) -> pa.Table:
    return pa.table(
        {
            "text": pa.array(
                [f"text {i} é日" * (i % 7) for i in range(num_rows)], pa.large_string()
            ),
            "meta": [
                {"source": {"name": f"n{i}"}, "score": i / 2} if i % 5 else None
                for i in range(num_rows)
            ],
            "messages": pa.array(
                [
                    [{"role": "user", "content": f"q{i}-{j}"} for j in range(i % 4)]
                    for i in range(num_rows)
                ],
                MESSAGES,
            ),
            "id": range(num_rows),
        }
    )


def read(
    name: object, start: int = 0, columns: tuple[str, ...] = ("text", "meta.source", "messages")
) -> list[dict[str, Any]]:
    return [row for batch in rows(str(name), start, columns) for row in all_columns(batch)]


def all_columns(batch: RowBatch) -> list[dict[str, Any]]:
    """The rows of a batch, and in each the columns that they do not have."""
    assert not any(row.keys() & {*batch.unread} for row in batch.rows)
    return [row | dict.fromkeys(batch.unread, UNREAD) for row in batch.rows]


def named(table: pa.Table, *read: str) -> list[dict[str, Any]]:
    """The rows of a table of which some columns are read; with none of them, all are null."""
    columns = table.column_names
    other = UNREAD if {*columns} & {*read} else None
    return [{n: row[n] if n in read else other for n in columns} for row in table.to_pylist()]


def as_parquet(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path / "data.parquet", row_group_size=37)
    return path / "data.parquet"


def as_stream(path: Path, table: pa.Table) -> Path:
    with (
        pa.OSFile(str(path / "data.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=41)
    return path / "data.arrow"


def as_file(path: Path, table: pa.Table) -> Path:
    with (
        pa.OSFile(str(path / "data.arrow"), "wb") as sink,
        pa.ipc.new_file(
            sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")
        ) as writer,
    ):
        writer.write_table(table, max_chunksize=41)
    return path / "data.arrow"


def as_saved(path: Path, table: pa.Table) -> Path:
    datasets.Dataset(table).save_to_disk(path / "saved", num_shards=3)
    return path / "saved"


KINDS = {"parquet": as_parquet, "stream": as_stream, "file": as_file, "save_to_disk": as_saved}
every_kind = pytest.mark.parametrize("write", KINDS.values(), ids=KINDS)
Write = Callable[[Path, pa.Table], Path]


@every_kind
def test_rows_are_read_back_with_only_the_columns_that_are_needed(
    tmp_path: Path, write: Write
) -> None:
    table = example(300)
    path = write(tmp_path, table)
    assert is_dataset(path)
    assert read(path) == named(table, "text", "meta", "messages")
    assert read(path, columns=("id", "nothing")) == named(table, "id")


@every_kind
def test_reading_resumes_at_every_position(tmp_path: Path, write: Write) -> None:
    table = example(200)
    path, expected = write(tmp_path, table), named(table, "text")
    for start in range(203):
        assert read(path, start, ("text",)) == expected[start:]


@every_kind
def test_a_batch_says_how_far_reading_has_come(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path, example(1000))
    for start in (0, 123):
        batches = list(rows(str(path), start, ["text"]))
        position = start
        for batch in batches:
            position += len(batch.rows)
            assert batch.position == position
        bytes_done = [batch.bytes_done for batch in batches]
        assert bytes_done == sorted(bytes_done)
        # The footer of a stream or file follows the last batch.
        assert (
            0.6 * size(str(path))
            < bytes_done[-1]
            <= size(str(path))
            == sum(file.stat().st_size for file in files(path))
        )


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    group_sizes=st.lists(st.integers(0, 9), max_size=6),
    kind=st.sampled_from(["parquet", "stream", "file"]),
    batch_rows=st.integers(1, 5),
    batch_bytes=st.integers(1, 500),
    columns=st.sampled_from([("text",), ("messages", "id"), ("nothing",)]),
    data=st.data(),
)
def test_any_cut_into_groups_and_batches_gives_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory,
    group_sizes: list[int],
    kind: str,
    batch_rows: int,
    batch_bytes: int,
    columns: tuple[str, ...],
    data: st.DataObject,
) -> None:
    table = example(sum(group_sizes))
    path = tmp_path_factory.mktemp("cut") / ("a.parquet" if kind == "parquet" else "a.arrow")
    make = {"parquet": pq.ParquetWriter, "stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[kind]
    offset = 0
    with make(str(path), table.schema) as writer:
        for rows_in_group in group_sizes:
            writer.write_table(table.slice(offset, rows_in_group))
            offset += rows_in_group
    expected = named(table, *columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrow_tables, "BATCH_ROWS", batch_rows)
        patch.setattr(arrow_tables, "BATCH_BYTES", batch_bytes)
        batches = list(rows(str(path), 0, columns))
        assert [row for batch in batches for row in all_columns(batch)] == expected
        assert all(1 <= len(batch.rows) <= batch_rows for batch in batches)
        cut = data.draw(st.integers(0, len(batches)))
        position = batches[cut - 1].position if cut else 0
        assert read(path, position, columns) == expected[position:]


def test_long_rows_come_in_small_batches(tmp_path: Path) -> None:
    table = pa.table({"text": ["x" * (1 << 20)] * 20 + ["y"] * 500})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    batches = list(rows(str(path), 0, ["text"]))
    assert (
        max(sum(len(row["text"]) for row in batch.rows) for batch in batches)
        <= arrow_tables.BATCH_BYTES
    )
    assert max(len(batch.rows) for batch in batches) > arrow_tables.BATCH_ROWS // 2
    assert read(path) == table.to_pylist()


@every_kind
def test_rows_without_a_needed_column_have_all_names(tmp_path: Path, write: Write) -> None:
    assert (
        read(write(tmp_path, example(50)), 10, ("tekst",))
        == [{"text": None, "meta": None, "messages": None, "id": None}] * 40
    )


def test_columns_with_dots_in_their_names_are_read_too(tmp_path: Path) -> None:
    table = pa.table({"a.b": ["one"], "a": [{"b": "two"}], "c": [1]})
    assert read(as_parquet(tmp_path, table), columns=("a.b",)) == [
        {"a.b": "one", "a": {"b": "two"}, "c": UNREAD}
    ]


def test_json_in_columns_is_decoded_as_datasets_does_it(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "messages": datasets.List(
                {"role": datasets.Value("string"), "arguments": datasets.Json()}
            ),
            "any": datasets.Json(),
        }
    )
    content = {
        "messages": [
            [{"role": "tool", "arguments": {"x": [1, "é"]}}, {"role": "user", "arguments": None}],
            [],
            None,
        ],
        "any": [{"a": 1}, [2], None],
    }
    dataset = datasets.Dataset.from_dict(content, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "a.parquet")
    for path in (tmp_path / "saved", tmp_path / "a.parquet"):
        assert read(path, columns=("messages", "any")) == dataset.to_list()
        assert read(path, columns=("any",))[0] == {"any": {"a": 1}, "messages": UNREAD}


def test_images_are_not_decoded(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"no image", "path": None}], "text": ["a"]}
    )
    dataset.cast(
        datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    ).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved", columns=("image",)) == [
        {"image": {"bytes": b"no image", "path": None}, "text": UNREAD}
    ]


# ------------------------------------------------------------------------------------- save_to_disk


def test_saved_datasets_keep_the_order_they_were_saved_in(tmp_path: Path) -> None:
    dataset = datasets.Dataset(example(200)).shuffle(seed=1).select(range(150, 20, -1))
    dataset.save_to_disk(tmp_path / "saved", num_shards=4)
    assert [row["id"] for row in read(tmp_path / "saved", columns=("id",))] == dataset["id"][:]
    assert [file.name for file in files(tmp_path / "saved")] == [
        f"data-0000{i}-of-00004.arrow" for i in range(4)
    ]


def test_dataset_dicts_have_splits(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    ).save_to_disk(saved)
    assert is_dataset(saved)
    assert is_dataset(Path(f"{saved}:test"))
    assert not is_dataset(Path(f"{saved}x:test"))
    assert read(saved) == [{"text": "train"}]
    assert read(f"{saved}:test") == [{"text": "test"}]
    assert files(Path(f"{saved}:test")) == (saved / "test" / "data-00000-of-00001.arrow",)
    with pytest.raises(
        UserError,
        match=r"saved has no split 'tests'; it has train, test; did you mean test\? "
        r"Choose one with .*saved:SPLIT\.",
    ):
        read(f"{saved}:tests")
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["x"]})}).save_to_disk(
        tmp_path / "no_train"
    )
    with pytest.raises(UserError, match=r"no_train has no split 'train'; it has test\. Choose"):
        files(tmp_path / "no_train")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", r"state\.json is missing or was not written by save_to_disk"),
        ("[]", r"state\.json was not written by save_to_disk"),
        ("{}", r"state\.json is missing or was not written by save_to_disk \('_data_files'\)"),
        (
            '{"_data_files": [{"filename": "../../secret.arrow"}]}',
            r"state\.json names files outside its directory",
        ),
        ('{"_data_files": [{}]}', r"state\.json names files outside its directory"),
        (
            '{"_data_files": [{"filename": "none.arrow"}]}',
            r"none\.arrow cannot be read: .*No such file",
        ),
        (
            '{"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}',
            "was saved by an old version of datasets",
        ),
    ],
)
def test_broken_saved_datasets(tmp_path: Path, state: str, message: str) -> None:
    (tmp_path / "state.json").write_text(state)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        read(tmp_path)


# -------------------------------------------------------------------------------------------- files


def test_other_files_are_not_recognised(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "dir.parquet").mkdir()
    assert not any(
        is_dataset(path)
        for path in (
            tmp_path,
            tmp_path / "a.txt",
            tmp_path / "dir.parquet",
            tmp_path / "missing.parquet",
        )
    )
    with pytest.raises(
        UserError, match=r"a\.txt is neither a Parquet file, an Arrow file nor a dataset"
    ):
        files(tmp_path / "a.txt")
    with pytest.raises(
        UserError, match=r"a\.txt is neither a file nor the name of a Hugging Face Hub"
    ):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_a_truncated_file_is_noticed_wherever_it_ends(tmp_path: Path, kind: str) -> None:
    path = KINDS[kind](tmp_path, example(4).select(["text", "messages"]))
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(
            UserError,
            match=r"data\.(parquet|arrow) is damaged or cut short: .*"
            r"Download or write the file again\.",
        ):
            read(path)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_damage_is_an_error_or_other_values_but_never_a_crash(tmp_path: Path, kind: str) -> None:
    path = KINDS[kind](tmp_path, example(4).select(["text", "messages"]))
    content = path.read_bytes()
    errors = 0
    for place in range(len(content)):
        for bits in (0x01, 0x80, 0xFF):
            path.write_bytes(
                content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :]
            )
            try:
                read(path)
            except UserError:
                errors += 1
    assert errors > len(content)


def test_invalid_text_is_named(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    table = pa.table({"text": pa.concat_arrays([pa.array(["good"]), broken])})
    with pytest.raises(UserError, match=r"data\.arrow is damaged or cut short: .*[Ii]nvalid UTF8"):
        read(as_stream(tmp_path, table))
    with pytest.raises(
        UserError,
        match=r"Row 0 of .*data\.parquet, or one of the 1 after it, cannot be read: 'utf-8' codec",
    ):
        read(as_parquet(tmp_path, table))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    with pytest.raises(UserError, match=r"data\.parquet has several columns named 'text'"):
        read(as_parquet(tmp_path, table))


MEASURE = """
import sys
from consyn_jax.data.sources.huggingface.dataset_rows import rows
import pyarrow.parquet, pyarrow as pa
def anonymous():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10
before, most, count = anonymous(), 0, 0
for batch in rows(sys.argv[1], int(sys.argv[2]), ["text"]):
    count += sum(len(row["text"]) for row in batch.rows)
    most = max(most, anonymous())
print(count, most - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory is measured as Linux counts it"
)
@pytest.mark.parametrize("kind", ["parquet", "one_group", "stream"])
def test_memory_holds_only_a_batch(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.arrow" if kind == "stream" else "a.parquet")
    block = pa.table(
        {"text": [os.urandom(5000).hex() for _ in range(500)], "other": [b"\0" * 1000] * 500}
    )  # 5.5 MB
    num_blocks = 40
    if kind == "one_group":
        pq.write_table(
            pa.concat_tables([block] * num_blocks), path, compression="none", use_dictionary=False
        )
        assert pq.read_metadata(path).num_row_groups == 1
    else:
        with (
            pa.ipc.new_stream(str(path), block.schema)
            if kind == "stream"
            else pq.ParquetWriter(path, block.schema, compression="none") as writer
        ):
            for _ in range(num_blocks):
                writer.write_table(block)
    assert path.stat().st_size > 180 << 20
    for start in (0, 19_000):
        answer = subprocess.run(
            [sys.executable, "-c", MEASURE, path, str(start)],
            capture_output=True,
            text=True,
            check=True,
        )
        count, grown = map(int, answer.stdout.split())
        assert count == (500 * num_blocks - start) * 10_000
        assert grown < 100 << 20, f"{grown >> 20} MiB"
