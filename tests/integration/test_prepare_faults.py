"""A preparation that is killed, interrupted or out of disk makes the store of an undisturbed one,
or none."""

import errno
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from consyn_jax import files as package_files
from consyn_jax.data.preparation import build, destination
from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.errors import UserError
from consyn_jax.prepare_config import CorpusOptions

# Small blocks and shards and many journals, so that there are many moments to interrupt.
SMALL = """
import functools, json, os, random, signal, sys, time
from pathlib import Path
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.errors import UserError
from consyn_jax.data.preparation import build
from consyn_jax.data.sources import json_reader, text_reader
from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.tokenization import BPETokenizer
# The ids of the tokenizer "bytes", quickly.
BPETokenizer.encode_batch = lambda self, texts, after=None: [list(text.encode()) for text in texts]
text_reader.BLOCK_BYTES = json_reader.BLOCK_BYTES = 60_000
build.JOURNAL_SECONDS = 0.01
build.TokenStoreWriter = functools.partial(build.TokenStoreWriter, shard_tokens=150_000)
def options(corpus, **more):
    rules = dict(tokenizer="bytes", near_duplicates=0.8, validation_fraction=0.1)
    rules |= dict(on_bad_rows="skip", invalid_utf8="replace")
    return CorpusOptions(data=(corpus,), **{**rules, **more})
def prepared(corpus, output, separator, workers, **more):
    rules = options(corpus, document_separator=separator or None, num_workers=int(workers))
    return prepare(rules, output=Path(output), test_fraction=0.05, **more)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with files of every dataset type."""
    place, rng = tmp_path_factory.mktemp("corpus"), random.Random(1)
    words = [
        "tokens",
        "lie",
        "in",
        "shards",
        "é",
        "日本",
        "and",
        "every",
        "document",
        "ends",
        "e\u0301",
        "with",
        "EOS",
        "\x07",
    ]

    def text(n: int) -> str:
        return " ".join(
            rng.choice(words) + (str(rng.randrange(100)) if rng.random() < 0.2 else "")
            for _ in range(n)
        )

    (place / "a.txt").write_text(text(2000))
    (place / "b.md").write_bytes(b"broken \xff bytes " + text(50).encode())
    (place / "c.txt.gz").write_bytes(
        gzip.compress("\n\n\n".join(text(200) for _ in range(150)).encode(), mtime=0)
    )
    long = "\n".join(text(12) for _ in range(24_000))
    (place / "d.txt").write_text(long)
    (place / "e.txt").write_text(long)  # a duplicate in parts
    rows = [text(rng.randrange(60)) for _ in range(1200)]
    rows += rows[100:250] + [row + " nearly" for row in rows[:100]]
    lines = [json.dumps({"text": row}) for row in rows]
    for at in (5, 700, 701, 1300):
        lines[at] = '{"text": 5}'
    (place / "f.jsonl").write_text("\n".join(lines))
    (place / "g.json").write_text(json.dumps([{"text": text(40)} for _ in range(600)], indent=1))
    chats = [
        [{"role": "user", "content": text(9)}, {"role": "assistant", "content": text(30)}]
        for _ in range(800)
    ]
    (place / "h.jsonl.zst").write_bytes(
        pyarrow.compress(
            "".join(json.dumps({"messages": chat}) + "\n" for chat in chats).encode(),
            "zstd",
            asbytes=True,
        )
    )
    pairs = [{"prompt": text(9), "completion": text(9)} for _ in range(500)]
    (place / "i.ndjson").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [text(30) for _ in range(800)]}),
        place / "j.parquet",
        row_group_size=150,
    )
    (place / "k.png").write_bytes(b"\x89PNG\0")
    return place


def options(corpus: Path, **more: Any) -> CorpusOptions:
    rules: dict[str, Any] = {
        "tokenizer": "bytes",
        "near_duplicates": 0.8,
        "on_bad_rows": "skip",
        "invalid_utf8": "replace",
        "validation_fraction": 0.1,
    }
    return CorpusOptions(data=(str(corpus),), **{**rules, **more})


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def assert_same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []


