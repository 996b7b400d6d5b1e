"""`consyn-train --replay`: the step that ended a run, once more, with the statistics of every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from consyn_jax.config import RunConfig, flat
from consyn_jax.resolve import resolve

if TYPE_CHECKING:
    from consyn_jax.training.diagnosis import Row


def replay(config: RunConfig, origins: dict[str, str]) -> None:
    """Repeat the step of the bundle that `config` names, and print what it shows.

    Args:
        config: resolved without the bundle; what it was given as a flag, such as a mesh, wins over the run's own.

    Raises:
        UserError: the bundle is none, damaged, or does not fit the devices.
    """
    from consyn_jax.training.config_file import read_config_file
    from consyn_jax.training.replay import CONFIG, read_bundle, repeat

    assert config.saving.replay is not None
    bundle = read_bundle(Path(config.saving.replay))
    file = bundle.path / CONFIG
    given = {name: value for name, value in flat(config).items() if origins[name] == "flag"}
    run, _ = resolve(given, read_config_file(file), file_name=str(file))
    again = repeat(bundle, run)
    print(f"Step {bundle.step:,} of {bundle.path}")
    for name in ("loss", "grad_norm"):
        print(f"{name:<9}  {again.metrics[name]!r}; in the run {bundle.metrics[name]!r}")
    if again.mesh != bundle.mesh:
        print(f"The run's mesh was {_shown(bundle.mesh)}, and this is {_shown(again.mesh)}: the last digits may differ.")
    found = again.diagnosis
    print("\n".join(_table("activations", {"": found.activations})))
    print("\n".join(_table("parameters", {"gradient": found.gradients, "weight": found.weights})))
    print(f"\n{again.text}")


def _shown(mesh: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.items())


def _table(title: str, columns: dict[str, Sequence[Row]]) -> Iterator[str]:
    """One line a place; `columns` have the same places."""
    places = [row.place for row in next(iter(columns.values()))]
    width = max(map(len, [title, *places]))
    yield f"\n{title:<{width}}" + "".join(f"  {f'{name} rms'.strip():>12}  {'largest':>9}  not finite" for name in columns)
    for place, *rows in zip(places, *columns.values(), strict=True):
        yield f"{place:<{width}}" + "".join(f"  {row.rms:>12.3g}  {row.largest:>9.3g}  {f'{row.nonfinite:,}' if row.nonfinite else '-':>10}" for row in rows)
