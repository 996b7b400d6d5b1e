"""Datasets of the Hub, read in another process from a local server that answers as the Hub does."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_dataset_rows import example

from consyn_jax.data.sources.recognition.splits import IS_TEST

# The process ends without Python's own end: a thread of pyarrow that lets go of a file after it
# aborts the process (github.com/apache/arrow/issues/34314).
ASK = """
import json, os, sys
from consyn_jax.errors import UserError
from consyn_jax.data.sources.huggingface import dataset_rows, hub
answers = []
for verb, *arguments in json.load(sys.stdin):
    try:
        if verb == "parted":
            from consyn_jax.data.sources.discovery import find_sources
            corpus = find_sources(arguments)
            names = [[one.name for one in part] for part in (corpus.sources, corpus.validation)]
            answers.append([*names, [list(pair) for pair in corpus.left_out]])
            continue
        answer = getattr(hub if verb == "identity" else dataset_rows, verb)(*arguments)
        if verb == "rows":
            batches = list(answer)
            end = batches[-1].position if batches else arguments[1]
            answer = [
                [{**dict.fromkeys(b.unread, "unread"), **row} for b in batches for row in b.rows],
                end,
            ]
    except UserError as error:
        answer = f"UserError: {error}"
    answers.append(answer)
print(json.dumps(answers), flush=True)
os._exit(0)
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
    """The files on the server, by repository."""
    several = {f"default/train-{i}.parquet": parquet(300 * i, 300 * i + 300) for i in range(3)}
    several["default/test.parquet"] = parquet(0, 5)
    return {
        "owner/Several": {"README.md": README, "small.parquet": parquet(3, 5), **several},
        "owner/choice": {
            "README.md": README.replace(b"config_name: default", b"config_name: large"),
            **several,
            "small.parquet": parquet(3, 5),
        },
        "owner/parted": {
            "README.md": README.replace(
                b"[{split: train", b"[{split: validation, path: default/dev*}, {split: train"
            ),
            "default/dev.parquet": parquet(5, 9),
            **several,
        },
        "owner/plain": {"data.jsonl": b'{"text": "one", "n": 1}\n{"text": "two", "n": 2}\n'},
        "owner/script": {"README.md": b"", "script.py": b"raise SystemExit('was run')"},
        "owner/torn": {"README.md": b"", "train.parquet": parquet(0, 50)[:-100]},
        "owner/empty": {"README.md": b""},
    }


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's HTTP interface that `datasets` reads from.

    Both commits have the same content.
    """

    content = hub_content()
    requests: list[str] = []  # noqa: RUF012 (there is only one server)

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
        repository = next(
            (
                name
                for name in (*self.content, "owner/gated")
                if path == name or path.startswith(name + "/")
            ),
            None,
        )
        if repository is None:
            return self.answer(401, X_Error_Code="RepoNotFound")
        if repository == "owner/gated":
            return self.answer(401, X_Error_Code="GatedRepo")
        verb, _, rest = path.removeprefix(repository).strip("/").partition("/")
        content = self.content[repository]
        revision = next(
            (r for r in (*COMMITS, *COMMITS.values()) if rest == r or rest.startswith(r + "/")),
            None,
        )
        if verb and revision is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        rest = rest.removeprefix(revision or "").strip("/")
        commit = COMMITS.get(revision or "main", revision or "")
        if not api:
            body = content.get(rest)
            if body is None:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return self.answer(
                200,
                body,
                ETag=f'"{hashlib.sha1(body).hexdigest()}"',
                X_Repo_Commit=commit,
                Accept_Ranges="bytes",
            )
        if verb in ("tree", "paths-info"):
            entries = [
                {"type": "file", "path": p, "size": len(b), "oid": "c" * 40}
                for p, b in content.items()
                if not rest or p.startswith(rest + "/")
            ]
            entries += [
                {"type": "directory", "path": p, "oid": "d" * 40}
                for p in sorted({p.split("/")[0] for p in content if "/" in p})
                if not rest
            ]
            if verb == "paths-info":
                entries = [entry for entry in entries if entry["path"] in self.paths]
            if not entries:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return self.answer(200, json.dumps(entries).encode())
        info = {
            "_id": "e" * 24,
            "id": repository,
            "sha": commit,
            "private": False,
            "tags": [],
            "siblings": [{"rfilename": p} for p in content],
        }
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
    """The results of functions in a new process with its caches in `home`.

    The process must not write to stderr.
    """
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "HUGGING", "JAX", "XDG")) and "proxy" not in key.lower()
    }
    answer = subprocess.run(
        [sys.executable, "-c", ASK],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        env={
            **clean,
            "HF_HOME": str(home),
            "HF_ENDPOINT": endpoint,
            "HOME": str(home),
            **environment,
        },
        cwd=Path(__file__).parents[4],
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    return json.loads(answer.stdout)


MAIN, NOWHERE = COMMITS["main"], "http://127.0.0.1:9"
OUT_OF_REACH = (
    "and the Hugging Face Hub cannot be reached. Check the network and HF_HUB_OFFLINE, "
    "or give a dataset that is in the cache."
)
NULLS = dict.fromkeys(("text", "meta", "messages", "id"))


def with_unread(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict.fromkeys(NULLS, "unread") | row for row in rows]


TEXTS = with_unread(example(900).select(["text"]).to_pylist())


@pytest.mark.slow
def test_a_name_without_a_split_is_parted_by_the_splits_of_the_hub(
    tmp_path: Path, hub: str
) -> None:
    train, validation, test = (f"owner/parted@{MAIN}::{s}" for s in ("train", "validation", "test"))
    whole = [[train], [validation], [[test, IS_TEST]]]
    asked = [("parted", "owner/parted"), ("parted", "owner/parted::train")]
    asked += [("parted", "owner/Several:small"), ("parted", "owner/plain")]
    small, plain = (f"owner/Several@{MAIN}:small:train", f"owner/plain@{MAIN}::train")
    only = [[[name], [], []] for name in (train, small, plain)]
    rows = ("rows", validation, 0, ["id"])
    assert ask(tmp_path, hub, *asked, rows) == [
        whole,
        *only,
        [with_unread({"id": i} for i in range(5, 9)), 4],
    ]
    assert ask(tmp_path, NOWHERE, ("parted", "owner/parted")) == [whole]  # from the cache


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_downloaded_once(tmp_path: Path, hub: str) -> None:
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
        [[{"n": 1, "text": "unread"}, {"n": 2, "text": "unread"}], 2],
        [TEXTS, 900],
        [with_unread({"id": i} for i in range(5)), 5],
        [TEXTS[4:5], 2],
        [TEXTS[450:], 900],
        [[{"text": None, "n": None}] * 2, 2],
    ]
    assert (
        num_bytes
        == sum(
            file.stat().st_size
            for file in tmp_path.glob("datasets/owner___several/default/0.0.0/*/*-train*.arrow")
        )
        > 0
    )
    assert (
        sum(path.endswith("train-0.parquet") for path in Hub.requests[asked:]) == 2
    )  # once its head, once all of it
    asked = len(Hub.requests)
    assert ask(tmp_path, hub, *questions) == [*answers, num_bytes]
    assert not any(path.endswith((".parquet", ".jsonl")) for path in Hub.requests[asked:])
    # `plain` has no README, with which the cache records the commit of a revision.
    cached = [question for question in questions if "plain" not in str(question[1])]
    expected = [
        answer
        for question, answer in zip(questions, [*answers, num_bytes], strict=True)
        if "plain" not in str(question[1])
    ]
    assert ask(tmp_path, hub, *cached, HF_HUB_OFFLINE="1") == expected
    assert ask(tmp_path, NOWHERE, *cached) == expected
    assert ask(
        tmp_path,
        NOWHERE,
        ("identity", "owner/plain"),
        ("rows", "owner/plain", 1, ["text"]),
        ("rows", name, 899, ["text"], True),
    ) == [
        f"owner/plain@{MAIN}::train",
        [[{"text": "two", "n": "unread"}], 2],
        [TEXTS[899:], 900],
    ]
    shutil.rmtree(tmp_path / "hub")  # with what is known of branches; the rows are elsewhere
    assert ask(
        tmp_path, NOWHERE, ("identity", "owner/Several"), ("rows", "owner/Several", 899, ["text"])
    ) == [name, [TEXTS[899:], 900]]
    assert ask(
        tmp_path,
        NOWHERE,
        ("rows", "owner/Several@old:small", 0, ["text"]),
        ("rows", "owner/Several@new", 0, ["text"]),
        ("identity", "no/no"),
    ) == [
        *[
            f"UserError: The dataset {name} is in the cache only as owner/Several@{MAIN}:default, "
            f"owner/Several@{MAIN}:small, {OUT_OF_REACH}"
            for name in ("owner/Several@old:small:train", "owner/Several@new")
        ],
        f"UserError: The dataset no/no is not in the cache, {OUT_OF_REACH}",
    ]


@pytest.mark.slow
def test_streaming_gives_the_same_rows_and_keeps_no_files(tmp_path: Path, hub: str) -> None:
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
    assert answers[len(starts) :] == [
        [[NULLS, NULLS], 900],
        [[{"text": "two", "n": "unread"}], 2],
        0,
        "UserError: The dataset owner/Several has no split 'valid'; it has train, test. "
        "Choose one with owner/Several::SPLIT.",
    ]
    assert not list(tmp_path.rglob("*.arrow"))


def test_errors_of_the_hub_are_explained(tmp_path: Path, hub: str) -> None:
    absent = (
        "UserError: There is no dataset {} on the Hugging Face Hub, or it is private. "
        "Check the name, or try `hf auth login`."
    )
    script = (
        "UserError: The dataset owner/script needs a script from its repository, and such scripts "
        "are never run. Try owner/script@refs/convert/parquet, which may have the rows as Parquet "
        "files."
    )
    gated = (
        "UserError: The dataset owner/gated is gated. Ask for access at "
        "https://huggingface.co/datasets/owner/gated, then log in with `hf auth login`."
    )
    expected = {
        ("identity", "owner/absent"): absent.format("owner/absent"),
        ("rows", f"owner/absent@{MAIN}", 0, ("text",)): absent.format("owner/absent"),
        ("identity", "text"): absent.format("text"),  # also the name of a builder of `datasets`
        ("identity", "owner/gated"): gated,
        ("rows", f"owner/gated@{MAIN}", 0, ("text",)): gated,
        ("identity", "owner/plain@new"): (
            "UserError: The dataset owner/plain has no revision 'new'. "
            "Give one of its branches, tags or commits."
        ),
        ("rows", "owner/script", 0, ("text",)): script,
        ("rows", "owner/script", 0, ("text",), True): script,
        ("rows", "owner/Several:smal", 0, ("text",)): (
            "UserError: The dataset owner/Several has no configuration 'smal'; it has default, "
            "small; did you mean small? Choose one with owner/Several:CONFIG."
        ),
        ("rows", "owner/choice", 0, ("text",)): (
            "UserError: The dataset owner/choice has several configurations: large, small. "
            "Choose one with owner/choice:CONFIG."
        ),
        ("rows", "owner/Several:small:test", 0, ("text",)): (
            "UserError: The dataset owner/Several has no split 'test'; it has train. "
            "Choose one with owner/Several:small:SPLIT."
        ),
    }
    answers = ask(
        tmp_path,
        hub,
        *expected,
        ("rows", "owner/torn", 0, ["text"]),
        ("rows", "owner/empty", 0, ["text"]),
    )
    for question, answer in zip(expected, answers, strict=False):
        assert answer == expected[question], question
    assert answers[-2].startswith("UserError: The dataset owner/torn cannot be read: Parquet")
    assert answers[-1].startswith("UserError: The dataset owner/empty cannot be read: ")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_one_of_several_configurations_in_the_cache_must_be_chosen(
    tmp_path: Path, hub: str
) -> None:
    ask(tmp_path, hub, ("rows", "owner/choice:small", 0, ["text"]))
    assert ask(tmp_path, NOWHERE, ("rows", "owner/choice", 0, ["text"])) == [[TEXTS[3:5], 2]]
    ask(tmp_path, hub, ("rows", "owner/choice:large", 0, ["text"]))
    assert ask(
        tmp_path,
        NOWHERE,
        ("rows", "owner/choice", 0, ["text"]),
        ("rows", "owner/choice:large", 899, ["text"]),
        ("size", "owner/choice"),
    ) == [
        "UserError: The cache has several configurations of the dataset owner/choice: "
        "large, small. Choose one with owner/choice:CONFIG.",
        [TEXTS[899:], 900],
        0,
    ]
