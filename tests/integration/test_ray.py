"""`consyn-prepare --engine ray` on real Ray: the bytes of a local store, whatever is killed.

Two raylets on this machine are two nodes. The whole of it, ten moments for each kind:

    CONSYN_RAY_KILLS=10 CONSYN_RAY_RECORD=ray.json pytest -m slow tests/integration/test_ray.py
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ray_nodes import Nodes, missing, running

from .conftest import cannot_run
from .test_prepare_faults import SMALL, assert_all_end, assert_same, corpus, files, marked

KILLS = int(os.environ.get("CONSYN_RAY_KILLS", "1"))
RECORD = os.environ.get("CONSYN_RAY_RECORD")
LONG_S = 240
STAGES = ("tokenize", "deduplicate", "write")  # of many writers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900 + 120 * KILLS)]
__all__ = ["corpus"]

# Prints "now" and waits for a line where the store has reached a share of the data.
DRIVER = """
from consyn_jax.prepare_config import EngineOptions
from consyn_jax.data.preparation.segments import many_writers
many_writers.SHARD_TOKENS, many_writers.LEAST_SEGMENT_BYTES = 150_000, 150_000
corpus, output, engine, address, shared, at, share, seconds = sys.argv[1:]
out, sys.stdout = sys.stdout, sys.stderr  # for Ray's notes about lost workers
held = float(share) < 1
def progress(stage, done, total):
    global held
    if held and stage == at and done >= float(share) * total:
        held = False
        print("now", file=out, flush=True)
        sys.stdin.readline()
        time.sleep(float(seconds))
try:
    prepared(corpus, output, "", 2, progress=progress,
        engine=EngineOptions(engine, address or None, shared or None))
except UserError as error:
    print(error, file=out)
"""


def driver(
    corpus: Path,
    output: Path,
    nodes: Nodes | None,
    share: float = 1.0,
    seconds: float = 0.0,
    before: str = "",
    shared: Path | str = "",
    stage: str = "tokenize",
) -> "subprocess.Popen[str]":
    """A preparation with small blocks, on a cluster or with the workers of this machine.

    It says "now", and goes on after a line and `seconds`, at a share of a stage.
    """
    where = ("ray", nodes.address) if nodes else ("local", "")
    code = SMALL + before + DRIVER
    command = [sys.executable, "-X", "faulthandler", "-c", code, corpus, output, *where]
    return subprocess.Popen(
        [*map(str, command), str(shared), stage, str(share), str(seconds)],
        env=nodes.environment if nodes else None,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: "subprocess.Popen[str]", said: str = "") -> str:
    """Wait for a preparation that ends well; return what it wrote to stderr."""
    out, complaint = process.communicate(timeout=LONG_S)
    assert (process.returncode, out) == (0, said), complaint
    return complaint


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    if reason := missing():
        cannot_run(reason)
    with running() as found:
        found.add()
        found.wait(2)
        yield found


@pytest.fixture(scope="module")
def local(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the store that the workers of this machine make."""
    output = tmp_path_factory.mktemp("local") / "store"
    finished(driver(corpus, output, None))
    return files(output)


def test_the_store_of_two_nodes_is_the_local_one(
    nodes: Nodes, corpus: Path, tmp_path: Path, local: dict[str, bytes]
) -> None:
    """With rows, tables, compressed files, long texts, prompts, exact and near duplicates."""
    finished(driver(corpus, tmp_path / "store", nodes))
    assert_same(files(tmp_path / "store"), local)
    dropped = json.loads(local["report.json"])["dropped"]
    assert dropped["duplicate"]
    assert dropped["near duplicate"]


def test_many_writers_on_two_nodes_make_the_local_store(
    nodes: Nodes, corpus: Path, tmp_path: Path, local: dict[str, bytes]
) -> None:
    finished(driver(corpus, tmp_path / "store", nodes, shared=tmp_path / "shared"))
    assert_same(files(tmp_path / "store"), local)
    assert list((tmp_path / "shared").iterdir()) == []