def python(code: str, *arguments: object, **more: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SMALL + code, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def marked(mark: str) -> list[int]:
    """Processes that were started with the environment variable CONSYN_TEST_MARK=mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if (
                f"CONSYN_TEST_MARK={mark}\0".encode() in path.read_bytes()
                and "Z (zombie)" not in (path.parent / "status").read_text()
            ):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def assert_all_end(mark: str, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while left := marked(mark):
        if time.monotonic() > until:
            names = [Path(f"/proc/{pid}/cmdline") for pid in left]
            shown = [name.read_text().replace("\0", " ") for name in names if name.exists()]
            raise AssertionError(f"processes outlive the main process: {shown}")
        time.sleep(0.02)


UNDISTURBED = """
prepared(*sys.argv[1:])
"""


@pytest.fixture(scope="module")
def undisturbed(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, bytes]]:
    """The files of a store by document separator, made without interruption and workers."""
    made: dict[str, dict[str, bytes]] = {}

    def files_of(separator: str) -> dict[str, bytes]:
        if separator not in made:
            output = tmp_path_factory.mktemp("undisturbed") / "store"
            process = python(UNDISTURBED, corpus, output, separator, 0)
            assert process.communicate(timeout=240) == ("", "")
            made[separator] = files(output)
        return made[separator]

    return files_of


# ------------------------------------------------------------------------------------------ workers


@pytest.mark.slow
def test_the_undisturbed_store_has_every_feature(
    undisturbed: Callable[[str], dict[str, bytes]],
) -> None:
    """The tests below compare with this store."""
    report = json.loads(undisturbed("\\n\\n\\n")["report.json"])
    assert report["dropped"]["bad row"] == 4
    assert {"empty", "duplicate", "near duplicate"} < set(report["dropped"])
    assert set(report["changed"]) == {"invalid_utf8", "normalized", "control_characters"}
    assert set(report["splits"]) == {"train", "validation", "test"}
    names = undisturbed("\\n\\n\\n").keys()
    assert sum(name.endswith(".tokens") for name in names) > 5
    assert (
        0
        < sum(name.endswith(".targets") for name in names)
        < sum(name.endswith(".tokens") for name in names)
    )


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("separator", ["", "\\n\\n\\n"])
def test_the_store_does_not_depend_on_the_number_of_workers(
    corpus: Path, tmp_path: Path, undisturbed: Callable[[str], dict[str, bytes]], separator: str
) -> None:
    for workers in (1, 4) if separator else (2,):
        process = python(UNDISTURBED, corpus, tmp_path / str(workers), separator, workers)
        assert process.communicate(timeout=240) == ("", "")
        assert_same(files(tmp_path / str(workers)), undisturbed(separator))


KILL_A_WORKER = """
import contextlib
corpus, output = sys.argv[1:]
children = Path(f"/proc/self/task/{os.getpid()}/children")
def progress(stage, done, total):
    if stage == "tokenize" and done > total // 4:
        for child in children.read_text().split()[-1:]:
            with contextlib.suppress(ProcessLookupError):  # it may just have ended
                os.kill(int(child), signal.SIGKILL)
try:
    prepared(corpus, output, "", 2, progress=progress)
except UserError as fault:
    print(fault)
"""


@pytest.mark.slow
def test_a_worker_that_is_killed(
    corpus: Path, tmp_path: Path, undisturbed: Callable[[str], dict[str, bytes]]
) -> None:
    output = tmp_path / "store"
    process = python(
        KILL_A_WORKER, corpus, output, env={**os.environ, "CONSYN_TEST_MARK": str(tmp_path)}
    )
    said, complaint = process.communicate(timeout=240)
    assert said.startswith(
        "A worker process was killed by signal 9; running out of memory is the usual cause. Lower "
        "--num_workers, and run the same command again."
    )
    assert complaint == ""
    assert_all_end(str(tmp_path))
    again = python(UNDISTURBED, corpus, output, "", 1)
    assert again.communicate(timeout=240) == ("", "")
    assert_same(files(output), undisturbed(""))


@pytest.mark.slow
def test_workers_end_with_a_main_process_that_is_killed(corpus: Path, tmp_path: Path) -> None:
    for moment in ("hash", "tokenize"):
        code = f"""
def progress(stage, done, total):
    if stage == "{moment}" and done >= total // 4:
        os.kill(os.getpid(), signal.SIGKILL)
prepare(options(sys.argv[1], num_workers=3), output=Path(sys.argv[2]), progress=progress)
"""
        process = python(
            code, corpus, tmp_path / moment, env={**os.environ, "CONSYN_TEST_MARK": str(tmp_path)}
        )
        _, complaint = process.communicate(timeout=240)
        assert process.returncode == -signal.SIGKILL
        assert complaint == ""  # the workers print nothing either
        assert_all_end(str(tmp_path))


@pytest.mark.parametrize(
    "delay",
    [
        0.0,
        *(
            pytest.param(delay, marks=[pytest.mark.slow, pytest.mark.exhaustive])
            for delay in (0.05, 0.3)
        ),
        1.0,
    ],
)
def test_ctrl_c_ends_the_whole_group_without_a_traceback(
    corpus: Path, tmp_path: Path, delay: float
) -> None:
    """Also while the workers are being started."""
    code = """
def progress(stage, done, total):
    if stage == "hash" and done == total:
        print("now", flush=True)
    if stage == "tokenize" and done > 0.9 * total:
        time.sleep(600)  # the signal comes before the end
try:
    prepare(options(sys.argv[1], num_workers=3), output=Path(sys.argv[2]), progress=progress)
except KeyboardInterrupt:
    print("interrupted")
"""
    process = python(
        code,
        corpus,
        tmp_path / "store",
        env={**os.environ, "CONSYN_TEST_MARK": str(tmp_path)},
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    said, complaint = process.communicate(timeout=240)
    assert complaint == ""
    assert said == "interrupted\n"
    assert_all_end(str(tmp_path))


# -------------------------------------------------------------------------------------------- kills

# Attempts are forked from one process that has imported everything, which saves time.
KILLED_AGAIN_AND_AGAIN = """
corpus, output, separator, workers, seed, wanted = sys.argv[1:]
rng, kills, chains, expected_s = random.Random(int(seed)), 0, 0, float(os.environ["EXPECTED_S"])
def attempt(store):
    try:
        prepared(corpus, store, separator, workers)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
while kills < int(wanted):
    store, chains, tries = Path(output) / str(chains), chains + 1, 0
    while True:
        tries += 1
        pid = os.fork()
        if pid == 0:
            attempt(store)
        # Some at once, some after a while, and some late.
        delays = 0.1, 0.3 * expected_s, expected_s
        until = time.monotonic() + rng.choice([rng.uniform(0, longest) for longest in delays])
        done = 0
        while not done and (time.monotonic() < until or kills >= int(wanted)):
            done, status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.002)
        if done:
            assert status == 0, status
            break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
