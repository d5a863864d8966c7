"""Conversations as token ids and the tokens that are learned.

- Control tokens are those that the template wrote. All other text is encoded with specials off, as
  one piece between two control tokens, so the ids are those of transformers' apply_chat_template.
- A token is learned when a character of it is in a response. With `learn: all` each one is.
- What a template does with responses is tried on a conversation of its own before the first one of
  the data.
"""

import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from k2train.chat.conversation import Message
from k2train.chat.template import PROBE_MESSAGES, ChatTemplate, Rendering, Span
from k2train.data.tokenizer import Ids, Tokenizer
from k2train.errors import DataError

Learn = Literal["responses", "all"]
Learned = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Encoded:
    """Ids [n] of a conversation, and which are learned, bool [n]."""

    ids: Ids
    learned: Learned


class ChatEncoder:
    """Encodes conversations by a template.

    Raises DataError, naming the template, when its responses cannot be found.
    """

    def __init__(self, template: ChatTemplate, learn: Learn = "responses") -> None:
        self.template, self.learn = template, learn
        self.notes: list[str] = []
        """What a user should know of the template."""
        self.written_ids: frozenset[int] = frozenset()
        """Control tokens that the template writes between messages."""
        try:
            self.end_ids = self._try()
        except DataError as error:
            raise DataError(f"{template.source.name}: {error}") from None

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Encode a conversation. Raises DataError with the reason when it cannot be."""
        everything = self.learn == "all"
        rendering = self.template.render(messages, find_spans=not everything)
        ids, learned = _encode(self.template.tokenizer, rendering)
        if everything:
            learned[:] = True
        elif not learned.any():
            raise DataError("has nothing to learn in what the template renders")
        return Encoded(ids, learned)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to where the next response begins. Raises DataError."""
        rendering = self.template.render(messages, prompt=True, find_spans=False)
        return _encode(self.template.tokenizer, rendering)[0].tolist()

    def _try(self) -> frozenset[int]:
        """Encode a conversation of two turns; returns the control tokens that end a response."""
        tokenizer = self.template.tokenizer
        try:
            rendering = self.template.render(PROBE_MESSAGES)
        except DataError:
            if self.learn == "responses":
                raise
            self.prompt(PROBE_MESSAGES[:1])
            return frozenset({tokenizer.eos_id})

        ids, learned = _encode(tokenizer, rendering)
        self.written_ids = frozenset(one.token for one in rendering.pieces if one.token is not None)
        ends = np.flatnonzero(learned & ~np.append(learned[1:], False)).tolist()
        if len(ends) < 2 and self.learn == "responses":
            raise DataError(
                f"what it renders has {len(ends)} of 2 responses to learn; put "
                "{% generation %} blocks around each response and the token that ends it"
            )
        found = {int(ids[end]) for end in ends if tokenizer.is_control(int(ids[end]))}
        if len(ends) and not found:
            self.notes.append(
                "the template's {% generation %} blocks leave out the token that ends a response, "
                "so a model does not learn to stop"
            )
        asked = self.prompt(PROBE_MESSAGES[:1])
        if learned.any() and ids[: int(learned.argmax())].tolist() != asked:
            self.notes.append(
                "what the template renders with add_generation_prompt is not what stands before a "
                "response in training"
            )
        return frozenset({*found, tokenizer.eos_id})


def _encode(tokenizer: Tokenizer, rendering: Rendering) -> tuple[Ids, Learned]:
    texts = [piece.text for piece in rendering.pieces if piece.token is None]
    encoded = iter(tokenizer.encode_arrays(texts) if texts else [])

    ids: list[Ids] = [np.zeros(0, dtype=np.int32)]
    learned: list[Learned] = [np.zeros(0, dtype=bool)]
    # Spans and pieces are both in order: looking through all of them is quadratic in the turns.
    begins, ends = ([span[side] for span in rendering.spans] for side in (0, 1))
    for piece in rendering.pieces:
        stop = piece.start + len(piece.text)
        spans = rendering.spans[bisect_right(ends, piece.start) : bisect_left(begins, stop)]
        if piece.token is not None:
            ids.append(np.array([piece.token], dtype=np.int32))
            learned.append(np.array([bool(spans)]))
            continue

        own = next(encoded)
        ids.append(own)
        if not spans or (spans[0][0] <= piece.start and spans[0][1] >= stop):
            learned.append(np.full(len(own), bool(spans)))
        else:
            learned.append(_inside(tokenizer, own, piece.text, piece.start, spans))
    return np.concatenate(ids), np.concatenate(learned)


def _inside(
    tokenizer: Tokenizer, ids: Ids, text: str, start: int, spans: Sequence[Span]
) -> Learned:
    """Which tokens [n] of a text have a byte in one of the spans."""
    ends = np.cumsum([len(tokenizer.decode_bytes([token])) for token in ids.tolist()])
    starts = np.concatenate([[0], ends[:-1]])
    # A space put in front shifts what comes after; so do characters that the tokenizer composes.
    prefix = int(tokenizer.adds_prefix)
    composed = int(ends[-1]) != len(text.encode()) + prefix
    found = np.zeros(len(ids), dtype=bool)
    for first, end in spans:
        before = (text[: max(0, position - start)] for position in (first, end))
        low, high = (
            len((unicodedata.normalize("NFC", part) if composed else part).encode()) + prefix
            for part in before
        )
        found |= (starts < high) & (ends > low)
    return found
