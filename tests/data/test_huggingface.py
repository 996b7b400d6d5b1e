"""Files are made with pyarrow and datasets. The Hub is a server on this machine that answers as it does, asked from another process."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from consyn_jax.config import UserError
from consyn_jax.data import arrow_tables
from consyn_jax.data.hub import HubName, parse_hub_name
from consyn_jax.data.huggingface import files, look, rows, size

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


@pytest.fixture(autouse=True)
def silent_datasets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def example(num_rows: int) -> pa.Table:
    return pa.table(
        {
            "text": pa.array([f"text {i} é日" * (i % 7) for i in range(num_rows)], pa.large_string()),
            "meta": [{"source": {"name": f"n{i}"}, "score": i / 2} if i % 5 else None for i in range(num_rows)],
            "messages": pa.array([[{"role": "user", "content": f"q{i}-{j}"} for j in range(i % 4)] for i in range(num_rows)], MESSAGES),
            "id": range(num_rows),
        }
    )


def read(name: object, start: int = 0, columns: tuple[str, ...] = ("text", "meta.source", "messages")) -> list[dict[str, Any]]:
    return [row for batch in rows(str(name), start, columns) for row in batch.rows]


def as_parquet(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path / "data.parquet", row_group_size=37)
    return path / "data.parquet"


def as_stream(path: Path, table: pa.Table) -> Path:
    with pa.OSFile(str(path / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=41)
    return path / "data.arrow"


def as_file(path: Path, table: pa.Table) -> Path:
    with pa.OSFile(str(path / "data.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table, max_chunksize=41)
    return path / "data.arrow"


def as_saved(path: Path, table: pa.Table) -> Path:
    datasets.Dataset(table).save_to_disk(path / "saved", num_shards=3)
    return path / "saved"


KINDS = {"parquet": as_parquet, "stream": as_stream, "file": as_file, "save_to_disk": as_saved}
every_kind = pytest.mark.parametrize("write", KINDS.values(), ids=KINDS)
Write = Callable[[Path, pa.Table], Path]


@every_kind
def test_rows_come_out_as_they_went_in_and_only_the_columns_that_are_needed(tmp_path: Path, write: Write) -> None:
    table = example(300)
    path = write(tmp_path, table)
    assert look(path)
    assert read(path) == table.drop_columns(["id"]).to_pylist()
    assert read(path, columns=("id", "nothing")) == table.select(["id"]).to_pylist()


@every_kind
def test_reading_goes_on_at_every_position(tmp_path: Path, write: Write) -> None:
    table = example(200)
    path, expected = write(tmp_path, table), table.select(["text"]).to_pylist()
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
        # The footer of a stream or file is behind the last batch.
        assert 0.6 * size(str(path)) < bytes_done[-1] <= size(str(path)) == sum(file.stat().st_size for file in files(path))


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
    expected = [dict.fromkeys(table.column_names)] * len(table) if columns == ("nothing",) else table.select(
        [name for name in table.column_names if name in columns]
    ).to_pylist()  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrow_tables, "BATCH_ROWS", batch_rows)
        patch.setattr(arrow_tables, "BATCH_BYTES", batch_bytes)
        batches = list(rows(str(path), 0, columns))
        assert [row for batch in batches for row in batch.rows] == expected
        assert all(1 <= len(batch.rows) <= batch_rows for batch in batches)
        cut = data.draw(st.integers(0, len(batches)))
        position = batches[cut - 1].position if cut else 0
        assert read(path, position, columns) == expected[position:]


def test_long_rows_come_in_small_batches(tmp_path: Path) -> None:
    table = pa.table({"text": ["x" * (1 << 20)] * 20 + ["y"] * 500})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    batches = list(rows(str(path), 0, ["text"]))
    assert max(sum(len(row["text"]) for row in batch.rows) for batch in batches) <= arrow_tables.BATCH_BYTES
    assert max(len(batch.rows) for batch in batches) > arrow_tables.BATCH_ROWS // 2
    assert read(path) == table.to_pylist()


@every_kind
def test_where_no_column_fits_the_rows_have_all_names(tmp_path: Path, write: Write) -> None:
    assert read(write(tmp_path, example(50)), 10, ("tekst",)) == [{"text": None, "meta": None, "messages": None, "id": None}] * 40


def test_columns_with_dots_in_their_names_are_read_too(tmp_path: Path) -> None:
    table = pa.table({"a.b": ["one"], "a": [{"b": "two"}], "c": [1]})
    assert read(as_parquet(tmp_path, table), columns=("a.b",)) == [{"a.b": "one", "a": {"b": "two"}}]


def test_json_in_columns_is_decoded_as_datasets_does_it(tmp_path: Path) -> None:
    features = datasets.Features({"messages": datasets.List({"role": datasets.Value("string"), "arguments": datasets.Json()}), "any": datasets.Json()})
    content = {"messages": [[{"role": "tool", "arguments": {"x": [1, "é"]}}, {"role": "user", "arguments": None}], [], None], "any": [{"a": 1}, [2], None]}
    dataset = datasets.Dataset.from_dict(content, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "a.parquet")
    for path in (tmp_path / "saved", tmp_path / "a.parquet"):
        assert read(path, columns=("messages", "any")) == dataset.to_list()
        assert read(path, columns=("any",))[0] == {"any": {"a": 1}}


def test_images_are_not_decoded(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"image": [{"bytes": b"no image", "path": None}], "text": ["a"]})
    dataset.cast(datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved", columns=("image",)) == [{"image": {"bytes": b"no image", "path": None}}]


# ------------------------------------------------------------------------------------------------------------------ save_to_disk


def test_saved_datasets_keep_the_order_they_were_saved_in(tmp_path: Path) -> None:
    dataset = datasets.Dataset(example(200)).shuffle(seed=1).select(range(150, 20, -1))
    dataset.save_to_disk(tmp_path / "saved", num_shards=4)
    assert [row["id"] for row in read(tmp_path / "saved", columns=("id",))] == dataset["id"][:]
    assert [file.name for file in files(tmp_path / "saved")] == [f"data-0000{i}-of-00004.arrow" for i in range(4)]


def test_dataset_dicts_have_splits(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}).save_to_disk(saved)
    assert look(saved)
    assert look(Path(f"{saved}:test"))
    assert not look(Path(f"{saved}x:test"))
    assert read(saved) == [{"text": "train"}]
    assert read(f"{saved}:test") == [{"text": "test"}]
    assert files(Path(f"{saved}:test")) == (saved / "test" / "data-00000-of-00001.arrow",)
    with pytest.raises(UserError, match=r"saved has no split 'tests'; it has train, test; did you mean test\? Choose one with .*saved:SPLIT\."):
        read(f"{saved}:tests")
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["x"]})}).save_to_disk(tmp_path / "no_train")
    with pytest.raises(UserError, match=r"no_train has no split 'train'; it has test\. Choose"):
        files(tmp_path / "no_train")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", r"state\.json is missing or not what save_to_disk writes"),
        ("[]", r"state\.json is not what save_to_disk writes"),
        ("{}", r"state\.json is missing or not what save_to_disk writes \('_data_files'\)"),
        ('{"_data_files": [{"filename": "../../secret.arrow"}]}', r"state\.json names files outside its directory"),
        ('{"_data_files": [{}]}', r"state\.json names files outside its directory"),
        ('{"_data_files": [{"filename": "none.arrow"}]}', r"none\.arrow cannot be read: .*No such file"),
        ('{"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}', "was saved by an old version of datasets"),
    ],
)
def test_broken_saved_datasets(tmp_path: Path, state: str, message: str) -> None:
    (tmp_path / "state.json").write_text(state)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        read(tmp_path)


# ------------------------------------------------------------------------------------------------------------------------- files


def test_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "dir.parquet").mkdir()
    assert not any(look(path) for path in (tmp_path, tmp_path / "a.txt", tmp_path / "dir.parquet", tmp_path / "missing.parquet"))
    with pytest.raises(UserError, match=r"a\.txt is neither a Parquet file, an Arrow file nor a dataset"):
        files(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"a\.txt is neither a file nor the name of a dataset"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_every_cut_of_a_file_is_noticed(tmp_path: Path, kind: str) -> None:
    path = KINDS[kind](tmp_path, example(20))
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"data\.(parquet|arrow) is damaged or cut short: .*Fetch or write the file again\."):
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
            path.write_bytes(content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :])
            try:
                read(path)
            except UserError:
                errors += 1
    assert errors > len(content)


def test_text_that_is_none_is_named(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    table = pa.table({"text": pa.concat_arrays([pa.array(["good"]), broken])})
    with pytest.raises(UserError, match=r"data\.arrow is damaged or cut short: .*[Ii]nvalid UTF8"):
        read(as_stream(tmp_path, table))
    with pytest.raises(UserError, match=r"Row 0 of .*data\.parquet, or one of the 1 behind it, cannot be read: 'utf-8' codec"):
        read(as_parquet(tmp_path, table))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    with pytest.raises(UserError, match=r"data\.parquet has more than one column 'text'"):
        read(as_parquet(tmp_path, table))


MEASURE = """
import sys
from consyn_jax.data.huggingface import rows
import pyarrow.parquet, pyarrow as pa
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) << 10
before, most, count = anonymous(), 0, 0
for batch in rows(sys.argv[1], int(sys.argv[2]), ["text"]):
    count += sum(len(row["text"]) for row in batch.rows)
    most = max(most, anonymous())