print(kills, chains)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "separator", "seed"),
    [
        pytest.param(0, "\\n\\n\\n", 3, marks=pytest.mark.exhaustive),
        pytest.param(1, "", 1, marks=pytest.mark.exhaustive),
        (2, "\\n\\n\\n", 2),
    ],
)
def test_killed_at_random_moments(
    corpus: Path,
    tmp_path: Path,
    undisturbed: Callable[[str], dict[str, bytes]],
    workers: int,
    separator: str,
    seed: int,
) -> None:
    expected = undisturbed(separator)
    environment = {
        **os.environ,
        "CONSYN_TEST_MARK": str(tmp_path),
        "EXPECTED_S": os.environ.get("CONSYN_TEST_EXPECTED_S", "1"),
    }
    process = python(
        KILLED_AGAIN_AND_AGAIN,
        corpus,
        tmp_path / "stores",
        separator,
        workers,
        seed,
        20,
        env=environment,
    )
    said, complaint = process.communicate(timeout=200)
    assert complaint == ""
    kills, chains = map(int, said.split())
    assert kills == 20
    for chain in range(chains):
        assert_same(files(tmp_path / "stores" / str(chain)), expected)
    assert_all_end(str(tmp_path))


# Calls that open, make, rename or remove a file are counted, and one of them kills the process.
KILLED_AT_AN_OPERATION = """
corpus, output, separator, seed = sys.argv[1:]
rng = random.Random(int(seed))
Path(output).mkdir()
counted = [0]
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
def run(store, at):
    def hook(event, arguments):
        if event in CHANGES and output in str(arguments[0]):
            counted[0] += 1
            if counted[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    prepared(corpus, store, separator, 0)
def forked(store, at):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            run(store, at)
            os.write(write, str(counted[0]).encode())
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write)
    said = os.read(read, 100)
    os.close(read)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said
code, total = forked(Path(output) / "counted", 0)
assert code == 0
kills = 0
for chain in range(2):
    store = Path(output) / str(chain)
    early, later = rng.sample(range(1, 40), 8), [rng.randrange(1, int(total)) for _ in range(3)]
    for at in (*sorted(early), *later, int(total) - 5 * chain - 1):
        code, _ = forked(store, at)
        kills += code == -9
        assert code in (0, -9), code
    assert forked(store, 0)[0] == 0
print(kills, int(total))
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_killed_between_any_two_changes_on_the_disk(
    corpus: Path, tmp_path: Path, undisturbed: Callable[[str], dict[str, bytes]]
) -> None:
    separator = "\\n\\n\\n"
    process = python(KILLED_AT_AN_OPERATION, corpus, tmp_path / "stores", separator, 5)
    said, complaint = process.communicate(timeout=200)
    assert complaint == ""
    kills, total = map(int, said.split())
    assert total > 40
    assert kills >= 12
    for name in ("counted", "0", "1"):
        assert_same(files(tmp_path / "stores" / name), undisturbed(separator))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_killed_while_a_single_row_is_cut_by_position(tmp_path: Path) -> None:
    """The row is read a second time, which must not resume from the files of the first time."""
    (tmp_path / "one.jsonl").write_text(
        json.dumps({"text": " ".join(map(str, range(60_000)))}) + "\n" * 300_000
    )
    code = """
