"""Does an exported tokenizer give the ids of training: a thousand nasty strings, and back.

- Compared are transformers' tokenizer of the written folder, and sentencepiece on the written
  `tokenizer.model` if there is one.
- A text is also encoded without an option, as a user does it: a token that is put in front of every
  text is found.
- Each control token has the id and the role that it had in training.
- A text that is not in Unicode's normal form may come back in it, as training's own decoding says.
- Sentencepiece alone takes U+2581 for a space, so strings with it are left out there.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from k2train.data.json_tokenizer import JsonTokenizer
from k2train.data.tokenizer import Tokenizer
from k2train.errors import RunError
from k2train.hf.nasty_strings import nasty_strings
from k2train.hf.tokenizer_settings import MODEL
from k2train.retry import is_file_retried

STRINGS = 1000


@dataclass(frozen=True)
class TokenizerResult:
    """What was compared, and how many strings differed."""

    strings: int
    different: int
    decoded_different: int
    sentencepiece_strings: int
    sentencepiece_different: int
    names: int
    """Control tokens of which id and name were compared."""
    names_different: int
    first: str
    """The first string or control token that differs; "" if none does."""

    @property
    def problem(self) -> str:
        """What is wrong, in words; "" if nothing is."""
        texts = self.different or self.decoded_different or self.sentencepiece_different
        if not texts and not self.names_different:
            return ""
        if not texts:
            return (
                f"the exported tokenizer has other ids for {self.names_different} of {self.names} "
                f"control tokens; the first is {self.first}; --tokenizer none exports without it"
            )
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
    texts = nasty_strings(count, tokenizer.specials)
    ours = [ids.tolist() for ids in tokenizer.encode_arrays(texts)]
    theirs = load_theirs(folder)
    known = special_ids(tokenizer, theirs)
    normalizes = isinstance(tokenizer, JsonTokenizer)
    different, decoded, first = 0, 0, ""
    for text, ids in zip(texts, ours, strict=True):
        found = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        # As a user calls it. A folder with a template takes quoted tokens for tokens then.
        if theirs.split_special_tokens or not any(name in text for name in known):
            found = found if found != ids else theirs(text)["input_ids"]
        back = theirs.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        composed = unicodedata.is_normalized("NFC", text)
        wanted = tokenizer.decode(ids) if normalizes and not composed else text
        different += found != ids
        decoded += back != wanted
        if not first and (found != ids or back != wanted):
            first = ascii(text)[:100]

    odd = [name for name, token in known.items() if theirs.convert_tokens_to_ids(name) != token]
    odd += _odd_roles(tokenizer, theirs)
    plain, apart = _by_sentencepiece(folder, list(zip(texts, ours, strict=True)))
    first = first or "".join(map(ascii, [*apart, *odd][:1]))
    return TokenizerResult(
        len(texts), different, decoded, plain, len(apart), len(known), len(odd), first
    )


def _odd_roles(tokenizer: Tokenizer, theirs: Any) -> list[str]:
    """Roles that another token has."""
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    return [role for role, token in ids.items() if getattr(theirs, f"{role}_token_id") != token]


def _by_sentencepiece(
    folder: Path, pairs: Sequence[tuple[str, list[int]]]
) -> tuple[int, list[str]]:
    """Number of strings that sentencepiece encoded, and those with other ids; 0 without a model."""
    if not is_file_retried(folder / MODEL):
        return 0, []
    alone = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL))
    plain = [(text, ids) for text, ids in pairs if "\u2581" not in text]
    return len(plain), [text for text, ids in plain if alone.encode(text) != ids]


def special_ids(tokenizer: Tokenizer, theirs: Any) -> dict[str, int]:
    """Return the ids of all control tokens by name, as training has them."""
    roles = (theirs.bos_token, theirs.eos_token, theirs.pad_token, theirs.unk_token)
    names = {*tokenizer.specials, *filter(None, roles), *theirs.all_special_tokens}
    found = {}
    for token in range(tokenizer.vocab_size):
        if tokenizer.is_control(token) and (name := tokenizer.decode([token])) in names:
            found[name] = token
    return found


def load_theirs(folder: Path) -> Any:
    """Return transformers' tokenizer of a folder. Raises RunError when it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        raise RunError(f"transformers cannot load the exported tokenizer ({told})") from None
    # Long strings are meant.
    theirs.model_max_length = 10**9
    return theirs
