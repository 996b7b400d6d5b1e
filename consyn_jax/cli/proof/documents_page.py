"""`consyn-train --documents_of`: list the documents that steps of a run trained on."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError, counted, in_line

if TYPE_CHECKING:
    from consyn_jax.data.learned_documents import DocumentFinder, LearnedDocument


def list_documents(config: RunConfig) -> None:
    """Print the documents of the steps that `--documents_of` names.

    Raises:
        UserError: there is no such run or step, or the run did not record its documents.
    """
    from consyn_jax.data.learned_documents import DocumentFinder
    from consyn_jax.training.provenance.data_record import open_order

    place = Path(config.saving.output)
    first, last = _steps(config.proof.documents_of or "")
    facts = recorded_facts(place)
    total = facts["configuration"]["total_steps"]
    if last > total:
        raise UserError(
            f"--documents_of {last}: the run in {place} has {total:,} steps. Give earlier steps."
        )
    data = facts["data"]
    finder = DocumentFinder(open_order(data, place), data["sequences_per_step"])
    changes = SourceChanges(finder)
    for step in range(first, last + 1):
        documents = finder.documents(step)
        changed = changes.among(documents)
        page = {"step": step, "documents": as_json(documents), "changed_sources": changed}
        is_json = config.proof.json
        text = [json.dumps(page, ensure_ascii=False)] if is_json else lines(step, documents)
        if not write_out(text):
            return


class SourceChanges:
    """Finds source files that changed since the data was prepared; warns of each one once."""

    def __init__(self, finder: DocumentFinder) -> None:
        self._finder = finder
        self._compared: set[str] = set()
        self._changed: dict[str, str] = {}

    def among(self, documents: Iterable[LearnedDocument]) -> list[str]:
        """Return the names of the documents' source files that changed.

        Args:
            documents: documents that this object's `DocumentFinder` has found.
        """
        from consyn_jax.training.provenance.data_check import changed_sources

        used = self._finder.used_sources
        new = {name: entry for name, entry in used.items() if name not in self._compared}
        self._compared |= set(new)
        changed = changed_sources(new.values())
        self._changed |= changed
        for sentence in changed.values():
            with suppress(OSError):  # the terminal may be closed
                print(f"warning: {in_line(sentence)}", file=sys.stderr, flush=True)
        return sorted({document.source for document in documents} & set(self._changed))


def write_out(text: Iterable[str]) -> bool:
    """Print lines; return False if the reader has closed the pipe, as `| head` does."""
    try:
        print("\n".join(text), flush=True)
    except BrokenPipeError:
        return False
    return True


def recorded_facts(place: Path) -> dict[str, Any]:
    """Read the provenance.json of a run or model.

    Raises:
        UserError: there is no such file.
    """
    from consyn_jax.training.provenance.run_facts import read_facts

    facts = read_facts(place)
    if facts is None:
        raise UserError(
            f"--output {place} has no provenance.json: it is not a run, or an older version "
            "wrote it. Give the directory of a run."
        )
    return facts


def _steps(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,15})(?::(\d{1,15}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(
            f"--documents_of {text} is neither a step nor a range of steps. Give, for example, "
            "12, or 12:20 for steps 12 to 20; the first step is 1, and numbers have at most 15 "
            "digits."
        )
    return first, last


def as_json(documents: Sequence[LearnedDocument]) -> list[dict[str, Any]]:
    """The documents as JSON objects, one for each."""
    return [asdict(document) for document in documents]


def lines(step: int, documents: Sequence[LearnedDocument]) -> Iterator[str]:
    """Yield a heading, then a line per document, by decreasing share of the training targets."""
    targets = sum(document.targets for document in documents)
    yield f"Step {step:,}: {counted(len(documents), 'document')}, {targets:,} training targets"
    for document in sorted(documents, key=lambda document: -document.share):
        place = in_line(document.source)
        if document.row is not None:
            place += f", row {document.row:,}"
        elif document.bytes is not None:
            place += f", bytes {document.bytes[0]:,} to {document.bytes[1]:,}"
        else:
            place += f", document {document.document:,}"
        item = f"{in_line(document.data)}: " if document.data not in ("", document.source) else ""
        tokens = sum(stop - first for _, first, stop in document.parts)
        part = f", {tokens:,} of its {document.length:,} tokens"
        yield f"{document.share:>8.2%}  {item}{place}{part if tokens < document.length else ''}"
