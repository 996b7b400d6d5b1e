"""A conversation keeps what was said, and forgets it when it is asked to."""

from types import SimpleNamespace
from typing import Any

import pytest

from consyn_jax.errors import UserError
from consyn_jax.inference.text_generation import chat_session
from consyn_jax.inference.text_generation.chat_session import ChatSession


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> ChatSession:
    """A session of a model whose answer is how many messages it was given."""

    def encode(given: Any) -> SimpleNamespace:
        return SimpleNamespace(ids=given.messages)

    def continuations(engine: Any, tokenizer: Any, prompts: Any, wish: Any) -> Any:
        size = str(len(prompts[0].ids))
        yield SimpleNamespace(new=size, text=size, ends="eos")

    monkeypatch.setattr(chat_session, "continuations", continuations)
    engine: Any = SimpleNamespace(plan=SimpleNamespace(config=SimpleNamespace(context=6)))
    encoder, nothing = SimpleNamespace(encode=encode), SimpleNamespace()
    return ChatSession(engine, nothing, encoder, nothing, lambda _: None)  # type: ignore[arg-type]


def test_an_answer_follows_all_messages_before_it(session: ChatSession) -> None:
    assert [session.answer(text) for text in ("a", "b")] == ["eos", "eos"]
    assert [(m["role"], m["content"]) for m in session.messages] == [
        *(("user", "a"), ("assistant", "1")),
        *(("user", "b"), ("assistant", "3")),
    ]
    session.reset()
    session.answer("c")
    assert [m["content"] for m in session.messages] == ["c", "1"]


def test_a_message_that_does_not_fit_leaves_the_history(session: ChatSession) -> None:
    for text in ("a", "b", "c"):
        session.answer(text)
    kept = list(session.messages)
    with pytest.raises(UserError, match=r"has 7 tokens with this message, .* is 6\. Start a new"):
        session.answer("d")
    assert session.messages == kept
