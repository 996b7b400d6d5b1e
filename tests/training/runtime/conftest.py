from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from consyn_jax.training.runtime.compilation_cache import SETTINGS


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of programs, which does not exist yet, and JAX without a configured cache."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", *SETTINGS)
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield tmp_path / "cache" / "programs"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
