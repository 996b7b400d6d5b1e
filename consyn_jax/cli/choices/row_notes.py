"""Header lines about rows of the data: their format, and an example."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from consyn_jax.errors import listed
from consyn_jax.prepare_config import CorpusOptions

if TYPE_CHECKING:
    from consyn_jax.data.preparation.corpus_report import Report
    from consyn_jax.tokenization import BPETokenizer

SHOWN = 160  # characters of the example's prompt and target
SHOWN_KEYS = 5  # number of unread fields to name


def row_notes(
    report: Report, options: CorpusOptions, tokenizer: BPETokenizer
) -> list[tuple[str, str]]:
    """Header lines about rows, each as (name, text); none if the data has no rows.

    Args:
        tokenizer: the token store's tokenizer, with the chat template that formatted the rows.
    """
    from consyn_jax.data.preparation.corpus_report import CHANGES, NOTICES
    from consyn_jax.data.sources.rows import CONVERSATIONS

    notes = []
    if report.formats:
        found = ", ".join(f"{count:,} as {name}" for name, count in report.formats.items())
        by = "" if options.row_format == "auto" else f" (--row_format {options.row_format})"
        notes.append(("rows", f"read {found}{by}"))
    if report.unread:
        unread = listed([f"{key} ({count:,})" for key, count in report.unread.items()], SHOWN_KEYS)
        notes.append(
            (
                "not read",
                f"fields that no option uses, with the number of rows that have them: {unread}",
            )
        )
    if any(name in CONVERSATIONS for name in report.formats):
        notes.append(("chat template", _template(options.chat_template, tokenizer)))
        notes += _date(tokenizer)
    elif options.chat_template != "auto":
        unused = "has no effect, because the data has no conversations"
        notes.append(("chat template", f"--chat_template {options.chat_template} {unused}"))
    if report.example:
        _, prompt, target = report.example
        notes.append(("prompt", _end(prompt)))
        notes.append(("target", _beginning(target)))
    notes += [
        ("noticed", f"{count:,} {NOTICES.get(name, name)}")
        for name, count in report.noticed.items()
        if count
    ]
    changed = [f"{n:,} {CHANGES.get(name, name)}" for name, n in report.changed.items() if n]
    return notes + ([("changed", "; ".join(changed))] if changed else [])


def _template(given: str, tokenizer: BPETokenizer) -> str:
    from consyn_jax.tokenization.chat.plain_template import PLAIN

    if given not in ("auto", "plain"):
        return given
    if tokenizer.chat_template == PLAIN:
        return "roles are marked by plain text; the template is exported with the model"
    return "the model's own"


def _date(tokenizer: BPETokenizer) -> list[tuple[str, str]]:
    """Header line about a chat template that writes the date; all rows get the same date."""
    from consyn_jax.tokenization.chat.sandbox import RENDERED_DAY, writes_date

    sources = (tokenizer.chat_template, tokenizer.tool_template)
    if not any(writes_date(source) for source in sources if source):
        return []
    day = f"{RENDERED_DAY:%d %b %Y}"
    return [
        (
            "noticed",
            f"the chat template writes today's date; all rows get {day}, so that the data does "
            "not depend on the day",
        )
    ]


def _end(text: str) -> str:
    shown = json.dumps(text[-SHOWN:], ensure_ascii=False)
    return f"... {shown}" if len(text) > SHOWN else shown


def _beginning(text: str) -> str:
    shown = json.dumps(text[:SHOWN], ensure_ascii=False)
    return f"{shown} ..." if len(text) > SHOWN else shown
