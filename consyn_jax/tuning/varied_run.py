"""The run that the trials of a study vary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from consyn_jax.config import RunConfig
from consyn_jax.flags import flags, flat, with_flags
from consyn_jax.resolve import resolve

Settings = tuple[RunConfig, dict[str, str]]
SEARCH = "search"  # the origin of a value that varies


@dataclass(frozen=True)
class VariedRun:
    """The user's flags of a run, from which each trial is resolved with its own values.

    A trial is resolved like a separate command line, because defaults depend on flags. For example,
    the default learning rate depends on the optimizer.

    Attributes:
        given: values of flags on the command line, by flag name.
        file: values in the `--config` file, by flag name.
        file_name: name of the `--config` file, for origins.
        from_data: values chosen from the data, common to all trials, with their origins.
    """

    given: Mapping[str, Any]
    file: Mapping[str, Any]
    file_name: str = ""
    from_data: Mapping[str, tuple[Any, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Settings) -> VariedRun:
        """Recover the user's values from resolved settings."""
        config, origins = settings
        run = {name: getattr(getattr(config, f.group), name) for name, f in _FLAGS.items()}
        given = {name: value for name, value in run.items() if origins[name] == "flag"}
        of_file = {name: v for name, v in run.items() if origins[name].startswith("file ")}
        names = {origins[name].removeprefix("file ") for name in of_file}
        return cls(given, of_file, names.pop() if names else "")

    def with_values(self, values: Mapping[str, Any]) -> Settings:
        """Resolve the run with other values of some flags.

        Args:
            values: the new values, by flag name.

        Raises:
            UserError: the values do not fit together.
        """
        run, origins = resolve({**self.given, **values}, self.file, file_name=self.file_name)
        more = {name: found for name, found in self.from_data.items() if name not in values}
        named = {name: origin for name, (_, origin) in more.items()}
        replaced = f"{SEARCH}, instead of file {self.file_name}"
        named |= {name: replaced if name in self.file else SEARCH for name in values}
        return with_flags(run, {name: v for name, (v, _) in more.items()}), origins | named

    def with_data(self, before: RunConfig, after: Settings) -> VariedRun:
        """Add the values that were chosen from the data.

        Args:
            before: the run before its data was read.
            after: the same run, with the values chosen from the data.
        """
        old, new = flat(before), flat(after[0])
        found = {n: (value, after[1][n]) for n, value in new.items() if value != old[n]}
        return replace(self, from_data=found)


_FLAGS = flags(RunConfig)
