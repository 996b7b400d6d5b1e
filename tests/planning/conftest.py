"""Compiling for GPUs and TPUs: as users do, and only where the compiler is installed."""

import os

import pytest

from consyn_jax.errors import UserError
from consyn_jax.planning import aot


def pytest_itemcollected(item: pytest.Item) -> None:
    """Compile with the optimisations that users have."""
    item.add_marker("users_compiler")


def require(compiler: str) -> None:
    """Skip where the packages of a compiler are missing, unless CI demands them."""
    try:
        aot.check_packages(compiler)
    except UserError as missing:
        if os.environ.get(f"CONSYN_TEST_{compiler.upper()}_PACKAGES") == "required":
            pytest.fail(str(missing))
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def cuda_packages() -> None:
    """Require the compiler for NVIDIA GPUs."""
    require("cuda")


@pytest.fixture
def tpu_packages() -> None:
    """Require the compiler for TPUs."""
    require("tpu")
