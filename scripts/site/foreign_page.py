"""The page of settings of other trainers, made from the table that answers unknown flags."""

from __future__ import annotations

import re

from command_pages import cell

from consyn_jax.foreign_flags import FOREIGN

HEAD = """\
# Settings of other trainers

What flags, config keys and keywords of transformers (`TrainingArguments`, `run_clm.py`,
`config.json`), TRL, accelerate, torchrun, nanoGPT, LitGPT, torchtitan and Megatron-LM are called
here. A command that gets one of them answers with the same line. Names that are equal here are not
listed. In a `--config` file and from Python, names are written without the dashes.

| there | here |
|---|---|
"""


def foreign_page() -> str:
    """Markdown: a line for each setting, with its names elsewhere."""
    names: dict[str, list[str]] = {}
    for name, advice in FOREIGN.items():
        names.setdefault(advice, []).append(name)
    rows = [
        f"| {', '.join(f'`{name}`' for name in found)} | {cell(_written(advice))} |"
        for advice, found in names.items()
    ]
    return HEAD + "\n".join(rows) + "\n"


def _written(advice: str) -> str:
    """Advice with its flags as a person would type them."""

    def flag(match: re.Match[str]) -> str:
        value = (match[2] or "").replace("*", "") or ("VALUE" if match[2] else "")
        return f"`--{match[1]}{' ' + value if value else ''}`"

    return re.sub(r"\[(\w+)(?: ([^\]]*))?\]", flag, advice)
