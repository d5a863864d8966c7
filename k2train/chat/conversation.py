"""Conversations from the records of public data sets, checked message by message.

- Read are `messages` (role, content), ShareGPT's `conversations` (from, value), and one question
  with its response: inputs and targets (FLAN), instruction, input and output (Alpaca), prompt and
  completion or response.
- A system prompt comes first if at all. Questions and responses alternate, a question first.
- A question at the end without a response is cut off. What breaks a rule otherwise is left out,
  with the reason.

Alternatives considered:
- Joining two questions in a row: nobody wrote that question.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k2train.data.tokenizer import is_encodable
from k2train.errors import DataError

ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatbot"), "assistant"),
}
"""Name of a role in a data set -> the role."""
PAIRS = (
    ("inputs", "targets"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)
"""Keys of a question and its response."""
EXTRA = ("input", "system")
"""Keys beside such a pair: what an instruction is about, and a system prompt."""
LISTS = {"messages": ("role", "content"), "conversations": ("from", "value")}
"""Keys of a list of messages -> keys of role and text of each."""
KEYS = tuple(dict.fromkeys((*LISTS, *(key for pair in PAIRS for key in pair), *EXTRA)))


@dataclass(frozen=True)
class Message:
    """One message: `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages that keep the rules. `cut` is whether a question without a response was cut off."""

    messages: tuple[Message, ...]
    cut: bool = False

    def with_system(self, text: str) -> "Conversation":
        """Return it with a system prompt, unless it has one."""
        if not text or self.messages[0].role == "system":
            return self
        return Conversation((Message("system", text), *self.messages), self.cut)


def conversation_of(record: Any) -> Conversation:
    """Read the conversation of a record. Raises DataError with the reason if it has none."""
    if not isinstance(record, Mapping):
        raise DataError(f"not an object, but {type(record).__name__}")
    for key, names in LISTS.items():
        if record.get(key) is not None:
            return checked(_listed(key, record[key], names))
    for question, response in PAIRS:
        if record.get(question) is not None and response in record:
            return checked(_pair(record, question, response))
    raise DataError(
        "has neither messages nor conversations, nor a pair such as inputs and targets; it has "
        + (", ".join(sorted(map(str, record))[:8]) or "no key")
    )


def _listed(key: str, value: Any, names: tuple[str, str]) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{key} is no list, but {type(value).__name__}")
    found = []
    for number, item in enumerate(value, 1):
        if not isinstance(item, Mapping):
            raise DataError(f"message {number} is no object, but {type(item).__name__}")
        # Some sets have the one list with the other's names.
        role_key, text_key = next((p for p in (names, *LISTS.values()) if p[0] in item), names)
        role = item.get(role_key)
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(
                f"message {number} has the role {str(role)[:40]!a}, known are {', '.join(ROLES)}"
            )
        found.append(Message(ROLES[role], _text(item.get(text_key), f"message {number}")))
    return found


def _pair(record: Mapping[str, Any], question: str, response: str) -> list[Message]:
    asked = _text(record[question], question)
    if question == "instruction" and record.get("input"):
        asked = f"{asked}\n\n{_text(record['input'], 'input')}"
    messages = [Message("user", asked), Message("assistant", _text(record[response], response))]
    if record.get("system") is not None:
        messages.insert(0, Message("system", _text(record["system"], "system")))
    return messages


def _text(value: Any, what: str) -> str:
    """Return the text of a message: a string, or a list of parts that are all text."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in value]
        if not parts or not all(isinstance(part, str) for part in parts):
            raise DataError(f"{what} has parts that are no text")
        value = "".join(map(str, parts))
    if not isinstance(value, str):
        raise DataError(
            f"{what} has no text" if value is None else f"{what} is no text, but {_kind(value)}"
        )
    if not is_encodable(value):
        raise DataError(f"{what} has a lone surrogate, which is no character")
    return value


def _kind(value: Any) -> str:
    return type(value).__name__


def checked(messages: Iterable[Message]) -> Conversation:
    """Check the order of messages and cut a question at the end. Raises DataError."""
    kept = list(messages)
    count = len(kept)
    if kept and kept[0].role == "system" and not kept[0].content.strip():
        # Some data sets have the key in every record.
        kept.pop(0)
    turns = kept[1:] if kept and kept[0].role == "system" else kept
    first = count - len(turns) + 1
    for number, (message, before) in enumerate(zip(turns, [None, *turns], strict=False), first):
        if message.role == "system":
            raise DataError(f"message {number} is a system prompt, which must be the first message")
        if before is None and message.role == "assistant":
            raise DataError(f"message {number}, the first after the system prompt, is a response")
        if before is not None and before.role == message.role:
            raise DataError(f"messages {number - 1} and {number} are both of the {message.role}")
        if not message.content.strip():
            raise DataError(f"message {number} ({message.role}) is empty")

    cut = bool(turns) and turns[-1].role == "user"
    if cut:
        kept.pop()
    if not any(message.role == "assistant" for message in kept):
        raise DataError("has no response")
    return Conversation(tuple(kept), cut)
