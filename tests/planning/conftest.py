"""Compiling for GPUs: as users do, and only where the CUDA packages are installed."""

import os

import pytest

from consyn_jax.errors import UserError
from consyn_jax.planning import aot


def pytest_itemcollected(item: pytest.Item) -> None:
    """Compile with the optimisations that users have."""
    item.add_marker("users_compiler")


@pytest.fixture
def cuda_packages() -> None:
    """Require the CUDA packages; skip where they are missing, unless CI demands them."""
    try:
        aot.check_packages()
    except UserError as missing:
        if os.environ.get("CONSYN_TEST_CUDA_PACKAGES") == "required":
            pytest.fail(str(missing))
        pytest.skip(str(missing))
