"""Prompts from the command line and from files."""

import json
from pathlib import Path

import pytest

from consyn_jax.errors import UserError
from consyn_jax.inference.text_generation.prompts import (
    GivenPrompt,
    PromptEncoder,
    check_lengths,
    given_prompts,
)
from consyn_jax.tokenization import BPETokenizer

ASKED = [{"role": "user", "content": "Say <|eos|>"}]


def written(path: Path, *rows: object) -> str:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines))
    return str(path)


def test_lines_and_rows_are_prompts(tmp_path: Path) -> None:
    lines = written(tmp_path / "a.txt", "one", "", '{"prompt": "x"}\r')
    found = given_prompts(["first"], lines)
    assert [p.text for p in found] == ["first", "one", '{"prompt": "x"}']
    assert [p.where for p in found] == ["--prompt", f"{lines}, line 1", f"{lines}, line 3"]
    rows = written(tmp_path / "b.jsonl", {"prompt": "x"}, {"messages": ASKED}, {"prompt": ASKED})
    assert [(p.text, p.messages) for p in given_prompts([], rows)] == [
        ("x", None),
        (None, ASKED),
        (None, ASKED),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": ', "line 2 is not JSON"),
        ([1], "line 2 is not an object"),
        ({"text": "x"}, "line 2 has neither prompt nor messages; its keys: text"),
        ({"prompt": "x", "messages": ASKED}, "line 2 has both"),
        ({"prompt": 3}, "line 2 holds a number under the key .prompt., not a string"),
        ({"messages": []}, "line 2 holds an empty array under the key .messages."),
        ({"messages": ["x"]}, "line 2 has no role in message 1"),
        ({"messages": [{"role": "user"}]}, "line 2 has neither text under 'content' nor"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "nothing to answer"),
        ({"messages": ASKED, "tools": {"a": 1}}, "holds an object under the key 'tools', not an"),
        ({"messages": ASKED, "tools": False}, "holds true or false under the key 'tools'"),
        ({"messages": ASKED, "functions": 3}, "holds a number under the key 'functions'"),
        ({"prompt": "x", "tools": [{}]}, "has tools, but its prompt is text"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        given_prompts([], written(tmp_path / "rows.jsonl", {"prompt": "x"}, row))


def test_files_that_hold_no_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a table, not a file"):
        given_prompts([], str(tmp_path / "prompts.csv"))
    with pytest.raises(UserError, match="has no prompts: it is empty"):
        given_prompts([], written(tmp_path / "a.txt", "", "  "))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        given_prompts([], str(tmp_path / "none.txt"))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        given_prompts([], str(tmp_path / "b.txt"))


def test_conversations_end_where_the_model_answers_and_special_text_is_text() -> None:
    tokenizer = BPETokenizer.bytes()
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    found = PromptEncoder(tokenizer, template).encode(GivenPrompt("row 1", None, ASKED))
    assert found.text == "user:Say <|eos|><|eos|>assistant:"
    assert found.ids.count(tokenizer.eos_token_id) == 1
    assert bytes(i for i in found.ids if i < 256) == b"user:Say <|eos|>assistant:"
    plain = PromptEncoder(tokenizer, None)
    assert plain.is_plain
    assert plain.encode(GivenPrompt("row 1", None, ASKED)).text.endswith("<|assistant|>\n")
    refusing = PromptEncoder(tokenizer, "{{ raise_exception('no system') }}")
    with pytest.raises(UserError, match="row 1: the chat template refuses it: no system"):
        refusing.encode(GivenPrompt("row 1", None, ASKED))


def test_a_role_that_no_model_has_learned_is_refused_unless_the_template_names_it() -> None:
    tokenizer = BPETokenizer.bytes()
    asked = [*ASKED, {"role": "usr", "content": "Well?"}]
    with pytest.raises(
        UserError, match=r"row 1: .* role 'usr' in message 2, .*did you mean user\?"
    ):
        PromptEncoder(tokenizer, None).encode(GivenPrompt("row 1", None, asked))
    named = (
        "{% for m in messages %}{{ '#' if m.role == 'usr' else m.role }}{{ m.content }}{% endfor %}"
    )
    assert (
        "#Well?" in PromptEncoder(tokenizer, named).encode(GivenPrompt("row 1", None, asked)).text
    )
    for role in ("system", "developer", "user", "tool"):
        known = GivenPrompt("row 1", None, [*ASKED, {"role": role, "content": "Well?"}])
        assert "Well?" in PromptEncoder(tokenizer, None).encode(known).text


def test_an_empty_prompt_begins_a_document_and_a_long_one_is_refused() -> None:
    encoder = PromptEncoder(BPETokenizer.bytes(), None)
    empty, long = (encoder.encode(GivenPrompt("--prompt", text)) for text in ("", "x" * 40))
    assert len(empty.ids) == 1
    check_lengths([empty], 8)
    with pytest.raises(UserError, match=r"--prompt has 4\d tokens, and the model's context is 8"):
        check_lengths([empty, long], 8)
