"""What programs for GPUs are compiled with."""

import os

import pytest

from consyn_jax.config import UserError
from consyn_jax.planning import aot


def pytest_itemcollected(item: pytest.Item) -> None:
    """As users compile."""
    item.add_marker("users_compiler")


@pytest.fixture
def cuda_packages() -> None:
    """The CUDA packages, without a GPU; where CI says that they must be there, they must."""
    try:
        aot.check_packages()
    except UserError as missing:
        if os.environ.get("CONSYN_TEST_CUDA_PACKAGES") == "required":
            pytest.fail(str(missing))
        pytest.skip(str(missing))