print(count, most - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux counts it")
@pytest.mark.parametrize("kind", ["parquet", "one_group", "stream"])
def test_memory_holds_a_batch_and_not_the_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.arrow" if kind == "stream" else "a.parquet")
    block = pa.table({"text": [os.urandom(5000).hex() for _ in range(500)], "other": [b"\0" * 1000] * 500})  # 5.5 MB
    num_blocks = 40
    if kind == "one_group":
        pq.write_table(pa.concat_tables([block] * num_blocks), path, compression="none", use_dictionary=False)
        assert pq.read_metadata(path).num_row_groups == 1
    else:
        with pa.ipc.new_stream(str(path), block.schema) if kind == "stream" else pq.ParquetWriter(path, block.schema, compression="none") as writer:
            for _ in range(num_blocks):
                writer.write_table(block)
    assert path.stat().st_size > 180 << 20
    for start in (0, 19_000):
        answer = subprocess.run([sys.executable, "-c", MEASURE, path, str(start)], capture_output=True, text=True, check=True)
        count, grown = map(int, answer.stdout.split())
        assert count == (500 * num_blocks - start) * 10_000
        assert grown < 100 << 20, f"{grown >> 20} MiB"


# ------------------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("wikitext", HubName("wikitext")),
        ("allenai/c4:en", HubName("allenai/c4", config="en")),
        ("allenai/c4:en:validation", HubName("allenai/c4", config="en", split="validation")),
        ("a/b::test", HubName("a/b", split="test")),
        ("a/b@v1.0:20231101.en", HubName("a/b", "v1.0", "20231101.en")),
        ("a/b.c_d-e@refs/pr/3", HubName("a/b.c_d-e", "refs/pr/3")),
    ],
)
def test_names_of_the_hub(spec: str, name: HubName) -> None:
    assert parse_hub_name(spec) == name
    assert parse_hub_name(str(name)) == name


