"""Control tokens in rendered text: found where the template wrote them, and nowhere else.

- A rendered text is split at the names of control tokens, the longest name first, as transformers
  splits it.
- A message cannot forge one: before rendering, each character that begins or ends such a name is
  replaced in it, one for one, by a character that occurs nowhere else. After the split it is put
  back, and the text is encoded with specials off.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from k2train.data.json_tokenizer import JsonTokenizer
from k2train.data.tokenizer import Tokenizer

FIRST_PRIVATE, LAST_PRIVATE = 0xF0000, 0xFFFFD
"""Characters that Unicode leaves to private use: ordinary text has none of them."""


class Piece(NamedTuple):
    """A part of a rendered text from character `start`; `token` is the id of a control token."""

    start: int
    text: str
    token: int | None


class ControlTokens:
    """Names of a tokenizer's control tokens, ready to be found in text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        control = (token for token in range(tokenizer.vocab_size) if tokenizer.is_control(token))
        self.ids = {name: token for token in control if (name := tokenizer.decode([token]))}
        strips = _strips(tokenizer)
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile(
            "|".join(
                (r"\s*" if "l" in strips.get(name, "") else "")
                + f"({re.escape(name)})"
                + (r"\s*" if "r" in strips.get(name, "") else "")
                for name in longest_first
            )
        )
        self.edges = frozenset(name[0] for name in self.ids) | {name[-1] for name in self.ids}
        """Characters that begin or end a name."""

    def forged(self, text: str) -> bool:
        """Whether a text holds the name of a control token."""
        return self._pattern.search(text) is not None

    def pieces(self, text: str) -> Iterator[Piece]:
        """Yield the parts of a text: control tokens, and the text between them."""
        start = 0
        for found in self._pattern.finditer(text):
            if found.start() > start:
                yield Piece(start, text[start : found.start()], None)
            name = next(group for group in found.groups() if group is not None)
            yield Piece(found.start(), found[0], self.ids[name])
            start = found.end()
        if start < len(text):
            yield Piece(start, text[start:], None)


def _strips(tokenizer: Tokenizer) -> dict[str, str]:
    """Sides on which a control token of a tokenizer.json swallows spaces: l, r, or both."""
    if not isinstance(tokenizer, JsonTokenizer):
        return {}
    added = json.loads(tokenizer.model).get("added_tokens") or []
    return {
        one["content"]: "l" * bool(one.get("lstrip")) + "r" * bool(one.get("rstrip"))
        for one in added
    }


@dataclass(frozen=True)
class Disguise:
    """Replaces characters, one for one, by characters that occur nowhere else, and back."""

    there: dict[int, str]
    back: dict[int, str]
    spare: tuple[str, ...]
    """More characters that occur nowhere."""

    @classmethod
    def of(cls, texts: Iterable[str], characters: Iterable[str], spare: int) -> "Disguise":
        """Choose the characters for some texts, and `spare` more. They are always the same."""
        used = {
            character
            for text in texts
            if not text.isascii()
            for character in text
            if FIRST_PRIVATE <= ord(character) <= LAST_PRIVATE
        }
        free = (
            chr(number) for number in range(FIRST_PRIVATE, LAST_PRIVATE) if chr(number) not in used
        )
        pairs = [(character, next(free)) for character in sorted(characters)]
        return cls(
            {ord(real): hidden for real, hidden in pairs},
            {ord(hidden): real for real, hidden in pairs},
            tuple(next(free) for _ in range(spare)),
        )

    def hide(self, text: str) -> str:
        """Replace the characters in a text."""
        return text.translate(self.there)

    def show(self, text: str) -> str:
        """Put them back."""
        return text.translate(self.back)
