"""`consyn-prepare`: documents to a token store, cleaned, split, tokenised, with a report."""

from __future__ import annotations

import fcntl
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from consyn_jax.cli.arguments import build_parser, read
from consyn_jax.cli.progress import Bar
from consyn_jax.cli.run import exit_code, shown
from consyn_jax.config import Interrupted, PrepareConfig, UserError
from consyn_jax.resolve import resolve_preparation

if TYPE_CHECKING:
    from consyn_jax.data.prepare import Prepared
    from consyn_jax.data.report import Report

DESCRIPTION = """\
Make a token store of documents: clean them, leave duplicates out, split them
into train, validation and test, tokenise them, and report on all of it."""
USAGE = "[--data PATH ...] [--output DIR] [FLAG ...]"
EPILOG = """\
examples:
  consyn-prepare --data corpus/ --output tokens
  consyn-prepare --data pages.jsonl.gz --text_key body --near_duplicates
  consyn-prepare --data corpus/ --tokenizer train:32000 --test_fraction 0.01
  consyn-train --data tokens

Defaults are in brackets; of a flag that is given twice the last counts.
Stopped at any moment, the same command again goes on where it was.
Exit codes: 0 done, 2 wrong input, 75 interrupted."""

KINDS = {"text": "text file", "jsonl": "file of JSON rows", "huggingface": "Hugging Face dataset"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return exit_code("consyn-prepare", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> None:
    """argv -> PrepareConfig -> token store -> report."""
    config, origins, print_config = read_arguments(argv)
    if print_config:
        from consyn_jax.training.config_file import describe

        print(describe(config, origins), end="")
        return
    make(config)


def read_arguments(argv: Sequence[str]) -> tuple[PrepareConfig, dict[str, str], str]:
    """What to prepare, the origins of the values, and whether it shall only be printed.

    Raises:
        UserError: an unknown flag, a bad value, or a `--config` file that is none.
    """
    return read(build_parser("consyn-prepare", DESCRIPTION, USAGE, EPILOG, PrepareConfig), argv, resolve_preparation)


def make(config: PrepareConfig) -> None:
    """Check --output, prepare, and say what came of it.

    Raises:
        Interrupted: by a signal; what was done is kept.
        UserError: --output or the data cannot be used.
    """
    from consyn_jax.data.prepare import check_output, prepare
    from consyn_jax.training.console import Console
    from consyn_jax.training.run_directory import check_writable

    output = Path(config.store.output)
    check_writable(output)
    check_output(output)
    if config.store.overwrite:
        _delete_store(config, output)
    began = time.monotonic()
    with Console(quiet=config.store.quiet) as console, Bar(lambda: console.header(_header(config), "consyn-prepare"), quiet=config.store.quiet) as bar:
        try:
            prepared = prepare(config.data, output=output, test_fraction=config.store.test_fraction, progress=bar)
        except KeyboardInterrupt as stopped:
            raise Interrupted(_interruption(config, output)) from stopped
        bar.close()
        console.finish([*summary(config, prepared, time.monotonic() - began), f"Train on it with: consyn-train --data {shlex.quote(str(output))}"])


def _interruption(config: PrepareConfig, output: Path) -> str:
    if not output.exists():
        return "interrupted before anything was written. Run the same command again."
    same = "the same command without --overwrite" if config.store.overwrite else "the same command"
    return f"interrupted; what was done so far is kept in {output}. Run {same} again to go on."


def _delete_store(config: PrepareConfig, path: Path) -> None:
    """For --overwrite: delete what --output holds, if that is ours and the new store is not made from it."""
    from consyn_jax.data.sources import find_sources
    from consyn_jax.data.store import STORE_FILE, delete_store
    from consyn_jax.tokenization import load_tokenizer

    data = config.data
    # What cannot be made anew is not deleted, so all of it is looked for first.
    sources = find_sources(data.data, data.dataset_type, invalid_utf8=data.invalid_utf8).sources
    if sources[0].kind == "sharded":
        return  # tokens are not prepared, as `prepare` will say
    used = [("data", source.name) for source in sources]
    held_out = find_sources(data.validation, flag="validation", invalid_utf8=data.invalid_utf8).sources if data.validation else ()
    used += [("validation", source.name) for source in held_out]
    for name, value in [*used, ("tokenizer", data.tokenizer or "")]:
        if value and Path(value).exists() and Path(value).resolve().is_relative_to(path.resolve()):
            raise UserError(f"--overwrite would delete --{name} {value}, which lies in --output {path}. Name another directory for the new store.")
    if data.tokenizer and not data.tokenizer.startswith("train:"):
        load_tokenizer(data.tokenizer)
    entries = sorted(path.iterdir()) if path.is_dir() else []
    strangers = [entry.name for entry in entries if not STORE_FILE.fullmatch(entry.name)]
    if strangers:
        raise UserError(f"--overwrite would delete {shown(strangers)} in --output {path}, which is no part of a token store. Move it elsewhere.")
    _check_unused(path)
    try:
        delete_store(path)
    except OSError as error:
        raise UserError(f"--overwrite cannot delete {error.filename}: {error.strerror}. Delete it, or name another --output.") from error


def _check_unused(path: Path) -> None:
    """No other process may be preparing there."""
    from consyn_jax.data.store import PREPARING

    with suppress(OSError), (path / PREPARING / "lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output {path} is in use by another process. Wait for it, or name another directory.") from None


def _header(config: PrepareConfig) -> list[tuple[str, str]]:
    """What is about to be done."""
    data, store = config.data, config.store
    rules = [
        *(["NFC"] if data.normalize == "nfc" else []),
        *(["control characters removed"] if data.control_characters == "remove" else []),
        *([f"{data.min_chars:,} characters or more"] if data.min_chars > 1 else []),
        *([f"at most {data.max_chars:,} characters"] if data.max_chars else []),
        *(["duplicates left out"] if data.deduplicate else []),
        *([f"near duplicates from {data.near_duplicates:g} left out"] if data.near_duplicates else []),
    ]
    validation = shown(data.validation) if data.validation else f"{data.validation_fraction:.3g} of the documents" if data.validation_fraction else "none"
    rows = [("data", shown(data.data)), ("cleaning", ", ".join(rules) or "none"), ("validation", validation)]
    rows += [("test", f"{store.test_fraction:.3g} of the documents")] if store.test_fraction else []
    return [*rows, ("tokenizer", data.tokenizer or "default"), ("output", store.output)]


def summary(config: PrepareConfig, prepared: Prepared, seconds: float) -> list[str]:
    """What came of it, in lines."""
    from consyn_jax.data.preparation import PAGE
    from consyn_jax.data.report_page import bytes_per_token, size
    from consyn_jax.training.console import duration

    report, directory = prepared.report, Path(config.store.output)
    lines = [f"{directory} is complete already; nothing had to be done."] if prepared.from_cache else []
    kinds = Counter(KINDS.get(source.kind, source.kind) for source in prepared.used)
    rows = [("read", ", ".join(_count(number, kind) for kind, number in kinds.items())), ("documents", _documents(report)), *_changes(report)]
    for name, counts in report.splits.items():
        ratio, targets = bytes_per_token(counts), counts.get("target_tokens", counts["tokens"])
        learned = f" ({targets:,} of them learned)" if targets != counts["tokens"] else ""
        density = f", {ratio:.2f} bytes a token" if ratio else ""
        rows.append((name, f"{_count(counts['documents'], 'document')}, {_count(counts['tokens'], 'token')}{learned}{density}"))
    wanted = config.data.validation or config.data.validation_fraction
    if wanted and not report.splits.get("validation", {}).get("documents"):
        rows.append(("validation", "empty: no document fell into it; give --validation PATH or a larger --validation_fraction"))
    if prepared.left_out:
        rows.append(("left out", f"{_count(len(prepared.left_out), 'file')}: {shown([f'{name} ({reason})' for name, reason in prepared.left_out])}"))
    if not prepared.from_cache:
        rows.append(("time", f"{duration(seconds)}, {size(report.file_bytes / max(seconds, 1e-3))}/s"))
    rows.append(("store", str(directory)))
    rows.append(("report", str(directory / PAGE)))
    width = max(len(name) for name, _ in rows)
    return lines + [f"  {name:<{width}}  {text}" for name, text in rows]


def _documents(report: Report) -> str:
    from consyn_jax.data.report import RULES

    dropped = ", ".join(f"{report.dropped[rule]:,} {rule}" for rule in RULES if report.dropped.get(rule))
    return f"{report.documents:,} read, {report.kept:,} kept" + (f"; left out: {dropped}" if dropped else "")


def _changes(report: Report) -> list[tuple[str, str]]:
    from consyn_jax.data.report import CHANGES

    words = [f"{count:,} {CHANGES.get(name, name)}" for name, count in report.changed.items() if count]
    return [("changed", "; ".join(words))] if words else []


def _count(number: int, what: str) -> str:
    """A number of things, of which the first word is counted: 2 files of JSON rows."""
    noun, *rest = what.split(" of ")
    return " of ".join([f"{number:,} {noun}{'' if number == 1 else 's'}", *rest])


if __name__ == "__main__":
    sys.exit(main())
