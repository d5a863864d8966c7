"""Conversation with a model: its history, kept within the context, and the template of its data.

- The prompt of a turn is what training had before a response: all messages so far, by the template.
- When the context is full, the oldest questions are dropped with their responses, and it is said.
- A response ends at any control token that the template writes.

Alternatives considered:
- Keeping keys and values from turn to turn: dropping old turns moves the positions of all others.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from k2train.chat.conversation import Message
from k2train.chat.encode import ChatEncoder
from k2train.chat.k2_template import CHAT_MARKERS
from k2train.chat.template import ChatTemplate, TemplateSource
from k2train.data.inspect.trained_tokenizer import Trained
from k2train.data.manifest import read_manifest
from k2train.data.tokenizer import Tokenizer, is_encodable
from k2train.errors import DataError
from k2train.inference.source import Source
from k2train.inference.text_stream import TextStream
from k2train.safe_json import read_plain_file


def encoder_of(source: Source, given: str | None = None) -> ChatEncoder:
    """Return the encoder of a checkpoint: by a given template, k2 or a file, or by its data's.

    Raises DataError when its data was no chat data, or its tokenizer lacks the markers.
    """
    template = _recorded(source) if given is None else TemplateSource.read(given)
    missing = [name for name in template.specials if not _has(source.tokenizer, name)]
    if missing:
        raise DataError(
            f"{source.path}: its tokenizer lacks {missing[0]}, so it was not trained with this "
            "template; give the template of its data as --template FILE"
        )
    return ChatEncoder(ChatTemplate(template, source.tokenizer), learn="all")


def _has(tokenizer: Tokenizer, name: str) -> bool:
    try:
        return tokenizer.special_id(name) >= 0
    except KeyError:
        return False


def _recorded(source: Source) -> TemplateSource:
    """The template in the data folder of a checkpoint. Raises DataError."""
    where = f"{source.path}: its data ({source.manifest.data.manifest})"
    data = source.manifest.data
    found = Trained(source.path, data.tokenizer_sha256, data.manifest).data_folder
    if found is None:
        raise DataError(f"{where} is not there, so neither is its template; give --template FILE")
    manifest = read_manifest(found)
    chat = manifest.facts.chat
    if chat is None:
        raise DataError(
            f"{where} was no chat data, so nothing says how a conversation is written; give "
            "--template k2 or --template FILE"
        )
    path = manifest.folder / Path(chat.file).name
    try:
        text = read_plain_file(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({why}); give --template FILE") from None
    if hashlib.sha256(text).hexdigest() != chat.sha256:
        raise DataError(f"{path}: is not the template that the data was made with; fetch it again")
    return TemplateSource(chat.template, str(path), text.decode())


@dataclass
class Talk:
    """Messages of a conversation, and how much of the context it may take.

    `context_tokens` includes the response, for which up to `response_tokens` are kept free.
    """

    encoder: ChatEncoder
    context_tokens: int
    response_tokens: int
    system: str = ""
    turns: list[Message] = field(default_factory=list)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a response: all that the template writes between messages."""
        tokenizer = self.encoder.template.tokenizer
        markers = (tokenizer.special_id(n) for n in CHAT_MARKERS if _has(tokenizer, n))
        return self.encoder.written_ids | self.encoder.end_ids | frozenset(markers)

    def ask(self, text: str) -> tuple[list[int], int]:
        """Add a question; returns the ids to continue, and the number of turns dropped for room.

        Raises DataError for text that is empty, not Unicode, or longer than the context; the
        question is then not added.
        """
        if not text.strip():
            raise DataError("the message is empty")
        if not is_encodable(text):
            raise DataError("the message is not valid Unicode")
        wanted = min(self.response_tokens, self.context_tokens // 2)
        # A question that could not be answered is not asked again.
        unanswered = bool(self.turns) and self.turns[-1].role == "user"
        before = self.turns[:-1] if unanswered else self.turns
        turns, dropped = [*before, Message("user", text)], 0
        while True:
            ids = self.encoder.prompt([*self._system, *turns])
            if len(ids) + wanted <= self.context_tokens or len(turns) == 1:
                break
            turns, dropped = turns[2:], dropped + 1
        if len(ids) >= self.context_tokens:
            raise DataError(
                f"the message and what belongs to it are {len(ids)} tokens, the context is "
                f"{self.context_tokens}: shorten it"
            )
        self.turns = turns
        return ids, dropped

    def spoken(self, prompt: Sequence[int]) -> TextStream:
        """Return the stream of the text that answers a prompt.

        Behind a control token an answer begins with the space that some tokenizers put in front of
        a text. It is no part of it: with the next question it would be put there once more.
        """
        tokenizer = self.encoder.template.tokenizer
        return TextStream(tokenizer, tokenizer.adds_prefix and tokenizer.is_control(prompt[-1]))

    def answered(self, text: str) -> None:
        """Add the response to the last question."""
        self.turns.append(Message("assistant", text))

    @property
    def _system(self) -> list[Message]:
        return [Message("system", self.system)] if self.system else []
