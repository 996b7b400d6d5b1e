"""Several named templates: which one writes a conversation, as `get_chat_template` chooses it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_families import CHATML_TEMPLATE, FAMILIES

from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.errors import UserError
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.tokenization import BPETokenizer

FOR_TOOLS = "{{ tools | tojson }}" + CHATML_TEMPLATE
TALK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
ROWS: list[dict[str, Any]] = [{"messages": TALK}, {"messages": TALK, "tools": TOOLS}]


def written(directory: Path, how: str) -> Path:
    """A tokenizer with two templates: in tokenizer_config.json, or as files of their own."""
    FAMILIES["chatml"].ours.save(directory)
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text())
    if how == "list":
        config["chat_template"] = [
            {"name": "default", "template": CHATML_TEMPLATE},
            {"name": "tool_use", "template": FOR_TOOLS},
        ]
    else:
        (directory / "chat_template.jinja").write_text(CHATML_TEMPLATE)
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates" / "tool_use.jinja").write_text(FOR_TOOLS)
    config["split_special_tokens"] = False
    file.write_text(json.dumps(config))
    return directory


@pytest.mark.torch
@pytest.mark.parametrize("how", ["list", "files"])
@pytest.mark.parametrize("workers", [0, 1])
def test_rows_with_tools_are_written_with_the_template_for_tools(
    how: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path / "cache"))
    theirs = AutoTokenizer.from_pretrained(written(tmp_path / "model", how))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = CorpusOptions(
        data=(str(tmp_path / "rows.jsonl"),), validation_fraction=0.0, num_workers=workers
    )
    tokenizer = BPETokenizer.from_file(tmp_path / "model")
    split = prepare(options, tokenizer).store.split("train")
    ids = np.empty(split.num_tokens, split.dtype)
    split.read(0, ids)
    expected = [theirs.apply_chat_template(TALK, tools=tools) for tools in (None, TOOLS)]
    found = [made["input_ids"] if not isinstance(made, list) else made for made in expected]
    assert found[0] != found[1]
    assert ids.tolist() == [*found[0], *found[1]]
    tokenizer.save(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.get_chat_template(tools=TOOLS) == FOR_TOOLS
    assert again.get_chat_template() == CHATML_TEMPLATE


def test_named_templates_that_are_not_text_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path, "list") / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["chat_template"][1]["template"] = 3
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="chat_template that is not text"):
        _ = BPETokenizer.from_file(tmp_path).tool_template
