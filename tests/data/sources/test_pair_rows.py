"""Rows of preference pairs: texts and messages, with the prompt given or shared, as TRL has them."""

import pytest

from consyn_jax.data.sources.row_formats.fields import BadRow
from consyn_jax.data.sources.row_formats.preference_rows import Pair
from consyn_jax.data.sources.rows import RowKeys, read_row

KEYS = RowKeys(format="preference")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def told(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_texts() -> None:
    row = read_row({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, KEYS)
    assert (row.format, row.content) == ("preference", Pair("2 + 2 =", " 4", " 5"))
    implicit = read_row({"chosen": "It is blue", "rejected": "It is green"}, KEYS)
    assert implicit.content == Pair("It is", " blue", " green")
    joined = RowKeys(prompt="system, question", format="preference")
    row = read_row({"system": "a", "question": "b", "chosen": "c", "rejected": "d"}, joined)
    assert row.content == Pair("a\n\nb", "c", "d")


EXPECTED = Pair([user("Hi")], [told("Hello")], [told("No")])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("Hi")], "chosen": [told("Hello")], "rejected": [told("No")]},
        {"prompt": [user("Hi")], "chosen": "Hello", "rejected": "No"},
        {"chosen": [user("Hi"), told("Hello")], "rejected": [user("Hi"), told("No")]},
        # HuggingFaceH4/ultrafeedback_binarized
        {
            "prompt": "Hi",
            "messages": [user("Hi"), told("Hello")],
            "chosen": [user("Hi"), told("Hello")],
            "rejected": [user("Hi"), told("No")],
        },
        {"prompt": "Hi", "chosen": [told("Hello")], "rejected": [told("No")]},
        {
            "prompt": [user("Hi")],
            "chosen": [user("Hi"), told("Hello")],
            "rejected": [user("Hi"), told("No")],
        },
        # LLaMA-Factory
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "No"},
        },
        {"messages": [user("Hi")], "chosen": told("Hello"), "rejected": told("No")},
        {
            "prompt": '[{"role": "user", "content": "Hi"}]',
            "chosen": '[{"role": "assistant", "content": "Hello"}]',
            "rejected": '[{"role": "assistant", "content": "No"}]',
        },
    ],
)
def test_messages(row: dict) -> None:
    found = read_row(row, KEYS)
    assert (found.format, found.content) == ("preference of messages", EXPECTED)


def test_tools_and_variables_come_along() -> None:
    row = {"prompt": [user("Hi")], "chosen": "a", "rejected": "b", "tools": [{"name": "f"}]}
    found = read_row({**row, "chat_template_kwargs": {"enable_thinking": False}}, KEYS).content
    assert isinstance(found, Pair)
    assert (found.tools, found.variables) == ([{"name": "f"}], {"enable_thinking": False})


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (
            {"prompt": "Hi", "chosen": "a", "rejected": "b", "tools": [{"name": "f"}]},
            "has tools, but its prompt is text; give the prompt as messages.",
        ),
        ({"prompt": "a", "chosen": "b"}, "has no key 'rejected'; its keys are 'chosen', 'prompt'"),
        ({"text": "a"}, "has no key 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "holds a number under 'rejected'"),
        (
            {"question": "a", "chosen": "b", "rejected": "c"},
            "has no key 'prompt', but the prompt may be under 'question'",
        ),
        (
            {"chosen": [told("a")], "rejected": [told("b")]},
            "holds no prompt, and 'chosen' and 'rejected' do not begin with the same",
        ),
        (
            {"prompt": [user("a")], "chosen": [user("b")], "rejected": [told("b")]},
            "holds no message of the role 'assistant' after the prompt in 'chosen'",
        ),
        (
            {"prompt": [user("a")], "chosen": [told("b") | {"weight": 0}], "rejected": "c"},
            "holds an assistant message of weight 0 under 'chosen'",
        ),
        (
            {
                "prompt": "other",
                "chosen": [user("a"), told("b")],
                "rejected": [user("a"), told("c")],
            },
            "holds a prompt that is not among the messages",
        ),
    ],
)
def test_broken_rows(row: dict, fault: str) -> None:
    with pytest.raises(BadRow, match=fault):
        read_row(row, KEYS)


def test_without_the_objective_a_pair_is_refused_with_what_trains_on_it() -> None:
    with pytest.raises(BadRow, match="which needs --objective dpo") as caught:
        read_row({"prompt": "a", "chosen": "b", "rejected": "c"}, RowKeys())
    assert "--prompt_key prompt --completion_key chosen" in caught.value.remedy
