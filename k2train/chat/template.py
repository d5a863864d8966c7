"""Chat template: messages to text, with the spans of the responses, by Jinja as in transformers.

- Where a template has `{% generation %}` blocks, they are the spans. Otherwise the responses are
  looked for: the same messages are rendered with a character in place of each response, and with
  two words, so that nothing around it depends on it. A span then ends behind the control token that
  ends the response.
- A template that does not render, or whose responses cannot be found, is an error. Nothing is ever
  learned because a mask was missing.
- A template whose text would be another one without the marks of its blocks is refused, too.
- Text that a template treats otherwise because of a character of a control token is refused: there
  text and marker could not be told apart.

Alternatives considered:
- Rendering growing parts of a conversation and comparing them: many templates render the last
  message in another way.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path

from k2train.chat.control_text import ControlTokens, Disguise, Piece
from k2train.chat.conversation import Message
from k2train.chat.jinja import HAS_BLOCKS, MARKS, compile_template, rendered
from k2train.chat.k2_template import CHAT_MARKERS, K2_TEMPLATE
from k2train.data.tokenizer import Tokenizer
from k2train.errors import DataError
from k2train.safe_json import read_plain_file

K2 = "k2"
MAX_TEMPLATE_BYTES = 2**20
Span = tuple[int, int]

PROBE_MESSAGES = tuple(
    Message(role, text)
    for role, text in (
        ("user", "Is one two?"),
        ("assistant", "No, it is not."),
        ("user", "And is two one?"),
        ("assistant", "Neither is that."),
    )
)


@dataclass(frozen=True)
class Rendering:
    """A conversation as text in pieces, and the spans (first character, end) of its responses."""

    pieces: tuple[Piece, ...]
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class TemplateSource:
    """Text of a template: `kind` is k2 or jinja, `name` stands in messages."""

    kind: str
    name: str
    text: str

    @classmethod
    def read(cls, given: str) -> "TemplateSource":
        """Read `k2`, or a file. Raises DataError."""
        if given == K2:
            return cls(K2, K2, K2_TEMPLATE)
        try:
            text = read_plain_file(Path(given), MAX_TEMPLATE_BYTES).decode("utf-8")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise DataError(
                f"--template: {given} cannot be read ({why}); give k2, or a file of Jinja"
            ) from None
        return cls("jinja", given, text)

    @property
    def specials(self) -> tuple[str, ...]:
        """Special tokens that it brings with it."""
        return CHAT_MARKERS if self.kind == K2 else ()


class ChatTemplate:
    """A template for a tokenizer. Raises DataError for one that does not compile."""

    def __init__(self, source: TemplateSource, tokenizer: Tokenizer) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.control = ControlTokens(tokenizer)
        self._template = compile_template(source.text, source.name)
        self.has_blocks = HAS_BLOCKS.search(source.text) is not None
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        self._names = {
            f"{role}_token": tokenizer.decode([token])
            for role, token in ids.items()
            if token is not None
        }

    def render(
        self, messages: Sequence[Message], prompt: bool = False, find_spans: bool = True
    ) -> Rendering:
        """Render messages; with `prompt` up to where the next response begins.

        `find_spans` False leaves the spans out. Raises DataError with the reason when it does not
        render, when it reads control tokens in a message, when the marks of its blocks change what
        it renders, or when a response cannot be found.
        """
        texts = [message.content for message in messages]
        responses = [n for n, message in enumerate(messages) if message.role == "assistant"]
        edges = {edge for edge in self.control.edges if any(edge in text for text in texts)}
        disguise = Disguise.of([*texts, self.source.text], edges, 2 + len(responses))
        start, end, *stand_ins = disguise.spare

        disguised = [*map(disguise.hide, texts)]
        hidden = self._text(messages, disguised, start + end, prompt)
        if edges and disguise.show(hidden) != self._text(messages, texts, start + end, prompt):
            raise DataError(
                f"the template reads {_shown(edges)} in a message, so text and control tokens "
                "cannot be told apart"
            )

        plain, spans = _unmarked(hidden, start, end)
        if self.has_blocks and plain != self._text(messages, disguised, "", prompt):
            raise DataError(
                "the template measures or changes what its {% generation %} blocks have rendered, "
                "so marks around it give another text; put the blocks around what is written last"
            )
        if not find_spans:
            spans = []
        elif not self.has_blocks:
            frames = []
            # A second time as two words: what is around a response must not depend on it.
            for form in ("{0}", "{0} {0}"):
                replaced = [*disguised]
                for number, stand_in in zip(responses, stand_ins, strict=True):
                    replaced[number] = form.format(stand_in)
                frames.append(self._text(messages, replaced, start + end, prompt))
            spans = self._found(plain, frames, stand_ins, [disguised[n] for n in responses])
        pieces = tuple(
            Piece(piece.start, disguise.show(piece.text), piece.token)
            for piece in self.control.pieces(plain)
        )
        return Rendering(pieces, tuple(spans))

    def _text(
        self, messages: Sequence[Message], texts: Sequence[str], marks: str, prompt: bool
    ) -> str:
        written = [
            {"role": message.role, "content": text}
            for message, text in zip(messages, texts, strict=True)
        ]
        return rendered(self._template, written, {**self._names, MARKS: marks}, prompt)

    def _found(
        self, text: str, frames: Sequence[str], stand_ins: Sequence[str], said: Sequence[str]
    ) -> list[Span]:
        """Spans of the responses `said` in `text`.

        `frames` are it with one and with two stand-ins for each.
        """
        for number, stand_in in enumerate(stand_ins, 1):
            if (count := frames[0].count(stand_in)) != 1:
                raise DataError(
                    f"the template writes response {number} {count} times, so what is learned "
                    "cannot be found; put {% generation %} blocks into it"
                )
        one = "|".join(f"{re.escape(s)}(?: {re.escape(s)})?" for s in stand_ins) or "$^"
        around, longer = (re.split(one, frame) for frame in frames)
        if around != longer:
            pairs = zip(around, longer, strict=False)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            raise _not_found(min(same + 1, len(stand_ins)))
        return list(self._between(text, around, said))

    def _between(self, text: str, around: Sequence[str], said: Sequence[str]) -> Iterator[Span]:
        """Yield what is between the parts of a frame, each with the control token that ends it."""
        position = 0
        for number, (before, after) in enumerate(pairwise(around), 1):
            last = number == len(around) - 1
            first = position + len(before)
            end = len(text) - len(after) if last else text.find(after, first)
            found = text[position:first] == before and text[end : end + len(after)] == after
            # Spaces around it may be gone, and nothing else may differ.
            same = text[first:end].strip() == said[number - 1].strip()
            if not found or end < first or not same:
                raise _not_found(number)
            ending = next((p for p in self.control.pieces(after) if p.text.strip()), None)
            if ending is None or ending.token is None:
                raise DataError(
                    f"no control token follows response {number}, so a model could not learn to "
                    "stop; end responses with eos_token, or name their end with --special"
                )
            yield first, end + ending.start + len(ending.text.rstrip())
            position = end


def _not_found(response: int) -> DataError:
    return DataError(
        f"response {response} cannot be found in what the template renders, so neither can what "
        "is learned; put {% generation %} blocks into it"
    )


def _unmarked(text: str, start: str, end: str) -> tuple[str, list[Span]]:
    """Take the marks of generation blocks out of a text; returns it and the spans between them."""
    plain, spans, opened, length = [], [], 0, 0
    for part in re.split(f"([{start}{end}])", text):
        if part == start:
            opened = length
        elif part == end:
            spans += [(opened, length)] if length > opened else []
        else:
            plain.append(part)
            length += len(part)
    return "".join(plain), spans


def _shown(characters: set[str]) -> str:
    return " or ".join(repr(character) for character in sorted(characters))
