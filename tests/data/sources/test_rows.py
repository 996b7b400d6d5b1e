import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consyn_jax.data.sources.row_formats.conversations import Conversation
from consyn_jax.data.sources.row_formats.fields import BadRow
from consyn_jax.data.sources.row_formats.instructions import ALPACA, ALPACA_WITH_INPUT
from consyn_jax.data.sources.rows import CONVERSATIONS, RowKeys, Segment, read_row

texts = st.text(st.characters(exclude_categories=["Cs"]))


def untrained(text: str) -> Segment:
    return Segment(text, trained=False)


def document(row: Any, keys: RowKeys) -> Any:
    return read_row(row, keys).content


def chat(*messages: tuple[str, str], learned: tuple[bool, ...]) -> Conversation:
    return Conversation([{"role": role, "content": text} for role, text in messages], learned)


def test_the_format_that_says_most_about_a_row_wins() -> None:
    row = {
        "text": "t",
        "messages": [{"role": "assistant", "content": "m"}],
        "conversations": [{"from": "gpt", "value": "s"}],
        "instruction": "i",
        "output": "o",
        "prompt": "p",
        "completion": "c",
    }
    for expected, key in [
        ("messages", "messages"),
        ("sharegpt", "conversations"),
        ("alpaca", "instruction"),
        ("prompt_completion", "prompt"),
        ("text", "text"),
    ]:
        assert read_row(row, RowKeys()).format == expected
        assert read_row({**row, key: row[key]}, RowKeys(format=expected)).format == expected
        row[key] = None  # a column that only other rows fill
    with pytest.raises(BadRow, match="holds null under the key 'text'"):
        read_row(row, RowKeys())


@pytest.mark.parametrize("format", ["messages", "sharegpt", "alpaca", "prompt_completion", "text"])
def test_the_flag_wins_over_what_is_found(format: str) -> None:
    row = {
        "text": "t",
        "messages": [{"role": "assistant", "content": "m"}],
        "conversations": [{"from": "gpt", "value": "s"}],
        "instruction": "i",
        "output": "o",
        "prompt": "p",
        "completion": "c",
    }
    assert read_row(row, RowKeys(format=format)).format == format
    with pytest.raises(BadRow):
        read_row({"other": 1}, RowKeys(format=format))


def test_a_prompt_key_makes_every_row_a_prompt_row() -> None:
    row = {"text": "t", "prompt": "p", "completion": "c", "question": "q", "answer": "a"}
    assert document(row, RowKeys(prompt="question")) == (untrained("q"), Segment("c"))
    assert document(row, RowKeys(completion="answer")) == (untrained("p"), Segment("a"))
    assert document(row, RowKeys(prompt="question", completion="answer")) == (
        untrained("q"),
        Segment("a"),
    )


def test_keys_reach_into_objects_unless_a_key_has_the_whole_name() -> None:
    row = {
        "a": {"b": "inner", "c": [{"role": "assistant", "content": "x"}]},
        "d.e": "whole",
        "d": {"e": "inner"},
    }
    assert document(row, RowKeys(text="a.b")) == (Segment("inner"),)
    assert document(row, RowKeys(text="d.e")) == (Segment("whole"),)
    assert document(row, RowKeys(messages="a.c")) == chat(("assistant", "x"), learned=(True,))
    assert document(row, RowKeys(prompt="a.b", completion="d.e")) == (
        untrained("inner"),
        Segment("whole"),
    )


@pytest.mark.parametrize(
    ("given", "prompt"), [("With this.", "Do this.\n\nWith this."), ("", "Do this.")]
)
def test_several_prompt_keys_are_joined_by_a_blank_line(given: str, prompt: str) -> None:
    row = {"instruction": "Do this.", "input": given, "output": "Done."}
    for names in ("instruction,input", "instruction, input"):
        assert document(row, RowKeys(prompt=names, completion="output")) == (
            untrained(prompt),
            Segment("Done."),
        )
    assert document({"a,b": "x", "completion": "y"}, RowKeys(prompt="a,b")) == (
        untrained("x"),
        Segment("y"),
    )


def test_messages_become_what_templates_take() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "2 + 2"},
                {"type": "text", "text": "?", "image": None},
            ],
        },
        {"role": "assistant", "content": "4", "tool_calls": None, "weight": 0},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "content": "Still 4", "weight": 1, "reasoning_content": "so"},
    ]
    found = document({"messages": messages, "tools": []}, RowKeys())
    assert found.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "content": "Still 4", "reasoning_content": "so"},
    ]
    assert found.learned == (False, False, False, True, False, True)
    assert found.tools is None


