"""Conversations about Python's standard library, made of its docstrings: data for the demo.

    What does functools.partial do?         first sentences of its docstring
    Where is it?                            its module and kind

- A question follows from names alone, so the same version of Python gives the same conversations.
- Every third conversation has a second turn.
- Only short summaries are taken: a small model can learn the form, not the contents.
"""

import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import PurePosixPath
from typing import Any

from k2train.data.prepare.sources.stdlib import decode, docstrings

MIN_CHARACTERS, MAX_CHARACTERS = 20, 200
SECOND_TURN_SHARE = 3
"""One conversation in so many has a second turn."""
QUESTIONS = ("What does {} do?", "What is {} for?", "Explain {}.", "Describe {} in short.")
WHERE = ("Where is it?", "Where do I find it?", "Which module has it?")
SYSTEM = "You answer questions about Python."

_SENTENCE_END = re.compile(r"(?<=[.!?]) +(?=[A-Z])")


def docstring_conversations(name: str, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, record with `messages`) for the docstrings of a file; none if it is not Python.

    `name` is the path below the library's folder.
    """
    try:
        found = list(docstrings(name, decode(content)))
    except (SyntaxError, UnicodeDecodeError, LookupError, ValueError, RecursionError, MemoryError):
        return
    module = ".".join(PurePosixPath(name).with_suffix("").parts).removesuffix(".__init__")
    for line, title, docstring in found:
        path = title.partition(":")[2].partition("#")[0]
        answer = summary(docstring)
        # Private names and one-word summaries teach nothing.
        if not answer or path.startswith("_") or "._" in path or "._" in f".{module}":
            continue
        yield line, {"messages": _messages(module, path, answer)}


def summary(docstring: str) -> str:
    """Return the first sentences of a docstring's first paragraph; "" if they do not fit."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    kept = ""
    for sentence in _SENTENCE_END.split(paragraph):
        longer = f"{kept} {sentence}".strip()
        if len(longer) > MAX_CHARACTERS:
            break
        kept = longer
    return kept if len(kept) >= MIN_CHARACTERS and kept[-1] in ".!?" else ""


def _messages(module: str, path: str, answer: str) -> list[dict[str, str]]:
    name = f"{module}.{path}" if path else module
    draw = int.from_bytes(sha256(name.encode()).digest()[:4], "big")
    question = QUESTIONS[draw % len(QUESTIONS)].format(name)
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    if path and (draw >> 8) % SECOND_TURN_SHARE == 0:
        where = WHERE[(draw >> 16) % len(WHERE)]
        messages += [
            {"role": "user", "content": where},
            {"role": "assistant", "content": f"{path} is in the module {module}."},
        ]
    return messages