def kill_workers(nodes: Nodes, process: "subprocess.Popen[str]") -> int:
    """Kill the workers of a preparation that waits for a line; return their number.

    Ray may just have ended the idle ones. Then the preparation goes on, which starts others.
    """
    workers = nodes.workers()
    if not workers:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    while not workers and process.poll() is None:
        workers = nodes.workers()
    for pid in workers:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(pid, signal.SIGKILL)
    return len(workers)


@pytest.mark.parametrize("writers", ["one", "many"])
@pytest.mark.parametrize("victim", ["worker", "raylet", "driver"])
def test_whatever_is_killed_the_bytes_are_the_same(
    nodes: Nodes, corpus: Path, tmp_path: Path, local: dict[str, bytes], victim: str, writers: str
) -> None:
    rng, moments = random.Random(f"{victim} {KILLS}"), []
    for number in range(KILLS):
        share, seconds, output = rng.random() * 0.9, rng.random() * 0.05, tmp_path / str(number)
        shared = tmp_path / "shared" if writers == "many" else ""
        stage = STAGES[number % len(STAGES)] if writers == "many" else "tokenize"
        process = driver(corpus, output, nodes, share, seconds, shared=shared, stage=stage)
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "now\n", process.communicate()
        killed = 1
        if victim == "driver":
            process.stdin.write("\n")
            process.stdin.flush()
            process.kill()
            process.communicate()
            assert not (output / "manifest.json").exists()
            process = driver(corpus, output, nodes, shared=shared)
        elif victim == "worker":
            killed = kill_workers(nodes, process)
        else:
            nodes.kill(nodes.newest)
        assert killed
        finished(process)
        assert_same(files(output), local)
        if victim == "raylet":
            nodes.wait(1)
            nodes.add()
            nodes.wait(2)
        moments.append({"stage": stage, "share": round(share, 3), "processes": killed})
    if RECORD:
        path = Path(RECORD)
        record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        record[f"{victim}, {writers} writers"] = {
            "kills": KILLS,
            "bytes_equal": True,
            "moments": moments,
        }
        path.write_text(json.dumps(record, indent=1) + "\n")


def test_a_task_that_is_killed_again_and_again(nodes: Nodes, corpus: Path, tmp_path: Path) -> None:
    """As by the kernel for memory: a sentence, and the store can go on."""
    before = """
from consyn_jax.data.preparation.workers import ray_calls
ray_calls.RETRIES = 1
def dying(strangers):
    def work(expected, module, name, key, shared, head, data):
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    return work
ray_calls._task = dying
"""
    complaint = finished(
        driver(corpus, tmp_path / "store", nodes, before=before),
        "A worker process on the Ray cluster was killed 2 times at the same block; running out of "
        "memory is the usual cause. Give Ray fewer CPUs on each node, or lower --num_workers, and "
        "run the same command again; it continues.\n",
    )
    assert "Traceback" not in complaint


def test_a_defect_of_a_task_is_not_repeated(nodes: Nodes, corpus: Path, tmp_path: Path) -> None:
    before = f"""
from consyn_jax.data.preparation.workers import ray_calls
def failing(strangers):
    def work(expected, module, name, key, shared, head, data):
        import os, zlib
        file = os.open({str(tmp_path / "tries")!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, b"%d\\n" % zlib.crc32(head.encode()))
        raise ZeroDivisionError("a defect")
    return work
ray_calls._task = failing
"""
    process = driver(corpus, tmp_path / "store", nodes, before=before)
    _, complaint = process.communicate(timeout=LONG_S)
    assert process.returncode == 1
    assert "ZeroDivisionError: a defect" in complaint
    tries = (tmp_path / "tries").read_text().split()
    assert len(tries) == len(set(tries))


