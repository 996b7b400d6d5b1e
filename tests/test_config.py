"""The option dataclasses."""

import dataclasses

import pytest

from consyn_jax.config import RunConfig
from consyn_jax.flags import flags


def test_every_flag_has_help_and_a_default_of_its_type() -> None:
    for flag in flags(RunConfig).values():
        assert flag.help
        assert flag.default is None or flag.many or isinstance(flag.default, flag.type)


def test_a_run_is_a_frozen_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().budget.seed = 3  # type: ignore[misc]
