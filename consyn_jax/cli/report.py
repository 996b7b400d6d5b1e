"""`consyn-report`: compare finished or running runs, on a page and in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from consyn_jax.cli.arguments import build_parser, parse
from consyn_jax.cli.exit_codes import exit_code
from consyn_jax.cli.text_encoding import start_in_utf8
from consyn_jax.errors import Unsaved, UserError, visible
from consyn_jax.reporting.report_options import OUTPUT, PORT, ReportConfig, validate_report
from consyn_jax.resolve import resolve_flags

DESCRIPTION = """\
Compare runs: results, overlaid curves, and the differences of their
configurations."""
USAGE = "RUN ... | --watch DIR [FLAG ...]"
EPILOG = """\
examples:
  consyn-report runs/a runs/b         prints tables, writes comparison.html
  consyn-report runs/* --output all.html
  consyn-report --watch runs          a page on this machine that reloads itself

Defaults are in brackets. If a flag is given twice, the last one counts.
Exit codes: 0 done, 2 wrong input, 130 and 143 interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if argv is None:
        start_in_utf8()
    return exit_code("consyn-report", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> None:
    """Run the command line `argv`."""
    report(read_arguments(argv))


def read_arguments(argv: Sequence[str]) -> ReportConfig:
    """Parse a command line; the words before the first flag are the runs.

    Raises:
        UserError: an unknown flag or an invalid value.
    """
    if list(takewhile(lambda word: not word.startswith("-"), argv)):
        argv = ["--run", *argv]
    parser = build_parser("consyn-report", DESCRIPTION, USAGE, EPILOG, ReportConfig)
    config = resolve_flags(ReportConfig, parse(parser, argv))
    validate_report(config)
    return config


def report(config: ReportConfig) -> None:
    """Write the page of the runs and print their tables, or serve the page of `--watch`.

    Raises:
        UserError: a run cannot be read, the page cannot be written, or the port is taken.
    """
    if config.runs.watch is not None:
        _watch(Path(config.runs.watch), config)
        return
    from consyn_jax.files import write_whole
    from consyn_jax.reporting.recorded_run import read_runs
    from consyn_jax.reporting.runs_page import runs_page
    from consyn_jax.reporting.runs_table import as_lines

    runs = read_runs([Path(name) for name in config.runs.run])
    output = Path(config.page.output or OUTPUT)
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    try:
        write_whole(output, runs_page(runs, title).encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(
            f"--output {output} cannot be written: {error.strerror}. Name another file."
        ) from error
    for line in as_lines(runs):
        print(visible(line))
    if not config.page.quiet:
        print(f"The page is {output}.", file=sys.stderr)


def _watch(top: Path, config: ReportConfig) -> None:
    from consyn_jax.reporting.watch_server import HERE, open_server

    port = PORT if config.page.port is None else config.page.port
    with open_server(top, port) as server:
        if not config.page.quiet:
            address = f"http://{HERE}:{server.server_port}/"
            print(f"The runs in {top} are shown at {address} until Ctrl-C.", file=sys.stderr)
        try:
            server.serve_forever()
        except Unsaved as stopped:
            if stopped.number != signal.SIGINT:
                raise
            stopped.settle()


if __name__ == "__main__":
    sys.exit(main())
