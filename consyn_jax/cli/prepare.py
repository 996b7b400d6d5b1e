"""`consyn-prepare`: clean, split and tokenise documents into a token store."""

from __future__ import annotations

import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from consyn_jax.cli.arguments import build_parser, read
from consyn_jax.cli.choices.row_notes import row_notes
from consyn_jax.cli.choices.training_data import by_name, left_out_files, noticed
from consyn_jax.cli.exit_codes import exit_code
from consyn_jax.cli.progress_bar import Bar
from consyn_jax.cli.text_encoding import start_in_utf8
from consyn_jax.errors import Interrupted, UserError, counted, leave_out_overwrite, listed
from consyn_jax.prepare_config import CorpusOptions, PrepareConfig
from consyn_jax.resolve import resolve_preparation

if TYPE_CHECKING:
    from consyn_jax.data.preparation.cached_store import Prepared
    from consyn_jax.data.preparation.corpus_report import Report

DESCRIPTION = """\
Make a token store from documents: clean and deduplicate them, split them into
train, validation and test, tokenise them, and write a report."""
USAGE = "[--data PATH ...] [--output DIR] [FLAG ...]"
COMMON = (  # the flags of a short --help
    "config",
    "data",
    "validation",
    "validation_fraction",
    "test_fraction",
    "dataset_type",
    "row_format",
    "text_key",
    "document_separator",
    "deduplicate",
    "near_duplicates",
    "tokenizer",
    "num_workers",
    "output",
    "overwrite",
)
EPILOG = """\
examples:
  consyn-prepare --data corpus/ --output tokens
  consyn-prepare --data pages.jsonl.gz --text_key body --near_duplicates
  consyn-prepare --data corpus/ --tokenizer train:32000 --test_fraction 0.01
  consyn-train --data tokens

Defaults are in brackets. If a flag is given twice, the last one counts.
If the command is stopped, run it again without --overwrite to continue.
Exit codes: 0 done, 2 wrong input, 75 interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if argv is None:
        start_in_utf8()
    return exit_code("consyn-prepare", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> None:
    """Run the command line: make a token store, or print the configuration."""
    config, origins, print_config = read_arguments(argv)
    if print_config:
        from consyn_jax.config_file import describe

        print(describe(config, origins), end="")
        return
    make(config)


def read_arguments(argv: Sequence[str]) -> tuple[PrepareConfig, dict[str, str], str]:
    """Parse a command line into a configuration, the origins of its values, and a mode.

    Raises:
        UserError: an unknown flag, an invalid value, or an unreadable `--config` file.
    """
    parser = build_parser("consyn-prepare", DESCRIPTION, USAGE, EPILOG, PrepareConfig, COMMON)
    return read(parser, argv, resolve_preparation)


def make(config: PrepareConfig) -> None:
    """Check the directories, make the token store, and print a summary.

    Raises:
        Interrupted: a signal came; finished work is kept.
        UserError: a directory or the data cannot be used.
    """
    from consyn_jax.data.preparation.cached_store import prepare
    from consyn_jax.data.preparation.destination import check_output
    from consyn_jax.data.preparation.segments.job_directory import check_shared_directory
    from consyn_jax.training.logging.console import Console
    from consyn_jax.training.run.opening import check_writable

    output = Path(config.store.output)
    check_writable(output)
    if config.workers.shared_directory is not None:
        check_shared_directory(config.workers.shared_directory, output, config.data)
    check_output(output)
    left = _delete_store(config, output) if config.store.overwrite else []
    began = time.monotonic()
    with (
        redirect_stdout(sys.stderr),  # Ray prints its notes about lost workers and nodes
        Console(quiet=config.store.quiet) as console,
        Bar(
            lambda: console.header(_header(config), "consyn-prepare"), quiet=config.store.quiet
        ) as bar,
    ):
        for text in left:
            console.warn(text)
        try:
            prepared = prepare(
                config.data,
                output=output,
                test_fraction=config.store.test_fraction,
                progress=bar,
                engine=config.workers,
            )
        except KeyboardInterrupt as stopped:
            raise Interrupted(_interruption(output)) from stopped
        bar.close()
        for text in prepared.scratch:
            console.warn(text)
        pairs = " --objective dpo --checkpoint MODEL" if prepared.store.holds_pairs else ""
        console.finish(
            [
                *summary(config, prepared, time.monotonic() - began),
                f"Train on it with: consyn-train --data {shlex.quote(str(output))}{pairs}",
            ]
        )


def _interruption(output: Path) -> str:
    if not output.exists():
        return "interrupted before anything was written. Run the same command again."
    kept = f"interrupted; finished work is kept in {output}."
    return f"{kept} Run the same command again to continue."


def _check_outside(used: Iterable[tuple[str, str]], path: Path) -> None:
    """Raise UserError if an input is in `path`; `used` has a (flag, path) pair for each input."""
    for name, value in used:
        if value and Path(value).exists() and Path(value).resolve().is_relative_to(path.resolve()):
            raise UserError(
                f"--overwrite would delete --{name} {value}, which is in --output {path}. Name "
                "another directory for the new store."
            )


def _delete_store(config: PrepareConfig, path: Path) -> list[str]:
    """Delete the token store in `path`, for `--overwrite`.

    All input is checked first, so that wrong input does not lead to the deletion of the old store.

    Returns:
        Sentences about each directory of segments that could not be deleted.

    Raises:
        UserError: the input cannot be used or is in `path`, or `path` holds other files or is in
            use.
    """
    from consyn_jax.data.sources.discovery import find_sources
    from consyn_jax.data.store.manifest import STORE_FILE
    from consyn_jax.tokenization import load_tokenizer

    data = config.data
    found = find_sources(data.data, data.dataset_type, invalid_utf8=data.invalid_utf8)
    sources = (*found.sources, *found.validation)
    if sources[0].kind == "sharded":
        return []  # `prepare` refuses to prepare tokens again
    used = [("data", source.name) for source in sources]
    if data.validation:
        held_out = find_sources(data.validation, flag="validation", invalid_utf8=data.invalid_utf8)
        used += [("validation", source.name) for source in held_out.sources]
    _check_outside([*used, ("tokenizer", data.tokenizer or "")], path)
    if data.tokenizer and not data.tokenizer.startswith("train:"):
        load_tokenizer(data.tokenizer)
    entries = sorted(path.iterdir()) if path.is_dir() else []
    strangers = [entry.name for entry in entries if not STORE_FILE.fullmatch(entry.name)]
    if strangers:
        raise UserError(
            f"--output {path} contains {listed(strangers)}, which is not part of a token store. "
            "Move it elsewhere, because --overwrite would delete it."
        )
    left = _delete_locked(path, data) if entries else []
    leave_out_overwrite()
    return left


def _delete_locked(path: Path, options: CorpusOptions) -> list[str]:
    """Delete the token store in `path` and its segments; no other process may be using it."""
    from consyn_jax.data.preparation.destination import Destination
    from consyn_jax.data.preparation.segments.job_directory import remove_scratch
    from consyn_jax.data.store.manifest import PREPARING, delete_store

    try:
        held = path / PREPARING
        if held.is_symlink() or held.is_file():
            held.unlink()  # the lock is made in a directory, and not in the target of a link
        with Destination(path, "", options, in_cache=False).locked(stop=lambda: False):
            left = remove_scratch(path)
            delete_store(path)
    except OSError as error:
        raise UserError(
            f"--overwrite cannot delete {error.filename}: {error.strerror}. Delete it, or name "
            "another --output."
        ) from error
    return left


def _header(config: PrepareConfig) -> list[tuple[str, str]]:
    """Header lines, as (name, text), about the planned work."""
    from consyn_jax.data.preparation.workers.ray_address import named_address

    data, store = config.data, config.store
    rules = {
        "NFC": data.normalize in (None, "nfc"),
        "control characters removed": data.control_characters in (None, "remove"),
        f"{data.min_chars:,} characters or more": data.min_chars > 1,
        f"at most {data.max_chars or 0:,} characters": data.max_chars is not None,
        "exact duplicates left out": data.deduplicate in (None, True),
        f"near duplicates (similarity from {data.near_duplicates or 0:g}) left out": (
            data.near_duplicates
        ),
    }
    fraction = f"{data.validation_fraction:.3g} of the documents, or files named as validation data"
    validation = listed(data.validation) or (fraction if data.validation_fraction else "none")
    rows = [
        ("data", listed(data.data)),
        ("cleaning", ", ".join(rule for rule, applies in rules.items() if applies) or "none"),
        ("validation", validation),
    ]
    if store.test_fraction:
        rows.append(("test", f"{store.test_fraction:.3g} of the documents"))
    if config.workers.engine == "ray":
        address = named_address(config.workers.ray_address)[1]
        rows.append(("workers", f"tasks of Ray on {address or 'this machine'}"))
    if config.workers.shared_directory is not None:
        rows.append(("writers", f"all workers; shared directory {config.workers.shared_directory}"))
    return [*rows, ("tokenizer", data.tokenizer or "default"), ("output", store.output)]


def summary(config: PrepareConfig, prepared: Prepared, seconds: float) -> list[str]:
    """Describe the finished token store, in lines with a name and a text."""
    from consyn_jax.data.preparation.corpus_page import PAGE, size
    from consyn_jax.training.logging.formats import duration

    report, directory = prepared.report, Path(config.store.output)
    units = Counter(source.reader.unit for source in prepared.used)
    rows = [
        ("read", ", ".join(counted(number, unit) for unit, number in units.items())),
        ("documents", _documents(report)),
        *row_notes(report, config.data, prepared.store.tokenizer),
        *_splits(report),
    ]
    wanted = config.data.validation or config.data.validation_fraction
    if wanted and not report.splits.get("validation", {}).get("documents"):
        remedy = f"the validation split has no document; {prepared.validation_remedy}"
        rows.append(("validation", f"empty: {remedy}"))
    rows += by_name(prepared.validation, config.data)
    rows += noticed(prepared.used, config.data, prepared.store.tokenizer, report)
    if prepared.left_out:
        rows.append(("left out", left_out_files(prepared.left_out)))
    if prepared.one_writer:
        rows.append(("writers", f"one, not many: {prepared.one_writer}"))
    if not prepared.from_cache:
        rate = size(report.file_bytes / max(seconds, 1e-3))
        rows.append(("time", f"{duration(seconds)}, {rate}/s"))
    rows += [("store", str(directory)), ("report", str(directory / PAGE))]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {text}" for name, text in rows]
    if prepared.from_cache:
        lines.insert(0, f"{directory} is already complete; there was nothing to do.")
    return lines


def _splits(report: Report) -> list[tuple[str, str]]:
    from consyn_jax.data.preparation.corpus_page import bytes_per_token

    rows = []
    for name, counts in report.splits.items():
        text = f"{counted(counts['documents'], 'document')}, {counted(counts['tokens'], 'token')}"
        targets = counts.get("target_tokens", counts["tokens"])
        if targets != counts["tokens"]:
            text += f" ({targets:,} of them training targets)"
        if ratio := bytes_per_token(counts):
            text += f", {ratio:.2f} bytes per token"
        rows.append((name, text))
    return rows


def _documents(report: Report) -> str:
    from consyn_jax.data.preparation.corpus_report import RULES

    dropped = [f"{report.dropped[rule]:,} {rule}" for rule in RULES if report.dropped.get(rule)]
    text = f"{report.documents:,} read, {report.kept:,} kept"
    return f"{text}; left out: {', '.join(dropped)}" if dropped else text


if __name__ == "__main__":
    sys.exit(main())
