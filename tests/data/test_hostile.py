"""Broken, forged and enormous input: usable parts are used, and messages name the faulty place."""

import bz2
import gzip
import hashlib
import itertools
import json
import lzma
import os
import pickle
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from consyn_jax.data.preparation import cached_store as prepare_module
from consyn_jax.data.preparation.cached_store import Prepared, prepare
from consyn_jax.data.preparation.workers.worker_pool import WorkerPool
from consyn_jax.data.sources import discovery as sources
from consyn_jax.data.store import TokenStore
from consyn_jax.data.store.manifest import read_sources
from consyn_jax.errors import UserError
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.tokenization import BPETokenizer

BYTES = BPETokenizer.bytes()
counter = itertools.count()


@pytest.fixture(autouse=True)
def quick_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a new cache, and do not wait for the disk: durability is not tested here."""
    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def faster_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the same ids in a tenth of the time."""
    monkeypatch.setattr(
        BYTES, "encode_batch", lambda texts, after=None: [list(text.encode()) for text in texts]
    )


def run(place: Path, *data: Path | str, **options: Any) -> Prepared:
    rules: dict[str, Any] = {"num_workers": 0, "validation_fraction": 0.0, **options}
    return prepare(
        CorpusOptions(data=tuple(map(str, data)), **rules),
        BYTES,
        output=place / f"store{next(counter)}",
    )


def refused(place: Path, *data: Path | str, **options: Any) -> str:
    """The error message, of one or two sentences; no store is left."""
    before = next(counter)
    with pytest.raises(UserError) as caught:
        run(place, *data, **options)
    assert not list(place.glob(f"store{before + 1}/manifest.json"))
    message = str(caught.value)
    assert len(message) < 700, message
    assert message.endswith((".", "?")), message
    return message


def texts(prepared: Prepared, split: str = "train") -> list[str]:
    of = prepared.store.split(split)
    tokens, begins, _ = of.windows(np.array([0]), of.num_tokens)
    return [
        BYTES.decode(part.tolist())
        for part in np.split(tokens[0, 1:], np.flatnonzero(begins[0])[1:])
        if len(part)
    ]


def write(place: Path, name: str, data: bytes | str) -> Path:
    path = place / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# --------------------------------------------------------------------------------------- compressed


TEXT = b"".join(b"line %d of the text\n" % at for at in range(30_000))


def damaged(kind: str, how: str) -> bytes:
    data = {
        "gz": lambda: gzip.compress(TEXT, mtime=0),
        "zst": lambda: pyarrow.compress(TEXT, "zstd", asbytes=True),
        "xz": lambda: lzma.compress(TEXT),
        "bz2": lambda: bz2.compress(TEXT),
    }[kind]()
    middle = len(data) // 2
    return {
        "cut": data[:middle],
        "cut at the end": data[:-1],
        "corrupt": data[:middle]
        + bytes(byte ^ 0xFF for byte in data[middle : middle + 50])
        + data[middle + 50 :],
        "followed": data + b"something else",
        "header": data[:6],
    }[how]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gz", "zst", "xz", "bz2"])
