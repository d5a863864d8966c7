"""`chat/conversation.py`: catches a form that is misread, and a broken conversation kept."""

from typing import Any

import pytest

from k2train.chat.conversation import Message, conversation_of
from k2train.errors import DataError

Q, R = Message("user", "q"), Message("assistant", "r")


def _list(*pairs: tuple[str, Any], key: str = "messages") -> dict[str, Any]:
    names = ("role", "content") if key == "messages" else ("from", "value")
    return {key: [dict(zip(names, pair, strict=True)) for pair in pairs]}


@pytest.mark.parametrize(
    ("record", "expected"),
    (
        (_list(("user", "q"), ("assistant", "r")), [Q, R]),
        (_list(("human", "q"), ("gpt", "r"), key="conversations"), [Q, R]),
        (
            _list(("system", "s"), ("human", "q"), ("gpt", "r"), key="conversations"),
            [Message("system", "s"), Q, R],
        ),
        ({"conversations": _list(("user", "q"), ("assistant", "r"))["messages"]}, [Q, R]),
        ({"inputs": "q", "targets": "r", "task": 3}, [Q, R]),
        (
            {"instruction": "q", "input": "x", "output": "r"},
            [Message("user", "q\n\nx"), R],
        ),
        (
            {"instruction": "q", "input": "", "output": "r", "system": "s"},
            [Message("system", "s"), Q, R],
        ),
        ({"prompt": "q", "completion": "r", "messages": None}, [Q, R]),
        (_list(("system", " "), ("user", "q"), ("assistant", "r")), [Q, R]),
        (
            _list(("user", [{"type": "text", "text": "q"}]), ("assistant", "r")),
            [Q, R],
        ),
    ),
)
def test_each_form_is_read(record: dict[str, Any], expected: list[Message]) -> None:
    """Catches a role or text that is taken from the wrong key."""
    conversation = conversation_of(record)
    assert list(conversation.messages) == expected and not conversation.cut


def test_a_question_without_a_response_is_cut() -> None:
    """Catches a chat that ends in a question, whose end would be learned as an answer."""
    conversation = conversation_of(_list(("user", "q"), ("assistant", "r"), ("user", "z")))
    assert conversation.messages == (Q, R) and conversation.cut


def test_a_system_prompt_is_added_where_there_is_none() -> None:
    """Catches a system prompt that replaces that of the data."""
    plain = conversation_of({"inputs": "q", "targets": "r"})
    assert plain.with_system("s").messages[0] == Message("system", "s")
    assert plain.with_system("") == plain
    own = plain.with_system("s")
    assert own.with_system("t") == own


@pytest.mark.parametrize(
    ("record", "told"),
    (
        ([1], "not an object, but list"),
        ({"text": "a"}, "it has text"),
        ({"messages": "a"}, "messages is no list, but str"),
        ({"messages": ["a"]}, "message 1 is no object"),
        ({"messages": []}, "has no response"),
        (_list(("user", "q")), "has no response"),
        (_list(("system", "s")), "has no response"),
        (_list(("tool", "q"), ("assistant", "r")), "message 1 has the role 'tool'"),
        (_list((None, "q")), "has the role 'None'"),
        (_list(("user", "q"), ("user", "q"), ("assistant", "r")), "messages 1 and 2 are both"),
        (_list(("user", "q"), ("assistant", "r"), ("assistant", "r")), "messages 2 and 3 are both"),
        (_list(("assistant", "r")), "is a response"),
        (_list(("user", "q"), ("system", "s"), ("assistant", "r")), "message 2 is a system prompt"),
        (_list(("user", "q"), ("assistant", " \n")), r"message 2 \(assistant\) is empty"),
        (_list(("system", ""), ("user", ""), ("assistant", "r")), r"message 2 \(user\) is empty"),
        (_list(("user", 3), ("assistant", "r")), "message 1 is no text, but int"),
        (_list(("user", None), ("assistant", "r")), "message 1 has no text"),
        (_list(("user", [{"type": "image"}]), ("assistant", "r")), "parts that are no text"),
        (_list(("user", "\ud800"), ("assistant", "r")), "message 1 has a lone surrogate"),
        ({"inputs": "q", "targets": None}, "targets has no text"),
    ),
)
def test_what_is_left_out_has_a_reason(record: Any, told: str) -> None:
    """Catches a broken conversation that is learned from, and a traceback."""
    with pytest.raises(DataError, match=told):
        conversation_of(record)