def test_openais_older_functions_are_tools() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "Rain?"},
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "f", "arguments": "{}"},
            },
            {"role": "function", "name": "f", "content": "no"},
        ],
        "functions": [{"name": "f"}],
    }
    found = document(row, RowKeys())
    assert found.tools == [{"type": "function", "function": {"name": "f"}}]
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert found.messages[1] == {"role": "assistant", "tool_calls": [call]}
    assert found.messages[2]["role"] == "tool"


def test_a_table_holds_messages_as_json_in_a_string() -> None:
    row = {"messages": '[{"role": "assistant", "content": "x"}]', "tools": '[{"name": "f"}]'}
    found = document(row, RowKeys())
    assert found == Conversation([{"role": "assistant", "content": "x"}], (True,), [{"name": "f"}])


def test_sharegpt_names_roles_otherwise() -> None:
    row = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"day": 1}}'},
            {"from": "observation", "value": "no"},
            {"from": "gpt", "value": "No.", "weight": None},
        ],
    }
    found = document(row, RowKeys())
    assert [m["role"] for m in found.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": {"day": 1}}}
    assert found.messages[2]["tool_calls"] == [call]
    assert found.learned == (False, False, True, False, True)
    by_flag = {"turns": row["conversations"]}
    assert read_row(by_flag, RowKeys(messages="turns")).format == "sharegpt"


@pytest.mark.parametrize("given", ["", None, "  "])
def test_alpaca_has_its_usual_prompt(given: str | None) -> None:
    row = {"instruction": "Do {input} {x}.", "input": given, "output": "Done.", "text": "all of it"}
    assert document(row, RowKeys()) == (
        untrained(ALPACA.replace("{instruction}", "Do {input} {x}.")),
        Segment("Done."),
    )
    row["input"] = "With {this}."
    expected = ALPACA_WITH_INPUT.replace("{input}", "With {this}.")
    assert document(row, RowKeys())[0] == untrained(
        expected.replace("{instruction}", row["instruction"])
    )


def test_prompt_and_completion_may_be_messages() -> None:
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    answer = [{"role": "assistant", "content": "c"}]
    learned = (False, False, True)
    expected = chat(("user", "a"), ("assistant", "b"), ("assistant", "c"), learned=learned)
    for completion in (answer, "c"):
        row = read_row({"prompt": prompt, "completion": completion}, RowKeys())
        assert (row.content, row.format in CONVERSATIONS) == (expected, True)
    keys = RowKeys(prompt="q", completion="a")
    assert document({"q": prompt, "a": answer}, keys) == expected


@pytest.mark.parametrize(
    ("row", "message", "remedy"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preference pair", "--prompt_key prompt --completion_key chosen"),
        ({"chosen": [{"role": "assistant", "content": "c"}], "rejected": []}, "preference pair", "--messages_key chosen"),
        ({"chosen": "c", "rejected": "r"}, "preference pair", "--text_key chosen"),
        ({"question": "q", "chosen": "c", "rejected": "r", "text": "t"}, "preference pair", "--prompt_key question"),
        ({"prompt": "p", "completion": "c", "label": False}, "labelled", "whose label is true"),
        ({"prompt": "p", "completions": ["c"], "labels": [True]}, "the steps", "and completion"),
    ],
)  # fmt: skip
def test_preferences_are_refused_by_name(row: dict, message: str, remedy: str) -> None:
    with pytest.raises(BadRow, match=message) as fault:
        read_row(row, RowKeys())
    assert remedy in fault.value.remedy
    words = fault.value.remedy.removesuffix(".").split("--")[1:]
    flags = dict(word.split()[:2] for word in words)
    keys = {name.removesuffix("_key"): value.strip() for name, value in flags.items()}
    if keys:
        assert read_row(row, RowKeys(**keys)).content


def test_likely_pairs_are_named() -> None:
    with pytest.raises(BadRow) as fault:
        read_row({"question": "q", "answer": "a"}, RowKeys())
    assert fault.value.remedy == "Give --prompt_key question --completion_key answer."


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        (
            {"id": "7", "a review": "long enough"},
            "as in --text_key 'a review', or give the keys of prompt and answer with "
            "--prompt_key and ",
        ),
        ({"body": "b", "id": 7}, "Give the key of the text, as in --text_key body."),
        ({"content": None, "id": None}, "as in --text_key content, or give the keys of"),
        ({"id": 7}, "Give a --row_format, --text_key, --prompt_key, "),
        ({"dialog": [{"role": "user", "content": "q"}]}, "Give --messages_key dialog."),
        ({"dialog": '[{"from": "human", "value": "q"}]'}, "Give --messages_key dialog."),
        ({"data": {"text": "a"}}, "Give --text_key data.text."),
        ({"x": {"prompt": "a", "completion": "b"}}, "--prompt_key x.prompt --completion_key x.com"),
        (
            {"a b": {"question": "q", "answer": "a"}},
            "Give --prompt_key 'a b.question' --completion_key 'a b.answer'.",
        ),
        (
            {"instruction": "i", "context": "c", "response": "r"},
            "Give --prompt_key instruction,context --completion_key response.",
        ),
        (
            {"question": "q", "context": "c", "answer": "a"},
            "Give --prompt_key context,question --completion_key answer.",
        ),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "write the ids to a .npy or .bin file, or "),
    ],
)
def test_what_to_do_about_an_unknown_row_is_said(row: dict, remedy: str) -> None:
    with pytest.raises(BadRow) as fault:
        read_row(row, RowKeys())
    assert remedy in fault.value.remedy


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"messages": [{"role": "assistant", "content": "a"}]}, {"prompt": "prompt"}),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, {"format": "messages"}),
        ({"instruction": "i", "output": "o"}, {"format": "text"}),
    ],
)
def test_flags_that_such_rows_do_not_need_are_told_so(row: dict, keys: dict[str, Any]) -> None:
    with pytest.raises(BadRow) as fault:
        read_row(row, RowKeys(**keys))
    assert fault.value.remedy.startswith("Leave out --row_format and the flags")
    read_row(row, RowKeys())


