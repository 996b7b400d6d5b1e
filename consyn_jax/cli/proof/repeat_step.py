"""`consyn-train --replay`: repeat the last step of a diverged run, with layer statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from consyn_jax.config import RunConfig
from consyn_jax.errors import visible
from consyn_jax.flags import flat
from consyn_jax.resolve import resolve

if TYPE_CHECKING:
    from consyn_jax.training.diagnostics.first_nonfinite import Row
    from consyn_jax.training.inputs.initial_model import DeferredModel


def replay(config: RunConfig, origins: dict[str, str]) -> None:
    """Repeat the step recorded in the directory `--replay`; print its metrics and diagnosis.

    Args:
        config: the configuration from the command line. Its flags, such as the mesh, override the
            recorded settings.

    Raises:
        UserError: the recorded step is missing or damaged, or does not fit the devices.
    """
    from consyn_jax.config_file import read_config_file
    from consyn_jax.training.diagnostics.bundle import CONFIG, read_bundle
    from consyn_jax.training.diagnostics.replay import repeat_step

    assert config.saving.replay is not None
    bundle = read_bundle(Path(config.saving.replay))
    file = bundle.path / CONFIG
    given = {name: value for name, value in flat(config).items() if origins[name] == "flag"}
    run, _ = resolve(given, read_config_file(file), file_name=str(file))
    again = repeat_step(bundle, run, _under_adapter(run, bundle.model.vocab_size))
    print(f"Step {bundle.step:,} of {bundle.path}")
    for name in ("loss", "grad_norm"):
        print(f"{name:<9}  {again.metrics[name]!r}; in the run {bundle.metrics[name]!r}")
    if again.mesh != bundle.mesh:
        there, here = (
            ",".join(f"{axis}={size}" for axis, size in mesh.items())
            for mesh in (bundle.mesh, again.mesh)
        )
        print(
            f"The run's mesh was {there}, and the mesh of this repeat is {here}: the last "
            "digits may differ."
        )
    found = again.diagnosis
    print("\n".join(_table("activations", {"": found.activations})))
    print("\n".join(_table("parameters", {"gradient": found.gradients, "weight": found.weights})))
    print(f"\n{visible(again.text)}")


def _under_adapter(run: RunConfig, vocab_size: int) -> DeferredModel | None:
    """The base model of the adapter that a run trains; None if the run trains all weights."""
    from consyn_jax.cli.choices.model_choice import choose_model, deferred_model

    if not run.lora.is_used:
        return None
    return deferred_model(run, choose_model(run.model), vocab_size, lambda config: config)


def _table(title: str, columns: dict[str, Sequence[Row]]) -> Iterator[str]:
    """Yield the lines of a table with a row for each place in the model.

    Args:
        columns: the statistics of each column, by its name; all columns list the same places.
    """
    places = [row.place for row in next(iter(columns.values()))]
    width = max(map(len, [title, *places]))
    yield f"\n{title:<{width}}" + "".join(
        f"  {f'{name} rms'.strip():>12}  {'largest':>9}  not finite" for name in columns
    )
    for place, *rows in zip(places, *columns.values(), strict=True):
        yield f"{place:<{width}}" + "".join(map(_cells, rows))


def _cells(row: Row) -> str:
    nonfinite = f"{row.nonfinite:,}" if row.nonfinite else "-"
    return f"  {row.rms:>12.3g}  {row.largest:>9.3g}  {nonfinite:>10}"