build.JOURNAL_SECONDS = 0
told = [0]
def progress(stage, done, total):
    told[0] += stage == "tokenize"
    if told[0] == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
prepare(options(sys.argv[1], num_workers=0), output=Path(sys.argv[2]), progress=progress)
print(told[0])
"""
    said, complaint = python(code, tmp_path / "one.jsonl", tmp_path / "whole", -1).communicate(
        timeout=240
    )
    assert complaint == ""
    for at in range(1, int(said) + 1):
        killed = python(code, tmp_path / "one.jsonl", tmp_path / "killed", at)
        assert killed.communicate(timeout=240)[1] == ""
        assert killed.returncode in (0, -signal.SIGKILL)
    assert (
        python(code, tmp_path / "one.jsonl", tmp_path / "killed", -1).communicate(timeout=240)[1]
        == ""
    )
    assert_same(files(tmp_path / "killed"), files(tmp_path / "whole"))
    assert set(json.loads((tmp_path / "whole" / "report.json").read_text())["splits"]) == {
        "train",
        "validation",
    }


# ------------------------------------------------------------------------------------------ no room

LIMITED = """
import resource
corpus, output, limit = sys.argv[1:]
# Writing more to a file fails with EFBIG.
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    prepared(corpus, output, "", 0)
except UserError as fault:
    print(fault)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "limit",
    [
        pytest.param(100, marks=pytest.mark.slow),
        9_000,
        pytest.param(100_000, marks=pytest.mark.slow),
    ],
)
def test_files_that_may_not_grow(
    corpus: Path, tmp_path: Path, undisturbed: Callable[[str], dict[str, bytes]], limit: int
) -> None:
    output = tmp_path / "store"
    for _ in range(2):
        said, complaint = python(LIMITED, corpus, output, limit).communicate(timeout=240)
        assert complaint == ""
        assert said.count("\n") == 1
        assert "File too large" in said
        assert str(output) in said
        assert not (output / "manifest.json").exists()
    assert python(UNDISTURBED, corpus, output, "", 0).communicate(timeout=240) == ("", "")
    assert_same(files(output), undisturbed(""))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_command_reports_a_full_disk_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"row {at} " * 20}) + "\n" for at in range(5000))
    )
    flags = [
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--output",
        str(tmp_path / "store"),
        "--tokenizer",
        "bytes",
        "--quiet",
    ]
    limited = "import resource, sys; limit = int(sys.argv.pop(1)); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); "
    limited += "from consyn_jax.cli.prepare import main; sys.exit(main())"
    for limit in (0, 5000, 200_000):
        done = subprocess.run(
            [sys.executable, "-c", limited, str(limit), *flags],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1, done.stderr
        assert "File too large" in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "consyn_jax.cli.prepare", *flags],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole = prepare(
        CorpusOptions(data=(flags[1],), tokenizer="bytes", num_workers=0), output=tmp_path / "whole"
    )
    assert_same(files(tmp_path / "store"), files(whole.store.directory))  # type: ignore[union-attr]


