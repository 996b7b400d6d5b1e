"""`consyn-tune`: search for good hyperparameters."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from consyn_jax.cli.arguments import build_parser, read
from consyn_jax.cli.choices.backend_choice import check_backends
from consyn_jax.cli.choices.prepared_run import prepared_run
from consyn_jax.cli.exit_codes import exit_code
from consyn_jax.cli.text_encoding import start_in_utf8
from consyn_jax.config import RunConfig
from consyn_jax.flags import flags, flat, grouped
from consyn_jax.tuning.tune_options import NOT_HERE, TuneConfig, largest_size, resolve_tuning
from consyn_jax.tuning.varied_run import VariedRun

DESCRIPTION = """\
Search for the flag values of consyn-train that give the best metric. The trials
of a study share data and compiled programs. The flag --ladder trains a model in
a few small sizes instead, and predicts the loss of larger sizes."""
USAGE = "--search FLAG=VALUES ... | --ladder [N|SIZES] [FLAG ...]"
COMMON = (  # the flags of a short --help
    *("model", "data", "validation", "tokenizer", "max_steps", "batch_size", "eval_steps"),
    *("output", "search", "trials", "metric", "sampler", "pruner", "ladder", "config"),
)
EPILOG = """\
examples:
  consyn-tune --model haiku --tokenizer bytes --max_steps 500 \\
    --search lr=1e-4:1e-2:log weight_decay=0:0.3 --trials 20
  consyn-tune --config recipe.yaml --search optimizer=adamw,muon lr=1e-3,1e-2
  consyn-tune --config recipe.yaml --parametrization mup --ladder 4

Most flags of consyn-train work here, too; --help all lists them. The trials
vary the flags in --search. Defaults are in brackets. Run the same command
again, without --overwrite, to continue a study, or run it several times at once
to share a study among processes.
Exit codes: 0 done, 2 wrong input, 3 all trials diverged, 75 interrupted and
saved, 130 and 143 interrupted with nothing to save."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if argv is None:
        start_in_utf8()
    return exit_code("consyn-tune", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> None:
    """Run the command line `argv`."""
    config, origins, mode = read_arguments(argv)
    if mode == "print_config":
        from consyn_jax.config_file import describe

        print(describe(config, origins), end="")
        return
    from consyn_jax.distributed.allocators import set_allocators

    set_allocators()
    tune(config, origins)


def read_arguments(argv: Sequence[str]) -> tuple[TuneConfig, dict[str, str], str]:
    """Parse a command line as `arguments.read` does.

    Raises:
        UserError: an unknown flag, an invalid value, or an unreadable `--config` file.
    """
    parser = build_parser(
        "consyn-tune", DESCRIPTION, USAGE, EPILOG, TuneConfig, COMMON, refused=NOT_HERE
    )
    return read(parser, argv, resolve_tuning)


def tune(config: TuneConfig, origins: dict[str, str]) -> None:
    """Check all input before slow work, prepare the data, and run the study or the ladder.

    Raises:
        UserError: the data or the directory of the study is wrong, or Optuna is not installed.
    """
    run = grouped(RunConfig, {name: flat(config)[name] for name in flags(RunConfig)})
    settings = run, {name: origins[name] for name in flags(RunConfig)}
    varied, is_ladder = VariedRun.of(settings), config.ladder.ladder is not None
    if config.ladder.ladder is not None:
        settings = largest_size(varied, config.ladder.ladder)
    check_backends(run, origins)
    check = partial(_check_study, config, varied)
    with prepared_run(settings, lambda _: check(), is_study=not is_ladder) as prepared:
        from consyn_jax.tuning.ladder.ladder_run import Ladder
        from consyn_jax.tuning.study_run import Tuning

        varied = varied.with_data(settings[0], prepared.settings)
        study = Ladder if is_ladder else Tuning
        study(config, varied, prepared.settings, prepared.trainer_inputs).run()


def _check_study(config: TuneConfig, varied: VariedRun) -> None:
    """Check the study's directory. For a search, also check Optuna and `--vectorize`."""
    from consyn_jax.tuning.study_directory import check_output

    if config.ladder.ladder is None:
        from consyn_jax.tuning.optuna_study import import_optuna

        import_optuna()
    output, overwrite = Path(config.saving.output), config.saving.overwrite
    check_output(output, overwrite)
    if config.ladder.ladder is None and not overwrite:
        from consyn_jax.tuning.study_identity import check_study

        check_study(output, config.study.storage)
    if config.study.vectorize is not None:
        from consyn_jax.tuning.lanes.lane_programs import check_lanes

        check_lanes(config, varied)


if __name__ == "__main__":
    sys.exit(main())
