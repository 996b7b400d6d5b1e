"""Tasks of Ray with a Ray that is not there: what is sent, and how its errors are said.

tests/integration/test_ray.py has the real one.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consyn_jax.cli.prepare import main
from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.data.preparation.segments import ray_tasks
from consyn_jax.data.preparation.workers import (
    ray_calls,
    ray_cluster,
    ray_pool,
    ray_signals,
    ray_worker,
)
from consyn_jax.data.preparation.workers.messages import WorkerSettings
from consyn_jax.errors import UserError
from consyn_jax.prepare_config import CorpusOptions, EngineOptions
from consyn_jax.tokenization import BPETokenizer


class FakeRay(types.ModuleType):
    """A module that computes each task at once, in this process, on copies as Ray sends them."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.exceptions = errors = types.ModuleType("ray.exceptions")
        errors.RayError = type("RayError", (Exception,), {})
        names = ("RayTaskError", "WorkerCrashedError", "OutOfMemoryError", "NodeDiedError")
        for name in names:
            setattr(errors, name, type(name, (errors.RayError,), {}))
        self.given: dict[str, Any] = {}
        self.calls: list[str] = []
        self.failure: Exception | None = None
        self.on_init: Callable[[], object] = lambda: None

    def init(self, **given: Any) -> None:
        self.given = given
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray puts a handler of its own
        self.on_init()

    def put(self, value: np.ndarray) -> np.ndarray:
        return value

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 3.0}

    def shutdown(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray leaves it
        self.calls.append("shutdown")

    def remote(self, **options: Any) -> Callable[..., Any]:
        self.options = options

        def made(function: Callable[..., Any]) -> Any:
            def remote(*arguments: Any) -> Any:
                self.calls.append("task")
                future: Future[Any] = Future()
                if self.failure is not None:
                    future.set_exception(self.failure)
                else:
                    sent = pickle.loads(pickle.dumps(arguments))  # noqa: S301
                    future.set_result(pickle.loads(pickle.dumps(function(*sent))))  # noqa: S301
                return types.SimpleNamespace(future=lambda: future)

            return types.SimpleNamespace(remote=remote)

        return made


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray_worker._workers.clear()
    return fake


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"Row {n % 290} of many, which has words of its own"} for n in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(data: Path, output: Path, engine: EngineOptions, **more: Any) -> dict[str, bytes]:
    options = CorpusOptions(data=(str(data),), tokenizer="bytes", near_duplicates=0.9, **more)
    prepare(options, output=output, engine=engine)
    return {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file()}


def test_the_store_is_that_of_local_workers(ray: FakeRay, data: Path, tmp_path: Path) -> None:
    local = made(data, tmp_path / "local", EngineOptions(), num_workers=0)
    assert made(data, tmp_path / "ray", EngineOptions("ray")) == local
    assert ray.calls == ["task", "shutdown"]
    assert ray.options == {"num_cpus": 1, "max_retries": ray_calls.RETRIES}
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    cores = len(os.sched_getaffinity(0))
    expected = {"address": "local", "num_cpus": cores, "include_dashboard": False}
    assert {name: ray.given[name] for name in expected} == expected


def test_many_writers_are_tasks_too(ray: FakeRay, data: Path, tmp_path: Path) -> None:
    local = made(data, tmp_path / "local", EngineOptions(), num_workers=0)
    shared = EngineOptions("ray", None, str(tmp_path / "shared"))
    assert made(data, tmp_path / "many", shared) == local
    assert ray.calls[-1] == "shutdown"
    assert ray.calls.count("task") > 10
    ray.failure = ray.exceptions.WorkerCrashedError()
    with pytest.raises(UserError, match="was killed 6 times at the same task"):
        made(data, tmp_path / "killed", shared)
    ray.failure = None
    assert made(data, tmp_path / "killed", shared) == local


