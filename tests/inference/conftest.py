from pathlib import Path

import pytest
from small_runs import trained


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory; copy it to change it."""
    path = tmp_path_factory.mktemp("runs") / "run"
    trained(path)
    return path
