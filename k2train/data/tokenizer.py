"""Tokenizer: a sentencepiece BPE with byte fallback, and special tokens that exist only as ids.

- Raw text is data and never becomes a control token. `</s>` or `<fim_middle>` inside a document
  encodes as ordinary characters and decodes back exactly.
- Special tokens are inserted by id, by the code that builds a sample.
- Any model is read as one that leaves text alone. Its own settings for a leading space, merged
  spaces and replaced characters (LLaMA has the first) are overridden in memory.
- LLaMA's leading space, the dummy prefix, can be kept: the first word of a document is then spelt
  as Hugging Face's LlamaTokenizer spells it. The hash tells the two apart.
- Decoding is a table of bytes: sentencepiece's own drops a leading space and writes " \u2047 " for
  an unknown id.
- Long texts are encoded in segments, cut where no piece of the model can reach across, so the ids
  are those of the whole. Sentencepiece slows down with the length of a text, to a third for a book,
  and its memory grows with it.

Alternatives considered:
- Registering specials as user-defined symbols: every document that quotes one would be parsed as
  one.
- Detecting published models and cutting off their leading space: pieces are already merged with it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import sentencepiece

from k2train.data.sentencepiece_model import TruncatedError, has_dummy_prefix, model_content
from k2train.errors import DataError
from k2train.files import AtomicFile
from k2train.retry import retried

Ids = npt.NDArray[np.int32]
DummyPrefix = Literal["drop", "keep"]

MODEL_NAME = "tokenizer.model"

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
"""Of a sentencepiece model. Other tokenizers have ids of their own."""

K2_SPECIAL_TOKENS = (
    "<fim_prefix>",
    "<fim_middle>",
    "<fim_suffix>",
    "<fim_pad>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<empty_output>",
    "<commit_before>",
    "<commit_msg>",
    "<commit_after>",
    "<reponame>",
)

# Sentencepiece writes a space as U+2581, so a document's own U+2581 would come back as a space. It
# is taken out before encoding, and inserted as its three UTF-8 bytes, which decode to themselves.
_SPACE_MARK = "\u2581"

# A serialized `ModelProto` with only `normalizer_spec {precompiled_charsmap: "" add_dummy_prefix:
# false remove_extra_whitespaces: false}`. Protobuf reads two concatenated messages as one in which
# the later value wins.
_LEAVE_TEXT_ALONE = bytes([0x1A, 6, 0x12, 0, 0x18, 0, 0x20, 0])

# What a model that changes text would change: spaces, line ends, composed and rare characters.
PROBE = "  a  b\t\r\n\n \0<s></s> \u00a0A\u030a\ufb01\uff21\ufeff\u200b\U0001d518\U0010fffd "

_CONTROL, _USER_DEFINED, _BPE = 3, 4, 2
LIKE_A_CONTROL = re.compile(r"[<\[{|].*[>\]}|]", re.DOTALL)

SEGMENT_CHARACTERS = 1024


def is_encodable(text: str) -> bool:
    """True for text without lone surrogates, which JSON can hold and UTF-8 cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Tokenizer:
    """Sentencepiece model of `base_size` pieces, with `specials` as ids `base_size ...` in order.

    With `dummy_prefix` "keep", a model that puts a space in front of every text does so here, too;
    "drop" leaves it out. Other models are the same with both.

    Can be pickled: another process reads it again from the model's bytes.
    Raises DataError for bytes that are not a sentencepiece model, and for a model that would lose
    text or turn text into a control token.
    """

    def __init__(
        self,
        model: bytes,
        specials: Sequence[str] = K2_SPECIAL_TOKENS,
        dummy_prefix: DummyPrefix = "drop",
    ) -> None:
        self.model, self.dummy_prefix = model, dummy_prefix
        self.specials = tuple(specials)
        try:
            # First: a truncated model would swallow the settings appended to it.
            kind, pieces = model_content(model)
            self.model_has_prefix = has_dummy_prefix(model)
            self._pieces = sentencepiece.SentencePieceProcessor(
                model_proto=model + _LEAVE_TEXT_ALONE
            )
        except (RuntimeError, TruncatedError):
            raise DataError(
                "tokenizer.model: not a sentencepiece model, or only a part of one"
            ) from None

        self.adds_prefix = dummy_prefix == "keep" and self.model_has_prefix
        self.base_size: int = self._pieces.get_piece_size()
        self._check_pieces(pieces)

        texts = [piece.replace(_SPACE_MARK, " ") for piece, _ in pieces]
        # BPE merges are local: without a piece that contains both sides, no merge crosses the cut.
        self._cut_after_line = kind == _BPE and not any("\n" in text[:-1] for text in texts)
        self._cut_before_space = kind == _BPE and not any(map(re.compile("[^ ] ").search, texts))

        # Without byte pieces, characters outside the vocabulary become <unk> and are lost.
        byte_ids = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if UNK_ID in byte_ids:
            raise DataError(
                "tokenizer.model: has no byte fallback, so some text would be lost; train it with "
                "it"
            )

        self._space_mark_ids = np.array(
            [byte_ids[byte] for byte in _SPACE_MARK.encode()], dtype=np.int32
        )

        # Proof that the model leaves text unchanged.
        if self.decode(self.encode_arrays([PROBE], begins=[False])[0]) != PROBE:
            raise DataError(
                "tokenizer.model: does not decode its own encoding to the same text; train it with "
                "byte fallback"
            )

    def _check_pieces(self, pieces: Sequence[tuple[str, int]]) -> None:
        ids = (self._pieces.unk_id(), self._pieces.bos_id(), self._pieces.eos_id())
        if ids != (UNK_ID, BOS_ID, EOS_ID):
            raise DataError(
                f"tokenizer.model: ids of <unk>, <s>, </s> are {ids}, must be "
                f"{(UNK_ID, BOS_ID, EOS_ID)}"
            )

        for piece, kind in pieces:
            if kind not in (_CONTROL, _USER_DEFINED):
                continue

            text = piece.replace(_SPACE_MARK, " ").strip()
            if text in self.specials:
                raise DataError(
                    f"tokenizer.model: {piece!r} is one of its user-defined or control pieces and "
                    "a special token too, so it would have two ids; leave it out of "
                    "tokenizer.specials, or take a model without it"
                )
            # Runs of spaces may be user-defined pieces: they decode as the text they came from.
            if kind == _USER_DEFINED and LIKE_A_CONTROL.fullmatch(text):
                raise DataError(
                    f"tokenizer.model: {piece!r} is a user-defined piece, so a document that "
                    "quotes it would turn into a control token; take a model without it, and name "
                    "it in tokenizer.specials"
                )

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes, tuple[str, ...], DummyPrefix]]:
        return Tokenizer, (self.model, self.specials, self.dummy_prefix)

    @property
    def vocab_size(self) -> int:
        """Number of ids, the special tokens included."""
        return self.base_size + len(self.specials)

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text; None where the model has none."""
        return BOS_ID

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a document."""
        return EOS_ID

    @property
    def pad_id(self) -> int | None:
        """Id of the token that pads; None where the model has none."""
        return None

    def is_control(self, token: int) -> bool:
        """Whether an id is a control token, which no text becomes."""
        return token <= EOS_ID or token >= self.base_size

    @property
    def files(self) -> dict[str, bytes]:
        """Content by name of all that a folder needs for reading this tokenizer again."""
        return {MODEL_NAME: self.model}

    @property
    def sha256(self) -> str:
        """Hash of the meaning of ids: model, special tokens, and whether a prefix is kept."""
        content = self.model + b"\0" + json.dumps(self.specials).encode()
        return hashlib.sha256(
            content + (b"\0dummy prefix" if self.adds_prefix else b"")
        ).hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest records beside the file's name: `specials`, and `dummy_prefix` if any."""
        prefix = {"dummy_prefix": self.dummy_prefix} if self.model_has_prefix else {}
        return {"specials": list(self.specials), **prefix}

    def special_id(self, name: str) -> int:
        """Id of a special token. Raises KeyError for any other name."""
        if name not in self.specials:
            raise KeyError(name)
        return self.base_size + self.specials.index(name)

    def encode(self, text: str) -> list[int]:
        """Encode a document, without `<s>` and `</s>`; never gives a control or special id.

        Raises DataError for text that is not Unicode (lone surrogates).
        """
        return self.encode_arrays([text])[0].tolist()

    def encode_arrays(
        self, texts: Sequence[str], num_threads: int = 1, begins: Sequence[bool] | None = None
    ) -> list[Ids]:
        """Encode many texts as read-only int32 arrays; the fast way.

        `begins` says which of them begin a document, and get a kept dummy prefix; default: all.
        Raises DataError for text that is not Unicode.
        """
        if self.adds_prefix:
            # As sentencepiece does it: nothing in front of nothing.
            starts = repeat(True) if begins is None else begins
            texts = [
                f" {text}" if start and text else text
                for text, start in zip(texts, starts, strict=False)
            ]
        try:
            segments = [self._segments(text) for text in texts]
        except UnicodeEncodeError as error:
            raise DataError(
                f"text is not valid Unicode ({error.reason} at character {error.start})"
            ) from None

        # All segments of all texts in one call: sentencepiece is fast for many at once.
        parts = [segment for own in segments for segment in own if segment is not None]
        encoded = iter(
            self._pieces.encode_as_numpy(parts, num_threads=num_threads) if parts else []
        )

        ids: list[Ids] = []
        for own in segments:
            arrays = [self._space_mark_ids if segment is None else next(encoded) for segment in own]
            ids.append(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))

        return ids

    def _segments(self, text: str) -> list[bytes | None]:
        """Split text into UTF-8 segments that are encoded separately; None is the space mark."""
        if len(text) <= SEGMENT_CHARACTERS and _SPACE_MARK not in text:
            return [text.encode()]

        segments: list[bytes | None] = []
        for number, part in enumerate(text.split(_SPACE_MARK)):
            segments += [None] if number else []
            start = 0
            while start < len(part) or not segments:
                end = self._segment_end(part, start)
                segments.append(part[start:end].encode())
                start = end
        return segments

    def _segment_end(self, text: str, start: int) -> int:
        """End of the segment from `start`: a line or word end near SEGMENT_CHARACTERS, or later."""
        bound = start + SEGMENT_CHARACTERS
        if bound >= len(text):
            return len(text)

        if self._cut_after_line and (found := text.rfind("\n", start, bound)) >= 0:
            return found + 1

        if self._cut_before_space:
            found = text.rfind(" ", start, bound)
            # Cut before the whole run of spaces: pieces may contain several.
            while found > start and text[found - 1] == " ":
                found -= 1
            if found > start:
                return found

        return (text.find("\n", bound) + 1 or len(text)) if self._cut_after_line else len(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text; `</s>`, `<s>` and special tokens appear by name.

        Exact inverse of `encode`, but for the space of a kept dummy prefix. Any slice of ids
        decodes: a character cut at its start or end becomes U+FFFD. Raises DataError for an id that
        the tokenizer does not have.
        """
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decode each id to UTF-8 by itself.

        So the bytes of slices concatenate to those of the whole.
        Raises DataError for an id that the tokenizer does not have.
        """
        surfaces, found = self._surfaces, []
        for token in ids.tolist() if isinstance(ids, np.ndarray) else ids:
            if not 0 <= token < len(surfaces):
                raise DataError(
                    f"id {token} is not below the tokenizer's vocab_size ({self.vocab_size})"
                )
            found.append(surfaces[token])
        return b"".join(found)

    @cached_property
    def _surfaces(self) -> list[bytes]:
        # UTF-8 of every id.
        names = [self._pieces.id_to_piece(token) for token in range(self.base_size)]
        surfaces = [name.replace(_SPACE_MARK, " ").encode() for name in names]
        # Byte pieces decode to their byte, not to their name.
        for byte in range(256):
            surfaces[self._pieces.piece_to_id(f"<0x{byte:02X}>")] = bytes([byte])
        return surfaces + [name.encode() for name in self.specials]

    def save(self, path: Path) -> None:
        """Write the sentencepiece model atomically, with its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with AtomicFile(path) as stream:
            stream.write(self.model)

    @classmethod
    def load(
        cls,
        path: Path,
        specials: Sequence[str] = K2_SPECIAL_TOKENS,
        dummy_prefix: DummyPrefix = "drop",
    ) -> "Tokenizer":
        """Read a sentencepiece model.

        Raises DataError naming the file when it is missing, not a model, or not usable.
        """
        try:
            model = retried(path.read_bytes, path)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read as tokenizer.model ({error.strerror})"
            ) from None
        try:
            return cls(model, specials, dummy_prefix)
        except DataError as error:
            raise DataError(f"{path}{str(error).removeprefix('tokenizer.model')}") from None
