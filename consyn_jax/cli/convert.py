"""`consyn-convert`: write a trained model in another format, and check what was written."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from consyn_jax.cli.arguments import build_parser, parse
from consyn_jax.cli.exit_codes import exit_code
from consyn_jax.cli.text_encoding import start_in_utf8
from consyn_jax.inference.conversion.conversion_options import ConvertConfig
from consyn_jax.resolve import resolve_flags

DESCRIPTION = """\
Write a trained model as a Hugging Face directory, a GGUF file for llama.cpp or
Orbax arrays. Before the result gets its final name, it is read back, and its
logits are compared with the model's."""
USAGE = "MODEL --to hf|gguf|orbax --output PATH [FLAG ...]"
EPILOG = """\
examples:
  consyn-convert runs/verse --to gguf --dtype q8_0 --output verse.gguf
  consyn-convert runs/verse --average 5 --output verse-averaged
  consyn-convert runs/verse --step 4000 --dtype bfloat16 --output verse-4000

Defaults are in brackets. If a flag is given twice, the last one counts.
Exit codes: 0 done, 2 wrong input or logits that differ."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if argv is None:
        start_in_utf8()
    return exit_code("consyn-convert", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> None:
    """Run the command line `argv`."""
    config = read_arguments(argv)
    # Convert on the CPU: the model may not fit one GPU, and conversion is fast enough.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from consyn_jax.inference.conversion.convert_model import convert, plan_conversion

    convert(plan_conversion(config), lambda line: print(line, file=sys.stderr, flush=True))


def read_arguments(argv: Sequence[str]) -> ConvertConfig:
    """Parse a command line; the model may be given without its flag.

    Raises:
        UserError: an unknown flag or an invalid value.
    """
    parser = build_parser("consyn-convert", DESCRIPTION, USAGE, EPILOG, ConvertConfig)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="the model; the same as --model")
    return resolve_flags(ConvertConfig, parse(parser, argv))


if __name__ == "__main__":
    sys.exit(main())