@pytest.mark.parametrize(
    "spec",
    ["", "/a/b", "./a", "../a", "a/", "a/b/c", "a b", "a--b/c", "a..b", "-a/b", "a/b.", "a.git", "a/*", "é/b", "x" * 97, "~/a", "C:\\data",
     "a/b@", "a/b@x y", "a/b@../x", "a/b:", "a/b:c:", "a/b:c:d:e", "a/b:c/d", "a/b:c:train[:5]", "hf://datasets/a/b"],
)  # fmt: skip
def test_what_no_dataset_is_called(spec: str) -> None:
    assert parse_hub_name(spec) is None


@given(st.text("ab/@:.-_1", max_size=12))
def test_names_are_understood_the_same_when_written_out(spec: str) -> None:
    name = parse_hub_name(spec)
    assert name is None or parse_hub_name(str(name)) == name


# --------------------------------------------------------------------------------------------------------------------- the Hub

ASK = """
import json, sys
from consyn_jax.config import UserError
from consyn_jax.data import hub, huggingface
answers = []
for verb, *arguments in json.load(sys.stdin):
    try:
        answer = getattr(hub if verb == "identity" else huggingface, verb)(*arguments)
        if verb == "rows":
            batches = list(answer)
            answer = [[row for batch in batches for row in batch.rows], batches[-1].position if batches else arguments[1]]
    except UserError as error:
        answer = f"UserError: {error}"
    answers.append(answer)
print(json.dumps(answers))
"""
COMMITS = {"main": "a" * 40, "old": "b" * 40}
README = b"""---
configs:
- config_name: default
  data_files: [{split: train, path: default/train*}, {split: test, path: default/test.parquet}]
- config_name: small
  data_files: small.parquet
---
"""


