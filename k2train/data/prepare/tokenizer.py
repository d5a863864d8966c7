"""Text to ids and back: a sentencepiece BPE with byte fallback, followed by special tokens that exist only as ids.

Raw text is data and never becomes a control token: `</s>` or `<fim_middle>` inside a document encodes as ordinary
characters and decodes back exactly. Specials are inserted by id, by whoever builds a sample. Registering them with the
model as user-defined symbols was refused, since then every document that quotes one would be parsed as one.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from k2train.errors import DataError
from k2train.files import AtomicFile

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2

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

# Sentencepiece writes a space as U+2581, so a document's own U+2581 would come back as a space. It is taken out before
# encoding and put in as its three UTF-8 bytes, which decode as what they are.
_SPACE_MARK = "\u2581"


class Tokenizer:
    """A sentencepiece model of `base_size` pieces, and `specials` as ids `base_size ...` in their order."""

    def __init__(self, model: bytes, specials: Sequence[str] = K2_SPECIAL_TOKENS) -> None:
        self.model = model
        self.specials = tuple(specials)
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"tokenizer.model: not a sentencepiece model ({error})") from None
        self.base_size: int = self._pieces.get_piece_size()
        ids = (self._pieces.unk_id(), self._pieces.bos_id(), self._pieces.eos_id())
        if ids != (UNK_ID, BOS_ID, EOS_ID):
            raise DataError(f"tokenizer.model: ids of <unk>, <s>, </s> are {ids}, must be {(UNK_ID, BOS_ID, EOS_ID)}")
        byte_ids = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if UNK_ID in byte_ids:
            raise DataError("tokenizer.model: has no byte fallback, so some text would be lost; train it with it")
        self._space_mark_ids = [byte_ids[byte] for byte in _SPACE_MARK.encode()]

    @property
    def vocab_size(self) -> int:
        return self.base_size + len(self.specials)

    @property
    def sha256(self) -> str:
        """Names what ids mean: hash over the model's bytes and the list of special tokens."""
        return hashlib.sha256(self.model + b"\0" + json.dumps(self.specials).encode()).hexdigest()

    def special_id(self, name: str) -> int:
        """Id of a special token. Raises KeyError for a name that is none."""
        if name not in self.specials:
            raise KeyError(name)
        return self.base_size + self.specials.index(name)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, without `<s>` and `</s>`; never a control or special id.

        Raises DataError for text that is not Unicode (lone surrogates).
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """`encode` of many texts; the number of threads changes the time, never the ids."""
        try:
            parts = [part.encode() for text in texts for part in text.split(_SPACE_MARK)]
        except UnicodeEncodeError as error:
            raise DataError(f"text is not valid Unicode ({error.reason} at character {error.start})") from None
        encoded: list[list[int]] = self._pieces.encode(parts, num_threads=num_threads) if parts else []
        ids, done = [], 0
        for text in texts:
            document = list(encoded[done])
            marks = text.count(_SPACE_MARK)
            for part in encoded[done + 1 : done + 1 + marks]:
                document += self._space_mark_ids + part
            ids.append(document)
            done += 1 + marks
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; `</s>`, `<s>` and special tokens appear by name. Exact inverse of `encode` on its own output."""
        text, run = [], []
        for token in ids:
            if token >= self.vocab_size or token < 0:
                raise DataError(f"id {token} is not below the tokenizer's vocab_size ({self.vocab_size})")
            if token < self.base_size and not self._pieces.is_control(int(token)):
                run.append(int(token))
                continue
            text += [self._pieces.decode(run), self._name(token)]
            run = []
        return "".join([*text, self._pieces.decode(run)])

    def _name(self, token: int) -> str:
        if token >= self.base_size:
            return self.specials[token - self.base_size]
        return str(self._pieces.id_to_piece(int(token)))

    def save(self, path: Path) -> None:
        """Write the sentencepiece model, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with AtomicFile(path) as stream:
            stream.write(self.model)

    @classmethod
    def load(cls, path: Path, specials: Sequence[str] = K2_SPECIAL_TOKENS) -> "Tokenizer":
        """Read a sentencepiece model. Raises DataError when it is missing or not one."""
        try:
            model = path.read_bytes()
        except OSError as error:
            raise DataError(f"tokenizer.model: {path} cannot be read ({error.strerror})") from None
        return cls(model, specials)


def train_tokenizer(texts: Iterable[str], vocab_size: int, specials: Sequence[str] = K2_SPECIAL_TOKENS) -> Tokenizer:
    """Train a BPE of `vocab_size` pieces (specials not counted) on lines of `texts`; equal texts give equal bytes.

    Raises DataError when the texts are too few for the vocabulary.
    """
    model = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n") if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            max_sentence_length=2**16,
            num_threads=1,  # with two threads the trainer finds other merges
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise DataError(
            f"tokenizer.train.vocab_size ({vocab_size}) cannot be reached with this text: {reason}"
        ) from None
    return Tokenizer(model.getvalue(), specials)