class Full:
    """Patches system calls: from call number `at` on, no file under `directory` can be written."""

    def __init__(self, patch: pytest.MonkeyPatch, directory: Path, at: int, code: int) -> None:
        self.directory, self.at, self.code, self.calls = str(directory), at, code, 0
        for owner, name in (
            (os, "fsync"),
            (os, "mkdir"),
            (os, "rename"),
            (os, "replace"),
            (os, "open"),
            (Path, "open"),
        ):
            patch.setattr(owner, name, self.failing(getattr(owner, name)))

    def failing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(what: Any, *arguments: Any, **more: Any) -> Any:
            path = (
                str(Path(f"/proc/self/fd/{what}").readlink())
                if isinstance(what, int)
                else os.fspath(what)
            )
            mode = (
                (arguments[0] if arguments else more.get("mode", "r"))
                if call.__qualname__ == "Path.open"
                else "w"
            )
            if path.startswith(self.directory) and (mode[0] in "wax" or "+" in mode):
                self.calls += 1
                if self.calls >= self.at:
                    raise OSError(self.code, os.strerror(self.code), path)
            return call(what, *arguments, **more)

        return instead


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "tokenizer"),
    [
        (errno.ENOSPC, "bytes"),
        (errno.EROFS, "bytes"),
        (errno.EACCES, "bytes"),
        (errno.ENOSPC, "train:280"),
    ],
)
def test_a_failure_of_every_system_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, tokenizer: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"row {at} " * 5}) + "\n" for at in range(60))
    )
    monkeypatch.setattr(build, "JOURNAL_SECONDS", 0)
    what = CorpusOptions(
        data=(str(tmp_path / "rows.jsonl"),),
        tokenizer=tokenizer,
        num_workers=0,
        near_duplicates=0.9,
        validation_fraction=0.2,
    )
    expected = files(prepare(what, output=tmp_path / "whole").store.directory)  # type: ignore[union-attr]
    output, at, done = tmp_path / "store", 0, False
    while True:
        at += 1
        with pytest.MonkeyPatch.context() as patch:
            full = Full(patch, output, at, code)
            try:
                prepare(what, output=output)
            except UserError as fault:
                assert os.strerror(code) in str(fault), fault  # noqa: PT017
                assert str(output) in str(fault)  # noqa: PT017
            else:
                done = full.calls < at
        if (output / "manifest.json").exists():  # only temporary files could not be removed
            prepare(what, output=output)
            assert_same(files(output), expected)
            if done:
                break
        if at % 3:  # otherwise the next preparation finds the files of this one
            prepare(what, output=output)
            assert_same(files(output), expected)
            shutil.rmtree(output)
    assert at > 15


def test_dev_full_in_place_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device fails with ENOSPC when a buffer is written."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"row {at} " * 5}) + "\n" for at in range(60))
    )
    what = CorpusOptions(
        data=(str(tmp_path / "rows.jsonl"),), tokenizer="bytes", num_workers=0, near_duplicates=0.9
    )
    monkeypatch.setattr(build, "JOURNAL_SECONDS", 0)
    for name in ("tokenizer.json", "journal.json", "report.html", "report.json", "manifest.json"):
        output = tmp_path / "store"
        with pytest.MonkeyPatch.context() as patch:

            def opened(
                path: str | Path,
                flags: int,
                mode: int = 0o644,
                name: str = name,
                real: Any = package_files.open_regular,
            ) -> int:
                if Path(path).name.startswith(f".{name}.") and flags & os.O_WRONLY:
                    return os.open("/dev/full", os.O_WRONLY)
                return int(real(path, flags, mode))

            patch.setattr(package_files, "open_regular", opened)
            patch.setattr(os, "fsync", lambda _: None)  # /dev/full has none
            with pytest.raises(UserError, match="No space left on device"):
                prepare(what, output=output)
        assert not (output / "manifest.json").exists()
        prepare(what, output=output)
        shutil.rmtree(output)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("some text " * 200_000)
    os.utime(tmp_path / "a.txt", (0, 0))
    (tmp_path / "file").write_text("")
    for place in (
        tmp_path / "file",
        tmp_path / "file" / "below",
        Path("/proc/nothing"),
        Path("/dev/null"),
    ):
        monkeypatch.setenv("CONSYN_CACHE", str(place))
        with pytest.raises(UserError, match=r"cannot be written: .* Set CONSYN_CACHE"):
            prepare(
                CorpusOptions(data=(str(tmp_path / "a.txt"),), tokenizer="bytes", num_workers=0)
            )


@pytest.mark.parametrize("link", ["store", "cache", "cache/stores"])
def test_a_link_that_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    monkeypatch.setattr(destination, "LOCK_POLL_SECONDS", 0.001)
    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / link).symlink_to("/gone/away")
    in_cache = link.startswith("cache")
    with pytest.raises(UserError, match="or a broken link") as fault:
        prepare(
            CorpusOptions(data=(str(tmp_path / "a.txt"),), tokenizer="bytes", num_workers=0),
            output=None if in_cache else tmp_path / "store",
        )
    assert str(tmp_path / link) in str(fault.value)
    assert ("Set CONSYN_CACHE" if in_cache else "Give another --output.") in str(fault.value)


@pytest.fixture(autouse=True)
def no_processes_left() -> Iterator[None]:
    """No test may leave workers running."""
    yield
    assert not [
        child
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        if "worker_pool" in _command(child)
    ]


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
