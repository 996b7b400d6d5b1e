import shutil
from pathlib import Path

import pytest
from layouts import LAYOUTS, random_params

from consyn_jax.model.pretrained.weights import save_parameters


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, _ = LAYOUTS["llama"]
    directory = tmp_path_factory.mktemp("saved")
    save_parameters(directory, config, random_params(config))
    return directory


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """The directory of a model, to damage."""
    return shutil.copytree(saved, tmp_path / "model")