@pytest.mark.parametrize(("count", "most"), [(2, 2), (None, 3 * 5 // 4 + 1)])
def test_so_many_tasks_are_in_progress(
    ray: FakeRay,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int | None,
    most: int,
) -> None:
    seen, wait = list[int](), ray_tasks.wait

    def waiting(running: Any, **more: Any) -> Any:
        seen.append(len(running))
        return wait(running, **more)

    monkeypatch.setattr(ray_tasks, "wait", waiting)
    shared = EngineOptions("ray", None, str(tmp_path / "shared"))
    made(data, tmp_path / "many", shared, num_workers=count)
    assert max(seen) == most
    assert ray.given["num_cpus"] == (count or len(os.sched_getaffinity(0)))


def test_where_the_cluster_is(
    ray: FakeRay, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "check_address", lambda *_: None)
    for number, (flag, variable, found) in enumerate(
        [
            ("auto", "", "auto"),
            ("node1:6379", "node2:6379", "node1:6379"),
            ("auto", "node2:6379", "node2:6379"),  # as Ray itself does
            (None, "node2:6379", "node2:6379"),
            (None, "local", "local"),
        ]
    ):
        monkeypatch.setenv("RAY_ADDRESS", variable)
        made(data, tmp_path / str(number), EngineOptions("ray", flag), num_workers=4)
        assert ray.given["address"] == found
        assert ray.given.get("num_cpus") == (4 if found == "local" else None)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("WorkerCrashedError", "was killed 6 times at the same block; running out of memory"),
        ("OutOfMemoryError", "was killed 6 times at the same block; running out of memory"),
        ("NodeDiedError", "The Ray cluster lost a block: the reason. Look at `ray status`"),
        ("ModuleNotFoundError", "A node of the Ray cluster cannot import consyn_jax. Install"),
    ],
)
def test_what_ray_reports_is_said_in_a_sentence(
    ray: FakeRay, data: Path, tmp_path: Path, name: str, sentence: str
) -> None:
    if name == "ModuleNotFoundError":  # Ray raises a class made of its own error and the cause's
        cause = ModuleNotFoundError("the reason", name="consyn_jax")
        kind = type("RayTaskError", (ray.exceptions.RayTaskError, ImportError), {"cause": cause})
        ray.failure = kind("the reason")
    else:
        ray.failure = getattr(ray.exceptions, name)("the reason. More of it.")
    with pytest.raises(UserError, match=sentence):
        made(data, tmp_path / "store", EngineOptions("ray"))
    assert ray.calls[-1] == "shutdown"
    assert made(data, tmp_path / "store", EngineOptions(), num_workers=0)


def test_a_defect_keeps_its_traceback(ray: FakeRay, data: Path, tmp_path: Path) -> None:
    ray.failure = ray.exceptions.RayTaskError("a traceback of the worker")
    with pytest.raises(ray.exceptions.RayTaskError, match="a traceback of the worker"):
        made(data, tmp_path / "store", EngineOptions("ray"))


@pytest.mark.parametrize(
    ("error", "address", "sentence"),
    [
        (
            RuntimeError(
                "Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: "
                "3.12.1\nThis process on node 10.0.0.1 was started with:\n    Ray: 2.60.0\n    "
                "Python: 3.11.7\n"
            ),
            "auto",
            "runs Ray 2.59.0 and Python 3.12.1, this machine Ray 2.60.0 and Python 3.11.7. Install",
        ),
        (
            ConnectionError("Could not find any. Start one."),
            "auto",
            "--ray_address auto: Could not",
        ),
        (ConnectionError("Failed to connect"), "node1:1", "Ray at --ray_address node1:1 refused"),
        (OSError("No room"), None, "A local Ray instance cannot be started: No room. Leave"),
        (Exception("It timed out"), None, "A local Ray instance cannot be started: It timed out"),
    ],
)
def test_a_cluster_that_cannot_be_joined(
    ray: FakeRay,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    address: str | None,
    sentence: str,
) -> None:
    monkeypatch.setattr(ray_cluster, "check_address", lambda *_: None)

    def fail() -> None:
        raise error

    ray.on_init = fail
    with pytest.raises(UserError) as refused:
        ray_cluster.connect(address, None)
    assert sentence in str(refused.value)


def test_sigterm_stays_ours(ray: FakeRay) -> None:
    """Also when it comes while Ray starts, which no exception may interrupt."""
    came: list[int] = []
    seen: list[Any] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        ours = signal.getsignal(signal.SIGTERM)
        ray_cluster.connect(None, None)
        assert signal.getsignal(signal.SIGTERM) is ours
        assert came == []
        ray_cluster.disconnect(ray)
        assert signal.getsignal(signal.SIGTERM) is ours
        ray.on_init = lambda: seen.append((signal.raise_signal(signal.SIGTERM), [*came]))
        ray_cluster.connect(None, None)
        assert seen == [(None, [])]
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_alarm_of_rays_handler_is_cancelled(ray: FakeRay) -> None:
    """Three seconds after a SIGTERM it would abort a process that ends Ray on a busy machine."""

    def alarmed() -> None:
        signal.alarm(100)
        until = time.monotonic() + 60
        while signal.getitimer(signal.ITIMER_REAL)[0]:
            assert time.monotonic() < until
            time.sleep(0.01)

    ray.on_init = alarmed
    ray_cluster.connect(None, None)


def test_the_callers_timer_goes_on(ray: FakeRay) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: came.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 600, 300)
        ray_cluster.connect(None, None)
        left_s, every_s = signal.setitimer(signal.ITIMER_REAL, 0)
        assert 0 < left_s < 600
        assert every_s == 300
        assert came == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_error_while_ray_starts_leaves_the_handlers_as_they_were(ray: FakeRay) -> None:
    def interrupted() -> None:
        signal.raise_signal(signal.SIGINT)  # noted, and sent again after the handlers are back
        raise OSError("No room")

    handlers, install = [signal.getsignal(number) for number in ray_signals.SIGNALS], signal.signal
    ray.on_init = interrupted
    with pytest.raises(KeyboardInterrupt):
        ray_cluster.connect(None, None)
    assert [signal.getsignal(number) for number in ray_signals.SIGNALS] == handlers
    assert signal.signal is install


