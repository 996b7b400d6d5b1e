"""`consyn-evaluate`: compare models by their perplexity on texts and accuracy on requests."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import takewhile

from consyn_jax.cli.arguments import build_parser, parse
from consyn_jax.cli.exit_codes import exit_code
from consyn_jax.cli.text_encoding import start_in_utf8
from consyn_jax.inference.scoring.evaluation_options import EvaluateConfig, validate_evaluation
from consyn_jax.resolve import resolve_flags

DESCRIPTION = """\
Evaluate models on texts (perplexity, bits per byte) and on requests (likelihood
of answers, accuracy), and compare them."""
USAGE = "MODEL ... --data PATH ... | --requests FILE [FLAG ...]"
COMMON = (  # the flags of a short --help
    "model",
    "step",
    "tokenizer",
    "dtype",
    "batch_size",
    "data",
    "window",
    "stride",
    "text_key",
    "requests",
    "max_tokens",
    "stop",
    "output",
    "page",
    "seed",
)
EPILOG = """\
examples:
  consyn-evaluate runs/verse --data wikitext/test.txt --stride 512
  consyn-evaluate runs/verse runs/stanza --requests arc.jsonl --page arc.html
  consyn-evaluate runs/chat --requests gsm8k.jsonl --stop Question:
  consyn-evaluate Qwen/Qwen3-0.6B --data corpus.jsonl --mesh fsdp=4

Defaults are in brackets. If a flag is given twice, the last one counts.
Exit codes: 0 done, 2 wrong input, 130 and 143 interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if argv is None:
        start_in_utf8()
    return exit_code("consyn-evaluate", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> None:
    """Run the command line `argv`."""
    evaluate(read_arguments(argv))


def read_arguments(argv: Sequence[str]) -> EvaluateConfig:
    """Parse a command line; the words before the first flag are the models.

    Raises:
        UserError: an unknown flag or an invalid value.
    """
    models = list(takewhile(lambda word: not word.startswith("-"), argv))
    if models:
        argv = ["--model", *argv]
    parser = build_parser("consyn-evaluate", DESCRIPTION, USAGE, EPILOG, EvaluateConfig, COMMON)
    config = resolve_flags(EvaluateConfig, parse(parser, argv))
    validate_evaluation(config)
    return config


def evaluate(config: EvaluateConfig) -> None:
    """Evaluate all models, print the table, and write `--output`.

    Raises:
        UserError: a model, the data, a row or `--output` cannot be used.
    """
    from consyn_jax.inference.scoring.comparison_table import as_lines
    from consyn_jax.inference.scoring.evaluate_models import (
        check_files,
        evaluate_models,
        write_results,
    )
    from consyn_jax.training.runtime.compilation_cache import enable_compilation_cache

    def say(line: str) -> None:
        if not config.results.quiet:
            print(line, file=sys.stderr, flush=True)

    check_files(config.results)
    enable_compilation_cache()
    evaluation = evaluate_models(config, say)
    for line in as_lines(evaluation.sections, evaluation.names):
        print(line)
    write_results(evaluation)
    if config.results.output is not None:
        say(f"All numbers are in {config.results.output}.")
    if config.results.page is not None:
        say(f"The page is {config.results.page}.")


if __name__ == "__main__":
    sys.exit(main())