def parquet(start: int, stop: int) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(example(stop).slice(start), sink, row_group_size=100)
    return sink.getvalue().to_pybytes()


def hub_content() -> dict[str, dict[str, bytes]]:
    """What the server has, by repository."""
    several = {f"default/train-{i}.parquet": parquet(300 * i, 300 * i + 300) for i in range(3)}
    several["default/test.parquet"] = parquet(0, 5)
    return {
        "owner/Several": {"README.md": README, "small.parquet": parquet(3, 5), **several},
        "owner/choice": {
            "README.md": README.replace(b"config_name: default", b"config_name: large"),
            **several,
            "small.parquet": parquet(3, 5),
        },
        "owner/plain": {"data.jsonl": b'{"text": "one", "n": 1}\n{"text": "two", "n": 2}\n'},
        "owner/script": {"README.md": b"", "script.py": b"raise SystemExit('was run')"},
        "owner/torn": {"README.md": b"", "train.parquet": parquet(0, 50)[:-100]},
        "owner/empty": {"README.md": b""},
    }


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as `datasets` uses to read. Both commits have the same content."""

    content = hub_content()
    requests: list[str] = []  # noqa: RUF012 (of the one server that there is)

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        wanted = self.headers.get("Range")
        total = len(body)
        if wanted and status == 200:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            body, status = body[int(first) : int(last) + 1 if last else None], 206
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(body) - 1}/{total}"
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.requests.append(path)
        api = path.startswith("/api/")
        path = path.removeprefix("/api").removeprefix("/datasets/")
        if path == "plain" or path.startswith("plain/revision/"):
            path = f"owner/{path}"  # the Hub redirects from names without an owner
        repository = next((name for name in (*self.content, "owner/gated") if path == name or path.startswith(name + "/")), None)
        if repository is None:
            return self.answer(401, X_Error_Code="RepoNotFound")
        if repository == "owner/gated":
            return self.answer(401, X_Error_Code="GatedRepo")
        verb, _, rest = path.removeprefix(repository).strip("/").partition("/")
        content = self.content[repository]
        revision = next((r for r in (*COMMITS, *COMMITS.values()) if rest == r or rest.startswith(r + "/")), None)
        if verb and revision is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        rest = rest.removeprefix(revision or "").strip("/")
        commit = COMMITS.get(revision or "main", revision or "")
        if not api:
            body = content.get(rest)
            if body is None:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=commit, Accept_Ranges="bytes")
        if verb in ("tree", "paths-info"):
            entries = [{"type": "file", "path": p, "size": len(b), "oid": "c" * 40} for p, b in content.items() if not rest or p.startswith(rest + "/")]
            entries += [{"type": "directory", "path": p, "oid": "d" * 40} for p in sorted({p.split("/")[0] for p in content if "/" in p}) if not rest]
            if verb == "paths-info":
                entries = [entry for entry in entries if entry["path"] in self.paths]
            if not entries:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return self.answer(200, json.dumps(entries).encode())
        info = {"_id": "e" * 24, "id": repository, "sha": commit, "private": False, "tags": [], "siblings": [{"rfilename": p} for p in content]}
        return self.answer(200, json.dumps(info).encode())

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.paths = parse_qs(body.decode()).get("paths", [])
        self.do_GET()


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def ask(home: Path, endpoint: str, *questions: tuple[object, ...], **environment: str) -> list[Any]:
    """What the functions answer in a process of its own, whose caches are in `home`; and that nothing else is said."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "JAX", "XDG")) and "proxy" not in key.lower()}
    answer = subprocess.run(
        [sys.executable, "-c", ASK],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        env={**clean, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HOME": str(home), **environment},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    return json.loads(answer.stdout)


MAIN, NOWHERE = COMMITS["main"], "http://127.0.0.1:9"
TEXTS = example(900).select(["text"]).to_pylist()


@pytest.mark.slow
def test_the_hub_is_read_once_and_then_from_the_cache(tmp_path: Path, hub: str) -> None:
    name = f"owner/Several@{MAIN}::train"
    questions: list[tuple[object, ...]] = [
        ("identity", "owner/Several"),
        ("identity", "owner/Several@old:small"),
        ("identity", "plain"),
        ("rows", "plain", 0, ["n"]),
        ("rows", "owner/Several", 0, ["text"]),
        ("rows", "owner/Several::test", 0, ["id"]),
        ("rows", "owner/Several:small", 1, ["text"]),
        ("rows", name, 450, ["text"]),
        ("rows", "owner/plain", 0, ["txt"]),
        ("size", name),
    ]
    asked = len(Hub.requests)
    before, *answers, num_bytes = ask(tmp_path, hub, ("size", name), *questions)
    assert before == 0
    assert answers == [
        name,
        f"owner/Several@{COMMITS['old']}:small:train",
        f"owner/plain@{MAIN}::train",
        [[{"n": 1}, {"n": 2}], 2],
        [TEXTS, 900],
        [[{"id": i} for i in range(5)], 5],
        [TEXTS[4:5], 2],
        [TEXTS[450:], 900],
        [[{"text": None, "n": None}] * 2, 2],
    ]
    assert num_bytes == sum(file.stat().st_size for file in tmp_path.glob("datasets/owner___several/default/0.0.0/*/*-train*.arrow")) > 0
    assert sum(path.endswith("train-0.parquet") for path in Hub.requests[asked:]) == 2  # once its head, once all of it
    asked = len(Hub.requests)
    assert ask(tmp_path, hub, *questions) == [*answers, num_bytes]
    assert not any(path.endswith((".parquet", ".jsonl")) for path in Hub.requests[asked:])
    # Of the second name only the commit is known, and `plain` has no README, by which that is noted.
    cached = [question for question in questions if "plain" not in str(question[1])]
    expected = [answer for question, answer in zip(questions, [*answers, num_bytes], strict=True) if "plain" not in str(question[1])]
    assert ask(tmp_path, hub, *cached, HF_HUB_OFFLINE="1") == expected
    assert ask(tmp_path, NOWHERE, *cached) == expected
    assert ask(tmp_path, NOWHERE, ("identity", "owner/plain"), ("rows", "owner/plain", 1, ["text"]), ("rows", name, 899, ["text"], True)) == [
        f"owner/plain@{MAIN}::train",
        [[{"text": "two"}], 2],
        [TEXTS[899:], 900],
    ]
    shutil.rmtree(tmp_path / "hub")  # with what is known of branches; the rows are elsewhere
    assert ask(tmp_path, NOWHERE, ("identity", "owner/Several"), ("rows", "owner/Several", 899, ["text"])) == [name, [TEXTS[899:], 900]]
    assert ask(tmp_path, NOWHERE, ("rows", "owner/Several@old:small", 0, ["text"]), ("rows", "owner/Several@new", 0, ["text"]), ("identity", "no/no")) == [
        f"UserError: The dataset owner/Several@old:small:train is in the cache only as owner/Several@{MAIN}:default, owner/Several@{MAIN}:small, and the "
        "Hugging Face Hub cannot be reached. Check the network and HF_HUB_OFFLINE; without the Hub, only what is in the cache can be read.",
        f"UserError: The dataset owner/Several@new::train is in the cache only as owner/Several@{MAIN}:default, owner/Several@{MAIN}:small, and the "
        "Hugging Face Hub cannot be reached. Check the network and HF_HUB_OFFLINE; without the Hub, only what is in the cache can be read.",
        "UserError: The dataset no/no::train is not in the cache, and the Hugging Face Hub cannot be reached. "
        "Check the network and HF_HUB_OFFLINE; without the Hub, only what is in the cache can be read.",
    ]


def test_streaming_gives_the_same_rows_and_keeps_none(tmp_path: Path, hub: str) -> None:
    starts = (0, 1, 256, 299, 300, 450, 899, 900, 1000)
    answers = ask(
        tmp_path,
        hub,
        *(("rows", f"owner/Several@{MAIN}", start, ["text"], True) for start in starts),
        ("rows", "owner/Several", 898, ["tekst"], True),
        ("rows", "owner/plain", 1, ["text"], True),
        ("size", "owner/Several"),
        ("rows", "owner/Several::valid", 0, ["text"], True),
    )
    assert answers[: len(starts)] == [[TEXTS[start:], max(start, 900)] for start in starts]
    names = {"text": None, "meta": None, "messages": None, "id": None}
    assert answers[len(starts) :] == [
        [[names, names], 900],
        [[{"text": "two"}], 2],
        0,
        "UserError: The dataset owner/Several has no split 'valid'; it has train, test. Choose one with owner/Several::SPLIT.",
    ]
    assert not list(tmp_path.rglob("*.arrow"))


def test_what_goes_wrong_at_the_hub_is_said_in_sentences(tmp_path: Path, hub: str) -> None:
    absent = "UserError: There is no dataset {} on the Hugging Face Hub, or it is private. Check the name, or try `hf auth login`."
    script = (
        "UserError: The dataset owner/script comes as a program, and nothing that comes with data is run. "
        "owner/script@refs/convert/parquet may hold its rows as files."
    )
    gated = (
        "UserError: The dataset owner/gated is gated. Ask for access at https://huggingface.co/datasets/owner/gated, then log in with `hf auth login`."
    )
    expected = {
        ("identity", "owner/absent"): absent.format("owner/absent"),
        ("rows", f"owner/absent@{MAIN}", 0, ("text",)): absent.format("owner/absent"),
        ("identity", "text"): absent.format("text"),  # which `datasets` has a use of its own for
        ("identity", "owner/gated"): gated,
        ("rows", f"owner/gated@{MAIN}", 0, ("text",)): gated,
        ("identity", "owner/plain@new"): "UserError: The dataset owner/plain has no revision 'new'. Give a branch, a tag or a commit of it.",
        ("rows", "owner/script", 0, ("text",)): script,
        ("rows", "owner/script", 0, ("text",), True): script,
        ("rows", "owner/Several:smal", 0, ("text",)): (
            "UserError: The dataset owner/Several has no configuration 'smal'; it has default, small; did you mean small? Choose one with owner/Several:CONFIG."
        ),
        ("rows", "owner/choice", 0, ("text",)): (
            "UserError: The dataset owner/choice has several configurations: large, small. Choose one with owner/choice:CONFIG."
        ),
        ("rows", "owner/Several:small:test", 0, ("text",)): (
            "UserError: The dataset owner/Several has no split 'test'; it has train. Choose one with owner/Several:small:SPLIT."
        ),
    }
    answers = ask(tmp_path, hub, *expected, ("rows", "owner/torn", 0, ["text"]), ("rows", "owner/empty", 0, ["text"]))
    for question, answer in zip(expected, answers, strict=False):
        assert answer == expected[question], question
    assert answers[-2].startswith("UserError: The dataset owner/torn cannot be read: Parquet")
    assert answers[-1].startswith("UserError: The dataset owner/empty cannot be read: ")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_several_configurations_in_the_cache_have_to_be_told_apart(tmp_path: Path, hub: str) -> None:
    ask(tmp_path, hub, ("rows", "owner/choice:small", 0, ["text"]))
    assert ask(tmp_path, NOWHERE, ("rows", "owner/choice", 0, ["text"])) == [[TEXTS[3:5], 2]]
    ask(tmp_path, hub, ("rows", "owner/choice:large", 0, ["text"]))
    assert ask(tmp_path, NOWHERE, ("rows", "owner/choice", 0, ["text"]), ("rows", "owner/choice:large", 899, ["text"]), ("size", "owner/choice")) == [
        "UserError: The cache holds several configurations of the dataset owner/choice: large, small. Choose one with owner/choice:CONFIG.",
        [TEXTS[899:], 900],
        0,
    ]
