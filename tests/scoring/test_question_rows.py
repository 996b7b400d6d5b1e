"""The rules by which a text is the right answer, and rows that are not questions."""

import pytest

from consyn_jax.data.sources.row_formats.fields import BadRow
from consyn_jax.scoring.question_rows import has_number, is_right, question

ASKED = [{"role": "user", "content": "hi"}]
GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = 1,072.\n#### 1,072"


@pytest.mark.parametrize(
    ("text", "exact", "strict", "flexible"),
    [
        (f" {GSM8K}\n", True, True, True),
        ("#### 1072", False, True, True),
        ("#### 1,072. No, #### 5", False, True, False),  # the first after ####; the last of all
        ("So it is $1,072.", False, False, True),
        ("So it is 1072.0", False, False, False),  # compared as text, as lm_eval does
        ("I do not know.", False, False, False),
    ],
)
def test_the_rules_of_gsm8k(text: str, exact: bool, strict: bool, flexible: bool) -> None:
    asked = question({"prompt": "Clips?", "answer": GSM8K}, "x:1")
    assert has_number(asked)
    found = [is_right(m, asked, text) for m in ("exact_match", "number_strict", "number_flexible")]
    assert found == [exact, strict, flexible]


def test_several_answers_and_answers_without_numbers() -> None:
    asked = question({"prompt": "?", "answers": ["Paris", "in Paris"], "stop": "\n"}, "x:1")
    assert asked.stop == ("\n",)
    assert not has_number(asked)
    assert is_right("exact_match", asked, " in Paris\n")
    assert not is_right("exact_match", asked, "paris")


@pytest.mark.parametrize("none", [{}, {"tools": None}, {"tools": []}, {"tools": ""}])
def test_tools_of_a_question(none: dict[str, object]) -> None:
    row = {"messages": ASKED, "answer": "b"}
    tool = {"type": "function", "function": {"name": "add"}}
    assert question({**row, "tools": [tool]}, "x:1").tools == (tool,)
    assert question({**row, "functions": [{"name": "add"}]}, "x:1").tools == (tool,)
    assert question({**row, **none}, "x:1").tools is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "a prompt without an answer"),
        ({"prompt": "a", "answer": 3}, "holds a number"),
        ({"prompt": "a", "answers": []}, "under the key 'answers'"),
        ({"prompt": "a", "answer": "b", "answers": ["b"]}, "both answer and answers"),
        ({"prompt": "a", "messages": [], "answer": "b"}, "both prompt and messages"),
        ({"messages": "hi", "answer": "b"}, "a string under the key 'messages'"),
        ({"messages": [{"content": "hi"}], "answer": "b"}, "no role in message 1"),
        ({"messages": [{"role": "assistant", "content": "x"}], "answer": "b"}, "nothing to answer"),
        ({"messages": ASKED, "answer": "b", "tools": {}}, "holds an object under the key 'tools'"),
        ({"messages": ASKED, "answer": "b", "tools": 0}, "holds a number under the key 'tools'"),
        ({"prompt": "a", "answer": "b", "tools": [{}]}, "has tools, but its prompt is text"),
        ({"prompt": "a", "answer": "b", "max_tokens": 0}, "under the key 'max_tokens'"),
        ({"prompt": "a", "answer": "b", "stop": 3}, "under the key 'stop'"),
        ({"prompt": "a", "answer": "b", "stop": ["c", ""]}, "an empty text under the key 'stop'"),
    ],
)
def test_rows_that_are_no_questions(row: dict[str, object], message: str) -> None:
    with pytest.raises(BadRow, match=message):
        question(row, "x:1")
