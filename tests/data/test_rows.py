import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consyn_jax.data.rows import BadRow, RowKeys, Segment, document

texts = st.text(st.characters(exclude_categories=["Cs"]))


def untrained(text: str, ends: bool = False) -> Segment:
    return Segment(text, trained=False, ends=ends)


def test_text_comes_before_messages_and_messages_before_prompts() -> None:
    row = {"text": "t", "messages": [{"role": "assistant", "content": "m"}], "prompt": "p", "completion": "c"}
    assert document(row, RowKeys()) == (Segment("t"),)
    del row["text"]
    assert document(row, RowKeys()) == (untrained("<|assistant|>\n"), Segment("m"))
    del row["messages"]
    assert document(row, RowKeys()) == (untrained("p"), Segment("c"))


def test_a_prompt_key_makes_every_row_a_prompt_row() -> None:
    row = {"text": "t", "prompt": "p", "completion": "c", "question": "q", "answer": "a"}
    assert document(row, RowKeys(prompt="question")) == (untrained("q"), Segment("c"))
    assert document(row, RowKeys(completion="answer")) == (untrained("p"), Segment("a"))
    assert document(row, RowKeys(prompt="question", completion="answer")) == (untrained("q"), Segment("a"))


def test_keys_reach_into_objects_and_a_key_with_the_whole_name_comes_first() -> None:
    row = {"a": {"b": "inner", "c": [{"role": "assistant", "content": "x"}]}, "d.e": "whole", "d": {"e": "inner"}}
    assert document(row, RowKeys(text="a.b")) == (Segment("inner"),)
    assert document(row, RowKeys(text="d.e")) == (Segment("whole"),)
    assert document(row, RowKeys(messages="a.c")) == (untrained("<|assistant|>\n"), Segment("x"))
    assert document(row, RowKeys(prompt="a.b", completion="d.e")) == (untrained("inner"), Segment("whole"))


@pytest.mark.parametrize(("given", "prompt"), [("at hand", "Do this.\n\nat hand"), ("", "Do this.")])
def test_several_prompt_keys_are_joined_by_a_blank_line(given: str, prompt: str) -> None:
    row = {"instruction": "Do this.", "input": given, "output": "Done."}
    for names in ("instruction,input", "instruction, input"):
        assert document(row, RowKeys(prompt=names, completion="output")) == (untrained(prompt), Segment("Done."))
    assert document({"a,b": "x", "completion": "y"}, RowKeys(prompt="a,b")) == (untrained("x"), Segment("y"))


def test_a_chat_trains_on_what_the_assistant_says_and_ends_every_message_but_the_last() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "2 + 2"}, {"type": "text", "text": "?", "image": None}]},
        {"role": "assistant", "content": "4", "tool_calls": None},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "Still 4"},
    ]
    assert document({"messages": messages}, RowKeys()) == (
        untrained("<|system|>\n"),
        untrained("Be brief.", ends=True),
        untrained("<|user|>\n"),
        untrained("2 + 2?", ends=True),
        untrained("<|assistant|>\n"),
        Segment("4", ends=True),
        untrained("<|tool|>\n"),
        untrained("", ends=True),
        untrained("<|assistant|>\n"),
        Segment("Still 4"),
    )


@given(messages=st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": texts})))
def test_no_chat_loses_text_or_trains_on_another_role(messages: list[dict[str, str]]) -> None:
    answered = any(m["role"] == "assistant" and m["content"].strip() for m in messages)
    if not answered:
        with pytest.raises(BadRow, match="nothing to train on"):
            document({"messages": messages}, RowKeys())
        return
    segments = document({"messages": messages}, RowKeys())
    assert "".join(s.text for s in segments) == "".join(f"<|{m['role']}|>\n{m['content']}" for m in messages)
    assert [s.text for s in segments if s.trained] == [m["content"] for m in messages if m["role"] == "assistant"]
    assert [s.ends for s in segments] == [False, True] * (len(messages) - 1) + [False, False]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts | st.sampled_from(["user", "assistant", "\ud800"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["text", "messages", "role", "content", "type", "prompt", "completion"]), inner),
)


@given(row=json_values, keys=st.sampled_from([RowKeys(), RowKeys(prompt="prompt"), RowKeys(text="content.text"), RowKeys(text="role", messages="content")]))
def test_whatever_the_row_it_is_a_document_or_a_bad_row(row: Any, keys: RowKeys) -> None:
    try:
        segments = document(row, keys)
    except BadRow:
        return
    assert any(segment.trained for segment in segments)
    assert all(segment.text.encode().decode() == segment.text for segment in segments)


