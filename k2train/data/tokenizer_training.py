"""Training of a tokenizer: a sentencepiece BPE with byte fallback, from the lines of texts.

- Every line takes part. The trainer drops long lines and lines with its reserved character without
  a word, so long ones are cut at spaces, and others at that character.

Alternatives considered:
- A higher limit of the trainer: a book in one line then slows it down without bound.
"""

import io
import re
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece

from k2train.data.tokenizer import (
    BOS_ID,
    EOS_ID,
    K2_SPECIAL_TOKENS,
    UNK_ID,
    Tokenizer,
    is_encodable,
)
from k2train.errors import DataError

CONTROL_PIECES = 3
LONGEST_LINE_BYTES = 2**16
"""Longer lines are cut: the trainer drops them."""
RESERVED = "\u2585"
"""The trainer drops lines with this character, which it writes for an unknown one."""


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, specials: Sequence[str] = K2_SPECIAL_TOKENS
) -> Tokenizer:
    """Train a BPE of `vocab_size` pieces, special tokens not counted, on the lines of `texts`.

    Equal texts give equal bytes. Raises DataError when the texts are too few for the vocabulary.
    """
    if vocab_size <= CONTROL_PIECES:
        # Below this the trainer's own message does not say how many the text needs.
        raise DataError(
            f"tokenizer.train.vocab_size ({vocab_size}) must be above {256 + CONTROL_PIECES}: "
            f"256 bytes, {CONTROL_PIECES} control pieces and the characters of the text"
        )

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_lines(texts),
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
            max_sentence_length=LONGEST_LINE_BYTES,
            num_threads=1,  # with two threads the trainer finds other merges
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"tokenizer.train.vocab_size ({vocab_size}) cannot be reached with this text: "
            f"{_size_error(str(error))}"
        ) from None
    return Tokenizer(model.getvalue(), specials)


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Yield the lines to train on: not blank, at most `LONGEST_LINE_BYTES`, without `RESERVED`.

    Only lines that are not Unicode are left out.
    """
    for text in texts:
        for line in text.split("\n"):
            if not is_encodable(line):
                continue
            for part in line.split(RESERVED):
                if part.strip():
                    yield from cut_line(part, LONGEST_LINE_BYTES)


def cut_line(line: str, limit: int) -> Iterator[str]:
    """Cut a line into parts of at most `limit` UTF-8 bytes, in front of spaces where it has any.

    No piece of the model crosses such a cut, since a piece begins with its space.
    """
    if 4 * len(line) <= limit:
        yield line
        return

    content = line.encode()
    start = 0
    while len(content) - start > limit:
        end = content.rfind(b" ", start + 1, start + limit + 1)
        # In front of the whole run of spaces: pieces may contain several.
        while end > start and content[end - 1] == ord(" "):
            end -= 1
        if end <= start:
            # No space: at the last character that fits.
            end = start + limit
            while content[end] & 0xC0 == 0x80:
                end -= 1
        yield content[start:end].decode()
        start = end
    yield content[start:].decode()


def _size_error(message: str) -> str:
    """Reword the trainer's message about a size: its own names source files and unknown options."""
    if most := re.search(r"value <= (\d+)", message):
        return f"the maximum is {most[1]}"
    if least := re.search(r"required_chars\. -?\d+ vs (\d+)", message):
        characters = int(least[1]) - 256 - CONTROL_PIECES
        return (
            f"the minimum is {least[1]}: 256 bytes, {CONTROL_PIECES} control pieces, "
            f"its {characters} most common characters"
        )
    if "sentences_.empty()" in message:
        return "it has no line to train on"
    return re.sub(r"[^.\]]*--\w+[^.]*\.?", "", " ".join(message.split()))