@pytest.mark.parametrize("how", ["cut", "cut at the end", "corrupt", "followed", "header"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_damaged_compression(tmp_path: Path, kind: str, how: str, name: str) -> None:
    path = write(tmp_path, f"{name}.{kind}", damaged(kind, how))
    options = {"on_bad_rows": "skip"} if name.endswith("l") else {}
    assert f"{path} is cut off or damaged (" in refused(tmp_path, path, **options)


def test_unknown_compression(tmp_path: Path) -> None:
    assert re.search(
        r"a\.txt is (binary|not UTF-8 text): byte \d+",
        refused(tmp_path, write(tmp_path, "a.txt", zlib.compress(TEXT))),
    )


def test_a_file_compressed_twice_is_binary(tmp_path: Path) -> None:
    assert "a.txt.gz is" in refused(
        tmp_path, write(tmp_path, "a.txt.gz", gzip.compress(gzip.compress(TEXT)))
    )


# ----------------------------------------------------------------------------------------- enormous

MEASURED = """
import resource, sys
from pathlib import Path
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.errors import UserError
from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.tokenization import BPETokenizer
tokenizer = BPETokenizer.bytes()
sample = CorpusOptions(data=("sample",), num_workers=0)
prepare(sample, tokenizer, output=Path(sys.argv[2] + ".sample"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if "bomb" not in sys.argv[1]:  # the same ids, faster
    tokenizer.encode_batch = lambda texts, after=None: [list(text.encode()) for text in texts]
try:
    separator = sys.argv[3] or None
    fraction = 0.01 if separator is None and "jsonl" not in sys.argv[1] else 0
    options = CorpusOptions(
        data=(sys.argv[1],),
        num_workers=0,
        document_separator=separator,
        validation_fraction=fraction,
    )
    found = prepare(options, tokenizer, output=Path(sys.argv[2]))
    print(sum(found.store.split(name).num_bytes for name in ("train", "validation")))
except UserError as fault:
    print(fault)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, file=sys.stderr)
"""

HUGE = int(os.environ.get("CONSYN_TEST_HUGE_MB", "80"))
"""Size of the files of the next test in MB. With 1000 it takes some minutes."""
BOMB = max(HUGE // 10, 8)


def huge(place: Path, what: str) -> tuple[Path, str, str]:
    """(file, separator, pattern of the output)."""
    size = (BOMB if what.startswith("bomb") else HUGE) << 20
    if what.startswith("bomb"):
        path = place / ("bomb.txt.gz" if what != "bomb of rows" else "bomb.jsonl.gz")
        piece = {
            "bomb of zeros": bytes(1 << 20),
            "bomb of words": b"a " * (1 << 19),
            "bomb of rows": b'{"text": "%s"}\n' % (b"a b " * 63) * (1 << 12),
        }[what]
        times = (1 << 30 if what == "bomb of zeros" else size) // len(piece)
        path.write_bytes(gzip.compress(piece) * times)
        wanted = {
            "bomb of zeros": r"is binary: byte 0 is NUL",
            "bomb of words": str(times * len(piece)),
            "bomb of rows": "^252\n",
        }[what]
        return path, "", wanted
    path = (
        place
        / {
            "text": "a.txt",
            "separated": "a.txt",
            "sparse": "a.txt",
            "rows": "a.jsonl",
            "array": "a.json",
            "deep": "a.json",
        }[what]
    )
    with path.open("wb") as file:
        start = {
            "rows": b'{"text": "',
            "array": b'[{"text": "',
            "deep": b"[" * 100,
            "sparse": b"text " * 20_000,
        }.get(what, b"")
        file.write(start)
        if what == "sparse":  # only NUL after the head by which the type is recognised
            file.truncate(size)
        else:
            for _ in range(size >> 20):
                file.write(
                    {"deep": b"["}.get(what, b"longer words ")
                    * (1 << 17 if what != "deep" else 1 << 20)
                )
    answers = {
        "rows": r"a\.jsonl:1 is a line of more than 64 MiB",
        "array": r"a\.json:1 .*no row ends within 64 MiB",
        "deep": "nested too deeply",
    }
    return (
        path,
        "\\n\\n" if what == "separated" else "",
        answers.get(what, "100000" if what == "sparse" else str(13 * (1 << 17) * HUGE)),
    )


MORE = [
    pytest.param(what, marks=pytest.mark.exhaustive)
    for what in ("bomb of words", "bomb of rows", "separated", "sparse")
]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["bomb of zeros", "text", "rows", "array", "deep", *MORE])
def test_memory_is_bounded_for_any_size(tmp_path: Path, what: str) -> None:
    path, separator, wanted = huge(tmp_path, what)
    command = [sys.executable, "-c", MEASURED, str(path), str(tmp_path / "store"), separator]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=True)
    assert re.search(wanted, done.stdout), done.stdout
    grown = int(done.stderr) / 1024
    print(f"{what}: {path.stat().st_size >> 20} MB, {grown:.0f} MB more memory")
    # A row is parsed in one piece, and may have 64 MB.
    assert grown < (500 if what in ("rows", "array") else 250), f"{grown} MB"


# ----------------------------------------------------------------------------------------- no UTF-8


@pytest.mark.usefixtures("faster_bytes")
def test_bytes_that_are_not_utf_8_in_text(tmp_path: Path) -> None:
    early = write(tmp_path, "early.txt", b"one\ntwo\nth\xffree")
    late = write(tmp_path, "late.txt", b"one line\n" * 10_000 + b"br\xfeoken" + b" words" * 400_000)
    assert f"{early} is not UTF-8 text: byte 10 (line 3) is 0xff" in refused(tmp_path, early)
    for separator in (None, "\\n\\n"):
        message = refused(tmp_path, late, document_separator=separator)
        assert (
            f"{late} is not UTF-8 text: byte 90002 (line 10001) is 0xfe. Convert the file to UTF-8"
            in message
        )
        assert "--invalid_utf8 replace" in message
    prepared = run(tmp_path, early, late, invalid_utf8="replace")
    assert prepared.report.changed["invalid_utf8"] == 2
    assert texts(prepared)[0] == "one\ntwo\nth\ufffdree"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_bytes_that_are_not_utf_8_in_rows(tmp_path: Path, name: str) -> None:
    rows = [b'{"text": "one"}', b'{"text": "t\xffo"}', b'{"text": "three"}']
    path = write(
        tmp_path, name, b"\n".join(rows) if name.endswith("l") else b"[" + b",\n".join(rows) + b"]"
    )
    assert (
        f"{path}:2 is not UTF-8 (byte 11 of the row; --invalid_utf8 replace would repair it)"
        in refused(tmp_path, path)
    )
    skipped = run(tmp_path, path, on_bad_rows="skip")
    assert texts(skipped) == ["one", "three"]
    assert skipped.report.dropped == {"bad row": 1}
    replaced = run(tmp_path, path, invalid_utf8="replace")
    assert texts(replaced) == ["one", "t\ufffdo", "three"]
    assert replaced.report.changed == {"invalid_utf8": 1}


def test_a_hundred_kilobytes_of_noise(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(1, 256, 300_000, dtype=np.uint8).tobytes()
    prepared = run(tmp_path, write(tmp_path, "a.txt", noise), invalid_utf8="replace")
    assert prepared.report.changed["invalid_utf8"] > 10_000


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_other_encodings_without_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    for name, text in (
        ("a.txt", "some text"),
        ("a.jsonl", '{"text": "some"}\n'),
        ("a.json", '[{"text": "some"}]'),
    ):
        message = refused(tmp_path, write(tmp_path, name, text.encode(encoding)))
        assert re.search(r"is binary: byte \d+ is NUL|is not UTF-8|is UTF-16 text", message), (
            message
        )


def test_line_ends_of_old_macs(tmp_path: Path) -> None:
    assert texts(run(tmp_path, write(tmp_path, "a.txt", "one\rtwo\r\nthree"))) == [
        "one\rtwo\r\nthree"
    ]
    assert "a.jsonl:1 is broken JSON (Extra data" in refused(
        tmp_path, write(tmp_path, "a.jsonl", '{"text": "one"}\r{"text": "two"}\r')
    )
    assert texts(
        run(tmp_path, write(tmp_path, "b.jsonl", '{"text": "one"}\r\n\r\n{"text": "two"}\r\n'))
    ) == ["one", "two"]


def test_nul_bytes(tmp_path: Path) -> None:
    assert "a.txt is binary: byte 3 is NUL" in refused(
        tmp_path, write(tmp_path, "a.txt", "one\0two")
    )
    late = write(tmp_path, "late.txt", "word " * 20_000 + "\0" * 1000 + "end")
    prepared = run(tmp_path, late)
    assert prepared.report.changed == {"control_characters": 1000}
    assert texts(prepared) == ["word " * 20_000 + "end"]
    assert texts(run(tmp_path, late, control_characters="keep")) == [late.read_text()]
    assert texts(run(tmp_path, write(tmp_path, "a.jsonl", r'{"text": "a\u0000b"}'))) == ["ab"]
    assert "is binary: byte 10 is NUL" in refused(
        tmp_path, write(tmp_path, "b.jsonl", b'{"text": "\0"}')
    )


# --------------------------------------------------------------------------------------------- JSON

BAD_ROWS = [
    (
        "nested",
        '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "nested too deeply",
    ),
    ("nested objects", '{"a":' * 50_000 + "1" + "}" * 50_000, "nested too deeply"),
    ("nested, and not closed", "[" * 1_000_000, "nested too deeply"),
    ("huge number", '{"text": ' + "9" * 100_000 + "}", "has a number of more than 4,300 digits"),
    ("number", '{"text": 1e999}', "holds a number under the key 'text'"),
    ("null", '{"text": null}', "holds null under the key 'text'"),
    ("array", '{"text": ["a"]}', "holds an array under the key 'text'"),
    ("not a row", '"text"', "holds a string, not an object"),
    ("not a number", "NaN", "holds a number, not an object"),
    ("no key", '{"txt": "a"}', "has no key 'text'; its keys are 'txt'"),
    ("many keys", json.dumps({f"key {at} {'x' * 1000}": "" for at in range(1000)}), "and 992 more"),
    ("empty object", "{}", "has no key 'text'; its keys are none"),
    ("half a surrogate pair", r'{"text": "a\ud800b"}', "holds half of a surrogate pair"),
    ("half a surrogate pair as key", r'{"\udfff": "a"}', "has no key 'text'"),
    ("cut", '{"text": "a', "is broken JSON (Unterminated string"),
    ("control character", '{"text": "a\tb"}', "is broken JSON (Invalid control character"),
    (
        "messages of a wrong type",
        '{"messages": "hello"}',
        "holds a string under the key 'messages'",
    ),
    ("a message of a wrong type", '{"messages": [5]}', "holds a number in message 1"),
    (
        "an unknown role",
        json.dumps({"messages": [{"role": "x" * 5000, "content": "a"}]}),
        "holds the role 'xxx",
    ),
    ("nothing to learn", '{"messages": []}', "so there is nothing to train on"),
    ("no prompt", '{"prompt": 5, "completion": "a"}', "holds a number under the key 'prompt'"),
]


@pytest.mark.parametrize(
    ("row", "message"), [case[1:] for case in BAD_ROWS], ids=[case[0] for case in BAD_ROWS]
)
def test_bad_rows(tmp_path: Path, row: str, message: str) -> None:
    path = write(tmp_path, "a.jsonl", f'{{"text": "one"}}\n\n{row}\n{{"text": "three"}}\n')
    said = refused(tmp_path, path)
    assert f"{path}:3 " in said
    assert message in said
    skipped = run(tmp_path, path, on_bad_rows="skip")
    assert texts(skipped) == ["one", "three"]
    assert skipped.report.dropped == {"bad row": 1}
    assert f"{path}:3" in skipped.report.examples["bad row"][0]
    assert len(skipped.report.examples["bad row"][0]) < 700
    array = write(tmp_path, "a.json", f'[{{"text": "one"}},\n\n{row},\n{{"text": "three"}}]')
    said = refused(tmp_path, array)
    assert f"{array}:3 " in said
    unknown = ("broken JSON", "nested too deeply", "digits")  # where the next row starts
    if not any(words in message for words in unknown):
        assert texts(run(tmp_path, array, on_bad_rows="skip")) == ["one", "three"]


@pytest.mark.parametrize(
    ("rows", "flags", "remedy"),
    [
        ("{'text': 'one'}", {}, "in Python's notation, not JSON. Write the rows with json.dumps."),
        # Rows of another kind than those before it are no reason for other flags.
        (
            '{"text": "a"}\n{"text": "c"}\n{"chosen": "a", "rejected": "b"}',
            {},
            "Fix the row, or give --on_bad",
        ),
        (
            '{"text": "a"}\n{"text": "c"}\n{"question": "a", "answer": "b"}',
            {},
            "Fix the row, or give --on_bad",
        ),
        ('{"txt": "a"}\n' * 3, {"on_bad_rows": "skip"}, "All 3 rows of "),
        (
            '{"txt": "a"}',
            {"on_bad_rows": "skip"},
            ":1 has no key 'text'; its keys are 'txt'. Correct",
        ),
    ],
)
def test_what_to_do_about_bad_rows(
    tmp_path: Path, rows: str, flags: dict[str, str], remedy: str
) -> None:
    assert remedy in refused(tmp_path, write(tmp_path, "a.jsonl", rows), **flags)


def test_an_array_named_like_lines_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '[\n {"text": "one"},\n {"text": "two"}\n]')
    assert texts(run(tmp_path, path)) == ["one", "two"]


def test_every_depth_is_read_or_refused(tmp_path: Path) -> None:
    """Near Python's limit, main process and worker may disagree, but not with a traceback."""
    for depth in range(900, 1010, 3):
        row = '{"text": "a", "more": ' + "[" * depth + "]" * depth + "}"
        for name, data in (("a.jsonl", row + "\n"), ("a.json", f"[{row}]")):
            path = write(tmp_path, name, data)
            try:
                assert texts(run(tmp_path, path)) == ["a"]
            except UserError as fault:
                assert "nested too deeply" in str(fault)


def test_the_last_of_equal_keys_counts(tmp_path: Path) -> None:
    """Python, JavaScript and most others read them so (RFC 8259 leaves it open)."""
    for name in ("a.jsonl", "a.json"):
        row = '{"text": "first", "text": "second"}'
        assert texts(
            run(tmp_path, write(tmp_path, name, row if name.endswith("l") else f"[{row}]"))
        ) == ["second"]


@pytest.mark.usefixtures("faster_bytes")
def test_rows_without_text(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "a.jsonl",
        '{"text": ""}\n{"text": " \\n"}\n\n{"text": "\\u0007"}\n{"text": "a"}\n',
    )
    prepared = run(tmp_path, path)
    assert texts(prepared) == ["a"]
    assert prepared.report.dropped == {"empty": 3}
    assert "There is no text in" in refused(
        tmp_path, write(tmp_path, "b.jsonl", '{"text": ""}\n' * 5)
    )
    assert "is empty" in refused(tmp_path, write(tmp_path, "c.jsonl", ""))
    assert "There is no text in" in refused(tmp_path, write(tmp_path, "d.jsonl", "\n\n\n"))
    assert "There is no text in" in refused(tmp_path, write(tmp_path, "e.json", "[]"))
    assert "There is no text in" in refused(tmp_path, write(tmp_path, "f.txt", " " * 3_000_000))
    assert "1 too short" in refused(
        tmp_path, write(tmp_path, "g.txt", "long " * 500_000), min_chars=3_000_000
    )


@pytest.mark.parametrize(
    "data",
    [
        '[{"text": "a"}',
        '[{"text": "a"},',
        '[{"text": "a"}, {"te',
        "[",
        '[{"text": "a"} {"text": "b"}]',
        '[{"text": "a"},]',
        "[,]",
    ],
)
def test_arrays_that_are_cut_off_or_broken(tmp_path: Path, data: str) -> None:
    path = write(tmp_path, "a.json", data)
    assert f"{path}:1 is broken JSON (" in refused(tmp_path, path)


def test_json_without_rows(tmp_path: Path) -> None:
    for data in ('{"a": 1}', '"text"', "5", "null", "{", "nonsense"):
        assert "is JSON but not rows" in refused(tmp_path, write(tmp_path, "a.json", data))


# -------------------------------------------------------------------------------------------- files


@pytest.mark.usefixtures("faster_bytes")
def test_files_that_change_between_recognition_and_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Callable[[Path], object]] = {
        "vanishes": lambda path: path.unlink(),
        "shrinks": lambda path: path.write_bytes(path.read_bytes()[:1000]),
        "grows": lambda path: path.write_bytes(path.read_bytes() * 2),
        "becomes a directory": lambda path: (path.unlink(), path.mkdir()),
        "becomes nothing": lambda path: path.write_bytes(b""),
    }
    moments = {
        "after recognition": (prepare_module, "build_spec"),
        "after hashing": (prepare_module, "build"),
        "while reading": (WorkerPool, "__init__"),
    }
    for (what, change), (moment, (owner, name)) in itertools.product(
        changes.items(), moments.items()
    ):
        path = write(tmp_path, "a.txt", TEXT)
        with monkeypatch.context() as patch:
            real = getattr(owner, name)

            def changed(
                *arguments: Any,
                real: Any = real,
                change: Any = change,
                path: Path = path,
                **more: Any,
            ) -> Any:
                change(path)
                return real(*arguments, **more)

            patch.setattr(owner, name, changed)
            try:
                prepared = run(tmp_path, path)
            except UserError as fault:
                assert re.search(
                    rf"{path} (cannot be|can no longer be) read|{path} is a dir|changed while|There is ",
                    str(fault),
                ), (what, moment, fault)
            else:  # what is read must be what was hashed
                assert moment == "after recognition"
                assert texts(prepared) == [path.read_text()]
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.txt", "text")
    real = Path.open
    for code, word in (
        (13, "Permission denied"),
        (5, "Input/output error"),
        (116, "Stale file handle"),
    ):

        def opened(self: Path, *arguments: Any, code: int = code, **more: Any) -> Any:
            if self.name == "a.txt":
                raise OSError(code, os.strerror(code), str(self))
            return real(self, *arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", opened)
            assert f"{path} cannot be read: {word}" in refused(tmp_path, path)


def test_links_in_a_circle(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "below").mkdir(parents=True)
    write(corpus, "a.txt", "text")
    (corpus / "below" / "up").symlink_to(corpus)
    (corpus / "below" / "self").symlink_to("self")
    (corpus / "below" / "nowhere").symlink_to("nothing")
    prepared = run(tmp_path, corpus)
    assert texts(prepared) == ["text"]
    assert {Path(name).name: reason for name, reason in prepared.left_out} == {
        "up": "is a link to a directory; give its path to use it",
        "self": "is not a regular file",
        "nowhere": "is not a regular file",
    }
    for name in ("self", "nowhere"):
        assert str(corpus / "below" / name) in refused(tmp_path, corpus / "below" / name)
    assert texts(run(tmp_path, f"{corpus}/**/*.txt")) == ["text"]


def test_links_out_of_a_directory_are_left_out_and_those_of_the_hubs_cache_are_not(
    tmp_path: Path,
) -> None:
    outside = write(tmp_path, "secret.txt", "theirs")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write(corpus, "a.txt", "text")
    (corpus / "b.txt").symlink_to("../secret.txt")
    (corpus / "c.txt").symlink_to("a.txt")
    prepared = run(tmp_path, corpus)
    assert texts(prepared) == ["text"]  # c.txt is the same document
    reason = f"is a link to {outside}, outside the directory; give the link's target to use it"
    assert list(prepared.left_out) == [(str(corpus / "b.txt"), reason)]
    assert texts(run(tmp_path, corpus / "b.txt")) == ["theirs"]

    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    (snapshot / "data").mkdir(parents=True)
    blobs.mkdir()
    write(blobs, "123", "a blob")
    (snapshot / "data" / "train.txt").symlink_to("../../../blobs/123")
    for place in (snapshot, snapshot / "data"):
        assert texts(run(tmp_path, place)) == ["a blob"]


def test_pipes_and_devices(tmp_path: Path) -> None:
    """Reading waits for no pipe without a writer, and for no device without an end."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    os.mkfifo(corpus / "pipe.txt")
    write(corpus, "a.txt", "text")
    (corpus / "zero.txt").symlink_to("/dev/zero")
    prepared = run(tmp_path, corpus)
    assert texts(prepared) == ["text"]
    assert [reason for _, reason in prepared.left_out] == ["is not a regular file"] * 2
    for name in (corpus / "pipe.txt", "/dev/zero", "/dev/null", "/dev/stdin", "/dev/full"):
        assert f"{name} is not a regular file" in refused(tmp_path, name)


def test_unusual_file_names(tmp_path: Path) -> None:
    corpus = tmp_path / "a corpus\nwith lines"
    corpus.mkdir()
    names = [
        "with space.txt",
        "new\nline.txt",
        "日本 é.txt",
        "-flag.txt",
        "'quote\".txt",
        "<b>.txt",
        "[x].txt",
        "%s{0}.txt",
        "sample",
        "x" * 250 + ".txt",
    ]
    for name in names:
        write(corpus, name, f"text of {name}")
    not_utf_8 = os.fsdecode(b"a\xff.txt")
    write(corpus, not_utf_8, "text of bytes")
    write(corpus, os.fsdecode(b"b\xff.bad"), b"\0")
    prepared = run(tmp_path, corpus)
    assert sorted(texts(prepared)) == sorted(
        ["text of bytes", *(f"text of {name}" for name in names)]
    )
    store = prepared.store
    assert isinstance(store, TokenStore)
    assert "<b>.txt" not in (store.directory / "report.html").read_text()
    assert json.loads((store.directory / "report.json").read_text())["sources"]
    for name in (*names[:-1], not_utf_8):
        assert len(texts(run(tmp_path, str(corpus / name)))) == 1
    assert "is binary" in refused(tmp_path, corpus / os.fsdecode(b"b\xff.bad"))
    assert "a\\udcff" in ascii(refused(tmp_path, corpus / os.fsdecode(b"a\xff.tx")))
    assert "cannot be read: File name too long" in refused(tmp_path, corpus / ("x" * 300))


content = st.binary(max_size=300) | st.text(
    st.sampled_from('[]{}",: \n\\utex1é\0\ufeff'), max_size=200
).map(str.encode)
words = st.text(max_size=5)
json_like = st.recursive(
    st.none() | st.booleans() | st.floats() | words,
    lambda inner: st.lists(inner) | st.dictionaries(words, inner),
)
rows = st.lists(st.fixed_dictionaries({"text": json_like}) | json_like).map(
    lambda rows: "\n".join(map(json.dumps, rows)).encode()
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=content | rows | rows.map(lambda data: b"[" + data.replace(b"\n", b",") + b"]"),
    name=st.sampled_from(
        [
            "a.txt",
            "a.jsonl",
            "a.json",
            "a",
            "a.md",
            "a.csv",
            "a.parquet",
            "a.arrow",
            "a.npy",
            "a.bin",
        ]
    ),
    compressed=st.sampled_from(["", "gz", "zst", "cut", "named"]),
    on_bad_rows=st.sampled_from(["error", "skip"]),
    invalid_utf8=st.sampled_from(["error", "replace"]),
    dataset_type=st.sampled_from(["auto", "auto", "text", "jsonl", "huggingface", "sharded"]),
    separator=st.sampled_from([None, "\\n", "e"]),
)
def test_any_bytes_under_any_name_are_read_or_refused(
    tmp_path: Path,
    data: bytes,
    name: str,
    compressed: str,
    on_bad_rows: str,
    invalid_utf8: str,
    dataset_type: str,
    separator: str | None,
) -> None:
    place = tmp_path / str(next(counter))
    place.mkdir()
    if compressed == "gz":
        name, data = f"{name}.gz", gzip.compress(data)
    elif compressed == "zst":
        name, data = f"{name}.zst", pyarrow.compress(data, "zstd", asbytes=True)
    elif compressed == "cut":
        name, data = f"{name}.gz", gzip.compress(data)[:-3]
    elif compressed == "named":
        name = f"{name}.gz"
    path = write(place, name, data)
    try:
        prepared = run(
            place,
            path,
            on_bad_rows=on_bad_rows,
            invalid_utf8=invalid_utf8,
            dataset_type=dataset_type,
            document_separator=separator,
        )
    except UserError as fault:
        assert str(place) in str(fault)
        assert len(str(fault)) < 900
    else:
        for text in texts(prepared):
            assert text.strip()


# ------------------------------------------------------------------------------------- token stores


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made")
    lines = [
        json.dumps({"prompt": f"question {at}", "completion": f"answer {at}"}) for at in range(20)
    ]
    path = write(place, "a.jsonl", "\n".join(lines))
    store = prepare(
        CorpusOptions(data=(str(path),), num_workers=0, validation_fraction=0.2),
        BYTES,
        output=place / "store",
    ).store
    assert isinstance(store, TokenStore)
    return store.directory


def changes(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(what, changed manifest)."""

    def changed(*keys: Any, to: Any) -> Any:
        copy = json.loads(json.dumps(manifest))
        at = copy
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = to
        return copy

    strange = (
        None,
        True,
        -1,
        0,
        1.5,
        float("nan"),
        float("inf"),
        1 << 70,
        "",
        "x",
        "../x",
        "/etc/passwd",
        "a/b",
        "a\0b",
        [],
        {},
        [[]],
        {"shards": 5},
    )
    shard = ("splits", "train", "shards", 0)
    places: list[tuple[Any, ...]] = [
        ("format",),
        ("version",),
        ("dtype",),
        ("vocab_size",),
        ("tokenizer_sha256",),
        ("splits",),
        ("splits", "train"),
        shard,
    ]
    places += [
        ("splits", "train", key)
        for key in ("shards", "tokens", "documents", "bytes", "target_tokens")
    ]
    places += [(*shard, key) for key in manifest["splits"]["train"]["shards"][0]]
    for place in places:
        for value in strange:
            yield f"{place} = {value!r}", changed(*place, to=value)
    for value in (*strange, "x" * 10_000):
        yield f"all of it = {value!r}"[:50], value
    yield "a split's name", {**manifest, "splits": {"../train": manifest["splits"]["train"]}}


def test_every_forged_manifest_is_refused(made: Path, tmp_path: Path) -> None:
    """The message names the store; nothing outside it is opened, and its numbers size no memory."""
    store = tmp_path / "store"
    shutil.copytree(made, store)
    path, count, harmless = store / "manifest.json", 0, []
    whole = json.loads(path.read_text())
    for what, manifest in changes(whole):
        path.write_text(json.dumps(manifest))
        count += 1
        try:
            found = prepare(CorpusOptions(data=(str(store),)))
            for split in whole["splits"]:
                for shard in found.store.split(split).shards:
                    shard.verify()
                    shard.origins()
            read_sources(store)
            assert found.store.tokenizer
        except UserError as fault:
            assert str(store) in str(fault), what
            assert len(str(fault)) < 11_000
        else:
            harmless.append(what)
    assert count > 350
    # Counts that reading does not use, and no split at all.
    assert all(re.search(r"'bytes'|^\('splits',\) = \{\}", what) for what in harmless), harmless


def test_manifests_that_are_not_json(made: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(made, store)
    for data in (
        b"",
        b"{",
        b"\xff",
        b"[" * 1_000_000,
        b"NaN",
        b'"' * 3,
        pickle.dumps({}),
        b"\0" * 100,
    ):
        (store / "manifest.json").write_bytes(data)
        with pytest.raises(UserError, match=re.escape(str(store))):
            prepare(CorpusOptions(data=(str(store),)))


@pytest.mark.parametrize("data", [b"{", b"[" * 100_000, b"9" * 5000, b"5"])
def test_sources_that_are_no_list_are_refused(data: bytes, made: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(made, store)
    (store / "sources.json").write_bytes(data)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["sources_sha256"] = hashlib.sha256(data).hexdigest()
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"^{store}/sources\.json "):
        read_sources(store)


def test_a_flipped_byte_in_any_file_is_named(made: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(made, store)
    paths = [
        path
        for path in sorted(store.rglob("*"))
        if path.is_file()
        and not path.name.startswith("report.")
        and path.name != "tokenizer_config.json"
    ]
    assert {path.suffix for path in paths} == {".tokens", ".index", ".targets", ".origins", ".json"}
    rng = np.random.default_rng(0)
    for path in paths:
        whole = path.read_bytes()
        for at in {0, len(whole) - 2, *rng.integers(0, len(whole), 12).tolist()}:
            broken = bytearray(whole)
            broken[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(broken)
            try:
                found = prepare(CorpusOptions(data=(str(store),)))
                assert found.store.tokenizer.sha256 == BYTES.sha256
                read_sources(store)
                for split in ("train", "validation"):
                    found.store.split(split).read(0, np.empty(1, np.uint16))
                    found.store.split(split).read_targets(0, np.empty(1, np.uint8))
                    for shard in found.store.split(split).shards:
                        shard.origins()
            except UserError as fault:
                named = (
                    path.parent
                    if path.parent.name == "tokenizer" or path.name == "manifest.json"
                    else path
                )
                assert str(store if path.name == "manifest.json" else named) in str(fault).replace(
                    f"{store} does", f"{store / 'tokenizer'} does"
                ), fault
            else:
                same = path.name in (
                    "manifest.json",
                    "tokenizer.json",
                )  # white space, counts of bytes, unused names
                assert same, (path, at)
        path.write_bytes(whole)


class Trap:
    """Makes a directory when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["TRAP"],)


@pytest.mark.parametrize(
    "name",
    [
        "a.pkl",
        "a.pickle",
        "a.pt",
        "a.pth",
        "a.npz",
        "a.ckpt",
        "a.joblib",
        "meta.pkl",
        "a.npy",
        "a.bin",
        "a.txt",
        "a.jsonl",
    ],
)
def test_nothing_is_ever_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("TRAP", str(tmp_path / "trap"))
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, np.array([Trap()], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(Trap()))
    for what in (path, tmp_path):
        message = refused(tmp_path, what)
        assert name in message
        if name not in ("a.txt", "a.jsonl"):
            assert "pickle" in message
    with pytest.raises(UserError):
        sources.find_sources([str(path)], "sharded")
    assert not (tmp_path / "trap").exists()


# ------------------------------------------------------------------------------------- as a command

COMMANDS = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from consyn_jax.cli.prepare import main
answers = []
for arguments in json.loads(sys.argv[1]):
    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        code = main([*arguments, "--tokenizer", "bytes", "--num_workers", "1"])
    answers.append((code, out.getvalue(), error.getvalue()))
print(json.dumps(answers))
"""


def test_the_command_prints_one_message_and_exits_with_two(tmp_path: Path) -> None:
    """The main faults again, as a user meets them."""
    cases = {
        "cut.txt.gz": damaged("gz", "cut"),
        "corrupt.jsonl.zst": damaged("zst", "corrupt"),
        "latin.txt": "é".encode("latin-1"),
        "deep.jsonl": b"[" * 100_000,
        "binary.txt": b"\0\1\2",
        "tokens.pt": pickle.dumps({}),
    }
    commands = [
        ["--data", str(write(tmp_path, name, data)), "--output", str(tmp_path / "out")]
        for name, data in cases.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for (_, path, *_), (code, out, error) in zip(commands, json.loads(done.stdout), strict=True):
        assert (code, out) == (2, ""), error
        assert "Traceback" not in error
        assert path in error.splitlines()[-1]
    assert not (tmp_path / "out" / "manifest.json").exists()


# ---------------------------------------------------------------------------------- all shared data

ANSWERED = {
    "bpe/train-bpe-reference-vocab.json": "is JSON but not rows",
    "gpu/enwik8-2500-steps-h200.metrics.jsonl": "has no key 'text'",
    "gpu/h200-2026-11-28-parts.json": "is JSON but not rows",
    "gpu/verse-h200.metrics.jsonl": "has no key 'text'",
    "gpu/verse-h200.trace.json.gz": "is JSON but not rows",
    "parity/stories260K/golden.json": "is JSON but not rows",
    "parity/stories260K/golden.npz": "can contain a pickle",
    "parity/stories260K/grads.npz": "can contain a pickle",
    "parity/stories260K/hf/config.json": "is JSON but not rows",
    "parity/stories260K/hf/model.safetensors": "is binary",
    "parity/stories260K/tok512.bin": "an odd number, but tokens have",
    "tokenizers/gpt2/tokenizer.json": "is JSON but not rows",
}
LATIN_1 = {"shakespeare-caesar.txt"}
KEYS = {
    "gsm8k_train.jsonl": {"prompt_key": "question", "completion_key": "answer"},
    "alpaca_en_demo.json": {"text_key": "output"},
}
ENWIK8_BYTES = 100_000_000 if os.environ.get("CONSYN_TEST_HUGE_MB") else 4_000_000


@pytest.mark.slow
@pytest.mark.usefixtures("faster_bytes")
def test_all_of_the_shared_data_goes_through(shared_data: Path, tmp_path: Path) -> None:
    files = sorted(path for path in shared_data.rglob("*") if path.is_file())
    assert len(files) >= 33
    for path in files:
        name = str(path.relative_to(shared_data))
        if name in ANSWERED:
            assert ANSWERED[name] in refused(tmp_path, path), name
            continue
        if path.name == "enwik8.gz":
            with gzip.open(path) as whole:
                path = write(
                    tmp_path,
                    "enwik8.gz",
                    gzip.compress(
                        whole.read(ENWIK8_BYTES).decode("utf-8", "ignore").encode(), compresslevel=1
                    ),
                )
        rules = {
            "normalize": "none",
            "control_characters": "keep",
            "deduplicate": False,
            "validation_fraction": 0.05,
            **KEYS.get(path.name, {}),
        }
        if path.name in LATIN_1:
            assert "is not UTF-8 text: byte 3843 (line 119) is 0xe6" in refused(tmp_path, path)
            rules["invalid_utf8"] = "replace"
        prepared = run(tmp_path, path, **rules)
        store, report = prepared.store, prepared.report
        assert isinstance(store, TokenStore)
        assert report.kept > 0
        splits = [store.split(split) for split in ("train", "validation")]
        assert sum(split.num_documents or 0 for split in splits) == report.kept, name
        if "completion_key" not in rules:  # every byte has its token
            assert (
                sum(split.num_tokens for split in splits)
                == sum(split.num_bytes or 0 for split in splits) + report.kept
            ), name
        assert bool(report.changed) == (path.name in LATIN_1)
        if path.suffix in ("", ".txt", ".md", ".en") and not report.changed:
            assert sum(split.num_bytes or 0 for split in splits) == path.stat().st_size, name
        assert (
            json.loads((store.directory / "report.json").read_text())["documents"]
            == report.documents
        )
        assert "</html>" in (store.directory / "report.html").read_text()
        shutil.rmtree(store.directory)


@pytest.mark.slow
@pytest.mark.usefixtures("faster_bytes")
def test_the_shared_data_as_one_directory(shared_data: Path, tmp_path: Path) -> None:
    """Prepare directories with the default rules."""
    for name, unused in (
        ("gutenberg", {*LATIN_1, "LICENSE.md", "README"}),
        ("bpe", {"train-bpe-reference-vocab.json"}),
        ("wikitext-2", {"test.txt"}),
    ):
        prepared = run(tmp_path, shared_data / name, validation_fraction=0.1)
        left_out = {Path(file).name for file, _ in prepared.left_out}
        assert left_out == unused
        assert prepared.report.documents == len(list((shared_data / name).iterdir())) - len(
            left_out
        )
