"""Does an exported tokenizer give the ids of training: a thousand nasty strings, and back.

- Compared are transformers' tokenizer of the written folder, and sentencepiece on the written
  `tokenizer.model`.
- Sentencepiece alone takes U+2581 for a space, so strings with it are left out there.
"""

from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from k2train.data.tokenizer import Tokenizer
from k2train.errors import RunError
from k2train.hf.nasty_strings import nasty_strings
from k2train.hf.tokenizer_files import MODEL

STRINGS = 1000


@dataclass(frozen=True)
class TokenizerResult:
    """What was compared, and how many strings differed."""

    strings: int
    different: int
    decoded_different: int
    sentencepiece_strings: int
    sentencepiece_different: int
    first: str
    """The first string that differs; "" if none does."""

    @property
    def problem(self) -> str:
        """What is wrong, in words; "" if nothing is."""
        if not (self.different or self.decoded_different or self.sentencepiece_different):
            return ""
        return (
            f"the exported tokenizer encodes {self.different} and decodes "
            f"{self.decoded_different} of {self.strings} strings otherwise, its "
            f"tokenizer.model encodes {self.sentencepiece_different} otherwise; the first is "
            f"{self.first}; --tokenizer none exports without it"
        )


def check_tokenizer(folder: Path, tokenizer: Tokenizer, count: int = STRINGS) -> TokenizerResult:
    """Compare the tokenizer files of `folder` with `tokenizer` on nasty strings.

    Raises RunError when transformers cannot load them.
    """
    from transformers import AutoTokenizer

    texts = nasty_strings(count, tokenizer.specials)
    ours = [ids.tolist() for ids in tokenizer.encode_arrays(texts)]
    try:
        theirs = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:
        raise RunError(
            f"transformers cannot load the exported tokenizer ({str(error).splitlines()[0]:.200})"
        ) from None

    # Long strings are meant.
    theirs.model_max_length = 10**9
    different, decoded, first = 0, 0, ""
    for text, ids in zip(texts, ours, strict=True):
        found = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        back = theirs.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        different += found != ids
        decoded += back != text
        if not first and (found != ids or back != text):
            first = ascii(text)[:100]

    alone = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL))
    plain = [(text, ids) for text, ids in zip(texts, ours, strict=True) if "\u2581" not in text]
    apart = [text for text, ids in plain if alone.encode(text) != ids]
    first = first or "".join(map(ascii, apart[:1]))
    return TokenizerResult(len(texts), different, decoded, len(plain), len(apart), first)