def test_a_second_signal_while_ray_ends_leaves_no_process(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "shutdown", lambda: signal.raise_signal(signal.SIGINT))
    own = {**os.environ, ray_cluster._MARK: str(os.getpid())}
    with subprocess.Popen(["sleep", "600"], env=own) as left:
        with pytest.raises(KeyboardInterrupt):
            ray_cluster.disconnect(ray)
        assert left.wait(120) == -signal.SIGKILL


def test_a_node_with_other_packages_is_named(
    ray: FakeRay, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = ray_worker.versions()
    theirs = {**ours, "tokenizers": "0.1"}
    monkeypatch.setattr(ray_worker, "versions", lambda: theirs)
    with pytest.raises(UserError) as refused:
        made(data, tmp_path / "store", EngineOptions("ray"))
    said = str(refused.value)
    assert f"of the Ray cluster has tokenizers 0.1 ({ours['tokenizers']} is here). Install" in said


def test_a_worker_is_made_once_for_the_settings(ray: FakeRay) -> None:
    options = CorpusOptions(tokenizer="bytes", document_separator="\n")
    settings = WorkerSettings(options, BPETokenizer.bytes())
    again = WorkerSettings.from_json(json.loads(json.dumps(settings.to_json())))
    assert again.options == options
    assert again.tokenizer.sha256 == settings.tokenizer.sha256
    shared = np.frombuffer(json.dumps(settings.to_json()).encode(), np.uint8)
    head = json.dumps(ray_pool.block_head(ray_pool.Block("text", "a.txt", b"", 1, 0, (9, 2), 9)))
    results = [ray_worker.work(key, shared, head, b"one\ntwo\n") for key in ("a", "a", "b")]
    assert list(ray_worker._workers) == ["b"]
    assert [arrays[1].tolist() for _, arrays in results] == [[4, 4]] * 3


def test_the_users_directory_is_not_searched_for_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(ray_worker, "work", lambda *given: (given, list(sys.path)))
    work = ray_calls._task(ray_cluster.strangers())
    answer = work(ray_worker.versions(), ray_worker.__name__, "work", "key", 1)
    given, path = answer[2]
    assert given == ("key", 1)
    assert str(tmp_path) not in path


@pytest.mark.usefixtures("ray")
def test_the_header_says_where_the_workers_are(
    capfd: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    flags = ("--data", str(data), "--output", str(tmp_path / "store"), "--tokenizer", "bytes")
    assert main([*flags, "--engine", "ray"]) == 0
    assert "workers     tasks of Ray on this machine\n" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--ray_address", "auto"), "--ray_address auto needs --engine ray"),
        (("--shared_directory", "d"), "--shared_directory d needs --engine ray"),
        (("--engine", "ray", "--num_workers", "0"), "--num_workers 0 leaves no tasks"),
        (("--engine", "ray", "--ray_address", "node1"), "must be auto or HOST:PORT"),
        (("--engine", "ray", "--ray_address", "ray://a:1"), "must be auto or HOST:PORT"),
        (("--engine", "ray", "--ray_address", "127.0.0.1:9"), "No Ray cluster answers at"),
    ],
)
@pytest.mark.usefixtures("ray")
def test_flags_that_cannot_be_used(
    capfd: pytest.CaptureFixture[str],
    data: Path,
    tmp_path: Path,
    flags: tuple[str, ...],
    sentence: str,
) -> None:
    common = ("--data", str(data), "--output", str(tmp_path / "store"), "--tokenizer", "bytes")
    assert main([*common, *flags, "--quiet"]) == 2
    said = capfd.readouterr()
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_local_workers_do_not_import_it() -> None:
    code = "import sys; from consyn_jax.data.preparation import cached_store; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"ray", ray_pool.__name__, ray_cluster.__name__} & set(done.stdout.split())


def test_without_ray(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray: FakeRay
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        UserError, match=r"needs ray, which is not installed.*consyn_jax\[cluster\]"
    ):
        made(data, tmp_path / "store", EngineOptions("ray"))


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize("place", ["store", "store/scratch", "."])
def test_segments_do_not_become_data_or_a_part_of_the_store(
    capfd: pytest.CaptureFixture[str], data: Path, tmp_path: Path, place: str
) -> None:
    """Refused before `--overwrite` deletes anything."""
    output = tmp_path / "store"
    made(data, output, EngineOptions(), num_workers=0)
    shared = ("--engine", "ray", "--shared_directory", str(tmp_path / place))
    common = ("--data", str(tmp_path), "--output", str(output), "--tokenizer", "bytes", "--quiet")
    assert main([*common, *shared, "--overwrite"]) == 2
    assert "overlap, so the segments would become part of" in capfd.readouterr().err
    assert (output / "manifest.json").exists()