def test_messages_given_as_a_text_are_told_to_be_messages() -> None:
    row = {"turns": [{"role": "assistant", "content": "a"}]}
    with pytest.raises(BadRow, match="holds messages under the key 'turns'") as fault:
        read_row(row, RowKeys(text="turns"))
    assert fault.value.remedy == "Give --messages_key turns instead."
    assert read_row(row, RowKeys(messages="turns")).format == "messages"


@pytest.mark.parametrize("keys", [RowKeys(), RowKeys(format="sharegpt")])
def test_sharegpt_under_the_name_of_openai_is_read(keys: RowKeys) -> None:
    row = {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    found = read_row(row, keys)
    assert found.format == "sharegpt"
    assert found.content == chat(("user", "q"), ("assistant", "a"), learned=(False, True))


@pytest.mark.parametrize(
    ("row", "keys", "unread"),
    [
        ({"text": "t", "label": 1, "url": None}, RowKeys(), ("label", "url")),
        ({"messages": [{"role": "assistant", "content": "a"}], "tools": None}, RowKeys(), ()),
        ({"a": {"b": "t", "c": "u"}, "d": 1}, RowKeys(text="a.b"), ("d",)),
        ({"i": "i", "c": "c", "r": "r"}, RowKeys(prompt="i", completion="r"), ("c",)),
        ({"i": "i", "c": "c", "r": "r"}, RowKeys(prompt="i, c", completion="r"), ()),
        ({"instruction": "i", "input": "", "output": "o", "text": "t"}, RowKeys(), ("text",)),
        ({"chosen": "a", "rejected": "b", "score": 1}, RowKeys(format="preference"), ("score",)),
    ],
)
def test_fields_that_are_not_read_are_known(row: dict, keys: RowKeys, unread: tuple) -> None:
    assert read_row(row, keys).unread == unread


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | texts
    | st.sampled_from(["user", "assistant", "\ud800"]),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.sampled_from(
                ["text", "messages", "role", "content", "type", "prompt", "completion"]
            ),
            inner,
        )
    ),
)


