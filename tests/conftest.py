"""Eight CPU devices for every test, where the shared data is, and what makes the tests quick."""

import ctypes
import gc
import importlib.util
import os
import platform
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# Matrices are small, and the threads of two test processes wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("WANDB__SERVICE_WAIT", "240")  # seconds for its process to start

# Compiled programs are kept: for the other worker, for processes that tests start, and for the
# next time the tests run. JAX's key of an entry has the versions, the flags and the program.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).parents[1] / ".pytest_cache" / "programs" / platform.node()),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
from compared_packages import COMPARED_WITH, OTHERS
from hypothesis import settings

from consyn_jax.errors import leave_out_overwrite

# Compiled in 0.6 of the time: XLA's older code generator for the CPU, in one piece a program.
# JAX 0.11 and later do not have it, and XLA ends a process for a flag that it does not know.
USERS_FLAGS = os.environ.get("XLA_FLAGS", "")
QUICK_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 11):
    QUICK_FLAGS = ""
os.environ["XLA_FLAGS"] = f"{USERS_FLAGS} {QUICK_FLAGS}".strip()

# Temporary files in memory where there is room: a test writes many small ones, and flushes them.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 8 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# How long an example takes depends on the machine.
settings.register_profile("plain", deadline=None, max_examples=30)
settings.load_profile("plain")

DATA = Path(os.environ.get("CONSYN_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


# `nohup pytest &` hands on an ignored SIGINT, which processes that tests start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

INSTALLED = {name for name in ("peft", "bitsandbytes") if importlib.util.find_spec(name)}
HAS_TORCH = importlib.util.find_spec("torch") is not None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out files that compare with torch, transformers or others that are not installed.

    CI runs them in the environment that has both (`.ci/run`).
    """
    if collection_path.suffix != ".py":
        return None
    text = collection_path.read_text()
    lacks_other = any(name not in INSTALLED for name in OTHERS.findall(text))
    return (not HAS_TORCH and bool(COMPARED_WITH.search(text))) or lacks_other or None


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name compressed values by their size: their bytes can have the time in them, and the workers of
    a run must collect tests of equal names.
    """
    is_binary = isinstance(val, bytes) and not val.isascii()
    return f"{len(val)} bytes" if is_binary else None  # type: ignore[arg-type]


@pytest.hookimpl(trylast=True)  # after `-m` and `-k`
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The same for single tests, by their mark `torch`; and each worker begins with long tests."""
    if not HAS_TORCH:
        left_out = [item for item in items if item.get_closest_marker("torch")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    if worker := getattr(config, "workerinput", None):
        items[:] = dealt(items, worker["workercount"])


def dealt(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """The tests in an order in which each worker begins with long ones.

    At first, each worker gets an equal part of the list (`--dist=worksteal`), one after another. So
    each part begins with its share of the long tests.
    """
    long = [item for item in items if item.get_closest_marker("long")]
    others = [item for item in items if not item.get_closest_marker("long")]
    ordered = list[pytest.Item]()
    for number in range(workers):
        size = (len(items) - len(ordered)) // (workers - number)
        share = long[number::workers]
        count = max(0, size - len(share))
        ordered += share + others[:count]
        del others[:count]
    return ordered + others


def pytest_collection_finish() -> None:
    """Leave out all that was imported when Python searches for unused cycles.

    In a million objects each search takes a third of a second. Training freezes and thaws objects,
    too. In this process that is turned off: thawing would undo this, and freezing would keep the
    arrays of earlier tests.
    """
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


def pytest_unconfigure(config: pytest.Config) -> None:
    """Keep the newest compiled programs only, once a day."""
    if not hasattr(config, "workerinput"):
        from consyn_jax.training.runtime.compilation_cache import tidy

        tidy(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real corpora and the parity checkpoint; in CI it must be there."""
    if not DATA.is_dir():
        message = (
            "needs the shared data: set CONSYN_TEST_DATA to a folder laid out as ../shared/data"
        )
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return DATA


@pytest.fixture(autouse=True)
def own_advice() -> None:
    """No test is told what an --overwrite of another test has deleted."""
    leave_out_overwrite(False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token stores and compiled programs of tests stay out of the user's cache."""
    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def short_endings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process generate no sample and draw no `loss.png`.

    They are short, and either would take a third of their time. Both are done in processes that a
    test starts, and have tests of their own.
    """
    if ending := sys.modules.get("consyn_jax.training.run.ending"):
        monkeypatch.setattr(ending, "sample", lambda *_: "A sample that no model generated.")
        monkeypatch.setattr(
            ending, "write_loss_plot", lambda _, path: path.write_bytes(b"\x89PNG, not drawn")
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Programs of the same operations, compiled in half the time, which run more slowly; in
    processes that a test starts, too.

    Not with the mark `users_compiler`, for comparisons with other implementations that hold for the
    last bits of users' machine code, and for what a program costs. (XLA reads its flags once a
    process, so these have users' code generator only in the processes that they start.)
    """
    quick = item.get_closest_marker("users_compiler") is None
    os.environ["XLA_FLAGS"] = f"{USERS_FLAGS} {QUICK_FLAGS if quick else ''}".strip()
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(quick).lower()
    jax.config.update("jax_disable_most_optimizations", quick)
    result = yield
    if resident_bytes() > MOST_MEMORY:
        forget_programs()
    return result


MOST_MEMORY = 3 << 29  # bytes of a process after a test


def resident_bytes() -> int:
    """Memory of this process; 0 where the system has no /proc."""
    counts = Path("/proc/self/statm")
    pages = int(counts.read_text().split()[1]) if counts.exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def forget_programs() -> None:
    """Give memory back: compiled programs, and what runs keep in malloc (`keep_freed_memory`).

    Four workers grew to 17 GB together. Where a machine has little more, the system drops the pages
    of files, and reads libraries from disk again and again: a test of 3 s took 185.
    """
    jax.clear_caches()
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)