NO_ROW = {f"column {i:02d}": 0 for i in range(11)} | {"a" * 100: 0}


@pytest.mark.parametrize(
    ("row", "keys", "message"),
    [
        ("text", RowKeys(), "holds a string, not an object with the key 'text'."),
        (None, RowKeys(), "holds null, not an object with the key 'text'."),
        (
            {"body": "x", "id": 1},
            RowKeys(),
            "has no key 'text'; its keys are 'body', 'id' (--text_key, --prompt_key, --completion_key or --messages_key chooses).",
        ),
        ({}, RowKeys(), "has no key 'text'; its keys are none ("),
        (NO_ROW, RowKeys(), "has no key 'text'; its keys are '" + "a" * 39 + "..., 'column 00', 'column 01',"),
        (NO_ROW, RowKeys(), "'column 06' and 4 more ("),
        ({"prompt": "x"}, RowKeys(), "has no key 'text'; its keys are 'prompt' ("),
        ({"text": {"body": "x"}}, RowKeys(text="text.title"), "has no key 'text.title'; its keys are 'text' ("),
        ({"text": 3}, RowKeys(), "holds a number under the key 'text', not a string."),
        ({"text": None}, RowKeys(), "holds null under the key 'text', not a string."),
        ({"text": b"x"}, RowKeys(), "holds a value of type bytes under the key 'text', not a string."),
        ({"text": "\ud800"}, RowKeys(), "holds half of a surrogate pair under the key 'text', which is no text."),
        ({"prompt": "x"}, RowKeys(prompt="prompt"), "has no key 'completion'; its keys are 'prompt' ("),
        ({"a": "x", "completion": "y"}, RowKeys(prompt="a,b"), "has no key 'b'; its keys are 'a', 'completion' ("),
        ({"prompt": ["x"], "completion": "y"}, RowKeys(), "holds an array under the key 'prompt', not a string."),
        ({"prompt": "x", "completion": None}, RowKeys(), "holds null under the key 'completion', not a string."),
        ({"prompt": "x", "completion": " \n"}, RowKeys(), "holds no text under the key 'completion', so that there is nothing to train on."),
        ({"messages": "x"}, RowKeys(), "holds a string under the key 'messages', not an array of messages."),
        ({"messages": []}, RowKeys(), "holds no text of the role 'assistant' under the key 'messages', so that there is nothing to train on."),
        ({"messages": ["x"]}, RowKeys(), "holds a string in message 1 under 'messages', not an object with the keys 'role' and 'content'."),
        ({"messages": [{"from": "gpt", "value": "x"}]}, RowKeys(), "has no key 'role' in message 1 under 'messages'; its keys are 'from', 'value'."),
        ({"messages": [{"role": "user"}]}, RowKeys(), "has no key 'content' in message 1 under 'messages'; its keys are 'role'."),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            RowKeys(),
            "holds the role 'bot' in message 1 under 'messages'; known are 'system', 'user', 'assistant', 'tool'.",
        ),
        ({"messages": [{"role": ["user"], "content": "x"}]}, RowKeys(), "holds the role an array in message 1 under 'messages';"),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            RowKeys(),
            "holds null as content in message 1 under 'messages', not a string or an array of text parts.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            RowKeys(),
            'holds a part of type \'image\' in message 1 under \'messages\'; only {"type": "text", "text": ...} can be read.',
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, RowKeys(), "holds a string without a type in message 1 under 'messages';"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            RowKeys(),
            "holds null as text of a part in message 1 under 'messages', not a string.",
        ),
        ({"messages": [{"role": "assistant", "content": "\udc00"}]}, RowKeys(), "holds half of a surrogate pair as content in message 1 under 'messages'"),
        (BadRow("is broken JSON."), RowKeys(), "is broken JSON."),
    ],
)
def test_bad_rows_say_what_is_wrong(row: Any, keys: RowKeys, message: str) -> None:
    with pytest.raises(BadRow) as fault:
        document(row, keys)
    assert message in str(fault.value)


def test_real_rows(shared_data: Path) -> None:
    alpaca = json.loads((shared_data / "jsonl" / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    keys = RowKeys(prompt="instruction,input", completion="output")
    documents = [document(row, keys) for row in alpaca if row["output"].strip()]
    assert len(documents) > 900
    assert all(len(d) == 2 and d[0].text.startswith(row["instruction"]) for d, row in zip(documents, (r for r in alpaca if r["output"].strip()), strict=True))
    with (shared_data / "jsonl" / "gsm8k_train.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            assert document(row, RowKeys(prompt="question", completion="answer")) == (untrained(row["question"]), Segment(row["answer"]))