@given(
    row=json_values,
    keys=st.sampled_from(
        [
            RowKeys(),
            RowKeys(prompt="prompt"),
            RowKeys(text="content.text"),
            RowKeys(text="role", messages="content"),
        ]
    ),
)
def test_any_row_is_a_document_or_a_bad_row(row: Any, keys: RowKeys) -> None:
    try:
        segments = document(row, keys)
    except BadRow:
        return
    if isinstance(segments, Conversation):
        assert any(segments.learned)
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
            "has no key 'text'; its keys are 'body', 'id'.",
        ),
        ({}, RowKeys(), "has no key 'text'; its keys are none."),
        (
            NO_ROW,
            RowKeys(),
            "has no key 'text'; its keys are '" + "a" * 39 + "..., 'column 00', 'column 01',",
        ),
        (NO_ROW, RowKeys(), "'column 06' and 4 more."),
        ({"prompt": "x"}, RowKeys(), "has no key 'text'; its keys are 'prompt'."),
        (
            {"text": {"body": "x"}},
            RowKeys(text="text.title"),
            "has no key 'text.title'; its keys are 'text'.",
        ),
        ({"text": 3}, RowKeys(), "holds a number under the key 'text', not a string."),
        ({"text": None}, RowKeys(), "holds null under the key 'text', not a string."),
        (
            {"text": b"x"},
            RowKeys(),
            "holds a value of type bytes under the key 'text', not a string.",
        ),
        (
            {"text": "\ud800"},
            RowKeys(),
            "holds half of a surrogate pair under the key 'text', which is not text.",
        ),
        (
            {"prompt": "x"},
            RowKeys(prompt="prompt"),
            "has no key 'completion'; its keys are 'prompt'.",
        ),
        (
            {"a": "x", "completion": "y"},
            RowKeys(prompt="a,b"),
            "has no key 'b'; its keys are 'a', 'completion'.",
        ),
        (
            {"prompt": 3, "completion": "y"},
            RowKeys(),
            "holds a number under the key 'prompt', not a string.",
        ),
        (
            {"prompt": "x", "completion": None},
            RowKeys(prompt="prompt"),
            "holds null under the key 'completion', not a string.",
        ),
        (
            {"prompt": "x", "completion": " \n"},
            RowKeys(),
            "holds no text under the key 'completion', so there is nothing to train on.",
        ),
        (
            {"messages": "x"},
            RowKeys(),
            "holds a string under the key 'messages', not an array of messages.",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "tools": {}},
            RowKeys(),
            "holds an object under the key 'tools', not an array.",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "functions": False},
            RowKeys(),
            "holds true or false under the key 'functions', not an array.",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "chat_template_kwargs": []},
            RowKeys(),
            "holds an array under 'chat_template_kwargs', not an object.",
        ),
        (
            {"conversations": [{"from": "gpt", "value": "x"}], "system": ["Be brief."]},
            RowKeys(),
            "holds an array under the key 'system', not a string.",
        ),
        (
            {"messages": []},
            RowKeys(),
            "holds no message of the role 'assistant', so there is nothing to train on.",
        ),
        (
            {"messages": ["x"]},
            RowKeys(),
            "holds a string in message 1 under 'messages', "
            "not an object with the keys 'role' and 'content'.",
        ),
        (
            {"messages": [{"who": "gpt", "value": "x"}]},
            RowKeys(),
            "has no key 'role' in message 1 under 'messages'; its keys are 'value', 'who'.",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "weight": 0}]},
            RowKeys(),
            "holds only messages of weight 0, so there is nothing to train on.",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]},
            RowKeys(),
            "holds the weight 0.5 in message 1 under 'messages'; a weight must be 0 or 1.",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["q", "a"]]},
            RowKeys(),
            "holds an array under 'history', which Alpaca's prompt cannot include;",
        ),
        (
            {"messages": [{"role": "user"}]},
            RowKeys(),
            "has no key 'content' in message 1 under 'messages'; its keys are 'role'.",
        ),
        (
            {"messages": [{"role": "narrator", "content": "x"}]},
            RowKeys(),
            "holds the role 'narrator' in message 1 under 'messages'; "
            "known roles: 'system', 'developer', 'user', 'assistant', 'tool'.",
        ),
        (
            {"messages": [{"role": ["user"], "content": "x"}]},
            RowKeys(),
            "holds the role an array in message 1 under 'messages';",
        ),
        (
            {"messages": [{"role": "assistant", "content": 3}]},
            RowKeys(),
            "holds a number as content in message 1 under 'messages', "
            "not a string or an array of text parts.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            RowKeys(),
            "holds a part of type 'image' in message 1 under 'messages'; "
            'only {"type": "text", "text": ...} can be read.',
        ),
        (
            {"messages": [{"role": "user", "content": ["x"]}]},
            RowKeys(),
            "holds a string without a type in message 1 under 'messages';",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            RowKeys(),
            "holds null as text of a part in message 1 under 'messages', not a string.",
        ),
        (
            {"messages": [{"role": "assistant", "content": "\udc00"}]},
            RowKeys(),
            "holds half of a surrogate pair as content in message 1 under 'messages'",
        ),
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
    assert all(
        len(d) == 2 and d[0].text.startswith(row["instruction"])
        for d, row in zip(documents, (r for r in alpaca if r["output"].strip()), strict=True)
    )
    with (shared_data / "jsonl" / "gsm8k_train.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            assert document(row, RowKeys(prompt="question", completion="answer")) == (
                untrained(row["question"]),
                Segment(row["answer"]),
            )
