"""Eight CPU devices for every test, and where the shared data is."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("untimed")

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
    """Token stores made by tests stay out of the user's cache."""
    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
