"""Settings of `consyn-report`, and their validation, which reads no files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from consyn_jax.errors import UserError
from consyn_jax.flags import flag

OUTPUT, PORT, LARGEST_PORT = "comparison.html", 6060, 65_535


@dataclass(frozen=True)
class ReportRunOptions:
    """The runs to show."""

    run: tuple[str, ...] = flag(
        (), "directories of finished or running runs; the name of this flag may be left out"
    )
    watch: str | None = flag(
        None, "show all runs below this directory on a local page that reloads itself"
    )


@dataclass(frozen=True)
class ReportPageOptions:
    """Place where the page is written or served."""

    output: str | None = flag(
        None, "file for the page, replacing an existing file (comparison.html)"
    )
    port: int | None = flag(
        None, "port of the --watch page, which only this machine can open; 0: any free port (6060)"
    )
    quiet: bool = flag(False, "print nothing but the tables")


@dataclass(frozen=True)
class ReportConfig:
    """All settings of `consyn-report`."""

    runs: ReportRunOptions = ReportRunOptions()
    page: ReportPageOptions = ReportPageOptions()


def validate_report(config: ReportConfig) -> None:
    """Check the settings.

    Raises:
        UserError: no run is given, flags contradict each other, or a value is invalid.
    """
    runs, page = config.runs, config.page
    if not runs.run and runs.watch is None:
        raise UserError("No run is given. Name run directories, or use --watch DIRECTORY.")
    if runs.run and runs.watch is not None:
        raise UserError("--run and --watch do not work together. Leave one of them out.")
    if runs.watch is not None:
        if page.output is not None:
            raise UserError(
                "--watch writes no file, so --output has no effect. Leave --output out."
            )
        if page.port is not None and not 0 <= page.port <= LARGEST_PORT:
            raise UserError(
                f"--port {page.port} is not in 0 to {LARGEST_PORT}. Give another port, or 0 for "
                "any free port."
            )
        return
    if page.port is not None:
        raise UserError("--port is for --watch only. Leave --port out.")
    output = Path(page.output or OUTPUT)
    if output.is_dir():
        raise UserError(f"--output {output} is a directory. Name a file in it.")
    if not output.parent.is_dir():
        raise UserError(
            f"--output {output} is in a directory that does not exist. Create the directory."
        )
