"""Eight CPU devices for every test, and where the shared data is."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices are small, and the threads of two test processes wait for each other
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest
from hypothesis import settings

settings.register_profile("plain", deadline=None, max_examples=30)  # how long an example takes is the machine's affair
settings.load_profile("plain")

DATA = Path(os.environ.get("CONSYN_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real corpora and the parity checkpoint; in CI it must be there."""
    if not DATA.is_dir():
        message = "needs the shared data: set CONSYN_TEST_DATA to a folder laid out as ../shared/data"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return DATA


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token stores and compiled programs of tests stay out of the user's cache."""
    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Programs of the same operations, compiled in half the time, which run more slowly; in processes that a test starts, too.

    Not with the mark `users_compiler`, for comparisons with other implementations that hold for the last bits of users' machine code, and
    for what a program costs.
    """
    quick = item.get_closest_marker("users_compiler") is None
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(quick).lower()
    jax.config.update("jax_disable_most_optimizations", quick)
    return (yield)