def command(*flags: object, env: dict[str, str], **more: Any) -> "subprocess.Popen[str]":
    """`consyn-prepare` as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "consyn_jax.cli.prepare", *map(str, flags), "--tokenizer", "bytes"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def test_a_damaged_document_is_named_as_locally(nodes: Nodes, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_bytes(b"a line of text\n" * 200_000 + b"and \xff\n" + b"another line\n" * 1000)
    said = {}
    for engine, more in (("local", ()), ("ray", ("--ray_address", nodes.address))):
        flags = ("--data", text, "--output", tmp_path / engine, "--engine", engine, *more)
        process = command(*flags, env=nodes.environment)
        _, complaint = process.communicate(timeout=LONG_S)
        assert process.returncode == 2
        # Ray may print after it.
        lines = complaint.splitlines()
        (said[engine],) = [line for line in lines if line.startswith("consyn-prepare: ")]
    assert said["ray"] == said["local"]
    assert "line 200001" in said["ray"]


def test_what_cannot_be_reached_is_named(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 1000)
    flags = ("--data", tmp_path / "a.txt", "--output", tmp_path / "store", "--engine", "ray")
    (tmp_path / "token").write_text("0" * 64)
    other = {**nodes.environment, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    for address, env, words in (
        ("127.0.0.1:9", nodes.environment, "No Ray cluster answers at --ray_address 127.0.0.1:9"),
        (nodes.address, other, "refused this machine"),
    ):
        process = command(*flags, "--ray_address", address, env=env)
        _, complaint = process.communicate(timeout=LONG_S)
        assert (process.returncode, words in complaint) == (2, True), complaint
        assert "Traceback" not in complaint


def named(mark: str) -> dict[int, str]:
    """The commands of the processes with a mark."""
    found = {}
    for pid in marked(mark):
        with suppress(OSError):  # it has ended
            found[pid] = Path(f"/proc/{pid}/cmdline").read_text()
    return found


def await_process(mark: str, word: str, command: "subprocess.Popen[str]") -> None:
    """Wait until a process of Ray whose command has a word runs beside `command`."""
    until = time.monotonic() + LONG_S
    while not any(word in name for name in named(mark).values()):
        assert command.poll() is None, command.communicate()
        assert time.monotonic() < until, named(mark)
        time.sleep(0.02)


def end_agents(mark: str) -> None:
    """After a kill, wait until Ray's node has ended, and kill its agents, which may stay a while."""
    until = time.monotonic() + LONG_S
    while True:
        names = named(mark)
        words = ("raylet/raylet", "gcs_server", "ray::work", "ray::IDLE", "cli.prepare")
        if not any(word in name for name in names.values() for word in words):
            break
        assert time.monotonic() < until, names
        time.sleep(0.05)
    for pid in names:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_ray_of_this_machine_ends_with_the_command(tmp_path: Path) -> None:
    """Also when the command is interrupted or killed, and while Ray starts."""
    if reason := missing():
        cannot_run(reason)
    (tmp_path / "a.txt").write_text("some text in lines\n" * 400_000)
    (tmp_path / "home").mkdir()
    env = {**os.environ, "HOME": str(tmp_path / "home"), "CONSYN_TEST_MARK": str(tmp_path)}
    env |= {"CONSYN_CACHE": str(tmp_path / "cache")}
    shared = ("--data", tmp_path / "a.txt", "--document_separator", "7")
    made = command(*shared, "--output", tmp_path / "local", env=env)
    assert made.communicate(timeout=LONG_S)[0] == ""
    flags = (*shared, "--engine", "ray", "--num_workers", "1", "--output", tmp_path / "store")
    for number, code, beside in (
        (signal.SIGINT, 75, "ray::"),
        (signal.SIGTERM, 75, "gcs_server"),
        (signal.SIGTERM, 75, "ray::"),
        (signal.SIGKILL, -9, "ray::"),
        (None, 0, ""),
    ):
        process = command(*flags, env=env, start_new_session=True)
        if number is not None:
            await_process(str(tmp_path), beside, process)
            if number == signal.SIGINT:
                os.killpg(process.pid, number)  # as the terminal does
            else:
                os.kill(process.pid, number)
        _, complaint = process.communicate(timeout=LONG_S)
        assert process.returncode == code, complaint
        assert "Traceback" not in complaint
        if number == signal.SIGKILL:
            end_agents(str(tmp_path))
        assert_all_end(str(tmp_path))
    assert_same(files(tmp_path / "store"), files(tmp_path / "local"))
