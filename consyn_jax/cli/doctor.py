"""`consyn-doctor`: check whether this machine is fit for training, and say what to do."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from consyn_jax.cli.arguments import build_parser, parse
from consyn_jax.cli.exit_codes import exit_code
from consyn_jax.cli.text_encoding import start_in_utf8
from consyn_jax.config import HardwareOptions
from consyn_jax.doctor.doctor_options import DoctorConfig
from consyn_jax.errors import UserError, listed, visible
from consyn_jax.resolve import resolve_flags
from consyn_jax.validation import check_processes

if TYPE_CHECKING:
    from consyn_jax.doctor.machine_findings import Finding

DESCRIPTION = """\
Check whether this machine is fit for training: driver, GPUs, CUDA, cuDNN, JAX,
attention, speed, disk and limits. Each check prints pass, warn or fail. After
warn and fail, it prints advice. A line with info shows a measured value for
which there is no reference."""
USAGE = "[FLAG ...]"
EPILOG = """\
examples:
  consyn-doctor
  consyn-doctor --output /scratch/runs --json > doctor.json
  srun --ntasks-per-node=1 consyn-doctor --distributed

Defaults are in brackets. If a flag is given twice, the last one counts.
Exit codes: 0 no check fails, 2 a check fails or the input is wrong, 130 and 143
interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if argv is None:
        start_in_utf8()
    return exit_code("consyn-doctor", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> None:
    """Run the checks of the command line `argv` and print the results.

    Raises:
        UserError: a check fails.
    """
    config = read_arguments(argv)
    from consyn_jax.doctor.examination import examine

    report(examine(config), as_json=config.checks.json)


def read_arguments(argv: Sequence[str]) -> DoctorConfig:
    """Parse a command line.

    Raises:
        UserError: an unknown flag or an invalid value.
    """
    parser = build_parser("consyn-doctor", DESCRIPTION, USAGE, EPILOG, DoctorConfig)
    config = resolve_flags(DoctorConfig, parse(parser, argv))
    check_processes(HardwareOptions(**dataclasses.asdict(config.hosts)))
    return config


def report(findings: Sequence[Finding], *, as_json: bool) -> None:
    """Print the results of the checks; nothing if there are none.

    Raises:
        UserError: a check failed.
    """
    from consyn_jax.doctor.machine_findings import FAIL, lines

    if not findings:  # another process prints
        return
    failing = list(dict.fromkeys(each.name for each in findings if each.status == FAIL))
    if as_json:
        rows = [dataclasses.asdict(each) for each in findings]
        print(json.dumps({"fit": not failing, "checks": rows}, indent=1))
    else:
        print(visible("\n".join(lines(findings))))
    if failing:
        raise UserError(
            f"Not fit for training: {listed(failing, 8)}. Follow the advice below each line "
            "marked fail, and run consyn-doctor again."
        )


if __name__ == "__main__":
    sys.exit(main())
