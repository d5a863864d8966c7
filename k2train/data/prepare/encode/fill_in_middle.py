"""Fill-in-the-middle: reorder the parts of a document to train the model to fill a gap.

    psm   <fim_prefix> prefix <fim_suffix> suffix <fim_middle> middle
    spm   <fim_prefix> <fim_suffix> suffix <fim_middle> prefix middle

- Both are made of complete documents before packing, cut between two characters. Nothing is
  truncated or padded.
- Which documents, and where, is a hash of (seed, source, document). It depends on no other
  document, on no reading order and on no clock.
- In `spm`, prefix and middle are encoded as one text. The model reads them in sequence, and a piece
  boundary at a random position inside a word would be a spelling that ordinary text does not have.
  In `psm` each part is encoded alone, since special tokens separate them anyway.
- Cuts respect characters, not what looks like one on a screen: an editor's cursor may be between a
  letter and its accent too.
- Alternatives considered: a draw from one running generator; one more document would change all
  that follow.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from k2train.data.tokenizer import Ids, Tokenizer
from k2train.errors import DataError

Kind = Literal["none", "psm", "spm"]
KINDS: tuple[Kind, ...] = ("none", "psm", "spm")
"""The index of a kind is its number in files."""
SPECIALS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
MIN_CHARACTERS = 2


class Item(NamedTuple):
    """A document to encode.

    `a` and `b` are the ends of the prefix and the middle, in characters.
    """

    text: str
    kind: Kind = "none"
    a: int = 0
    b: int = 0


def choose_fim(seed: int, source_key: str, document: str, psm: float, spm: float) -> Kind:
    """Choose the kind of a document from its name; `psm` and `spm` are shares of the documents.

    One draw decides among the three, so raising one share leaves the documents of the other
    unchanged.
    """
    assert min(psm, spm) >= 0 and psm + spm <= 1, (
        f"shares psm {psm} and spm {spm} must lie in [0, 1] together"
    )
    (word,) = _hash_words("kind", seed, source_key, document, 1)
    # The upper 53 bits as a float in [0, 1).
    drawn = (word >> 11) * 2.0**-53
    if drawn < psm:
        return "psm"
    return "spm" if drawn >= 1 - spm else "none"


def cut_points(seed: int, source_key: str, document: str, n_characters: int) -> tuple[int, int]:
    """Ends (a, b) of prefix and middle, 0 <= a <= b <= n_characters.

    Two uniform draws, sorted; parts may be empty.
    """
    first, second = _hash_words("cuts", seed, source_key, document, 2)
    # The upper half of the product: uniform to one part in 2**64 / n for any n, without a second
    # draw.
    a, b = first * (n_characters + 1) >> 64, second * (n_characters + 1) >> 64
    return min(a, b), max(a, b)


def choose_item(
    seed: int, source_key: str, document: str, text: str, psm: float, spm: float
) -> Item:
    """The document as it is encoded.

    One of fewer than 2 characters has no middle and stays plain.
    """
    kind = choose_fim(seed, source_key, document, psm, spm)
    if kind == "none" or len(text) < MIN_CHARACTERS:
        return Item(text)
    return Item(text, kind, *cut_points(seed, source_key, document, len(text)))


def fim_parts(text: str, a: int, b: int) -> tuple[str, str, str]:
    """Split a text into prefix, middle and suffix; concatenated they are the text."""
    assert 0 <= a <= b <= len(text), (
        f"cuts {a} and {b} must lie in order in a text of {len(text)} characters"
    )
    return text[:a], text[a:b], text[b:]


def fim_ids(tokenizer: Tokenizer, text: str, kind: Kind, a: int, b: int) -> Ids:
    """Ids int32 [n] of one document, without `</s>`.

    The module docstring shows the order of the parts.
    """
    return encode_documents(tokenizer, [Item(text, kind, a, b)])[0]


def require_specials(tokenizer: Tokenizer) -> None:
    """Raises DataError when the tokenizer lacks a special token of fill-in-the-middle."""
    missing = [name for name in SPECIALS if name not in tokenizer.specials]
    if missing:
        raise DataError(
            f"tokenizer.specials has no {', '.join(missing)}, which "
            "fill_in_the_middle needs; add it, or set psm and spm to 0"
        )


def encode_documents(
    tokenizer: Tokenizer, items: Sequence[tuple[str, Kind, int, int]], num_threads: int = 1
) -> list[Ids]:
    """Encode documents (text, kind, a, b): ids int32 [n] of each, without `</s>`.

    All parts go through one tokenizer call. Raises DataError for text that is not Unicode, and for
    special tokens that the tokenizer does not have.
    """
    # All parts of all documents in one list; `spm` encodes prefix and middle as one text.
    texts: list[str] = []
    # Whether a part is the beginning of its document.
    begins: list[bool] = []
    for text, kind, a, b in items:
        if kind == "none":
            texts.append(text)
            begins.append(True)
            continue
        prefix, middle, suffix = fim_parts(text, a, b)
        if kind == "psm":
            texts += [prefix, suffix, middle]
            begins += [True, not (prefix or middle), not prefix]
        else:
            texts += [suffix, prefix + middle]
            begins += [not (prefix or middle), True]

    encoded = tokenizer.encode_arrays(texts, num_threads, begins)
    if len(texts) == len(items):
        return encoded
    require_specials(tokenizer)

    prefix_id, suffix_id, middle_id = (
        np.array([tokenizer.special_id(name)], dtype=np.int32) for name in SPECIALS
    )

    # Join the parts of each document with its special tokens.
    ids, parts = [], iter(encoded)
    for _, kind, _, _ in items:
        if kind == "none":
            ids.append(next(parts))
        elif kind == "psm":
            ids.append(
                np.concatenate(
                    [prefix_id, next(parts), suffix_id, next(parts), middle_id, next(parts)]
                )
            )
        else:
            ids.append(np.concatenate([prefix_id, suffix_id, next(parts), middle_id, next(parts)]))

    return ids


def restore(tokenizer: Tokenizer, ids: Iterable[int] | npt.NDArray[np.integer]) -> str:
    """Restore the text of a document from all its ids, plain or of either kind.

    One `</s>` at the end is left out. `psm` with an empty prefix looks like `spm`; both readings
    give the same text. Raises DataError for ids that are not one complete document, such as those
    of a row that begins inside one.
    """
    numbers = [int(token) for token in ids]
    if numbers and numbers[-1] == tokenizer.eos_id:
        numbers.pop()
    # -1 for a special token that the tokenizer lacks; no id equals it.
    special_ids = [
        tokenizer.special_id(name) if name in tokenizer.specials else -1 for name in SPECIALS
    ]
    indices = [index for index, token in enumerate(numbers) if token in special_ids]
    if not indices:
        return tokenizer.decode(numbers)

    if [numbers[index] for index in indices] != special_ids or indices[0] != 0:
        raise DataError(
            "ids are not one whole fill-in-the-middle document: "
            "its three special tokens are not in order"
        )

    _, suffix_index, middle_index = indices
    prefix, suffix, middle = (
        numbers[1:suffix_index],
        numbers[suffix_index + 1 : middle_index],
        numbers[middle_index + 1 :],
    )
    return b"".join(map(tokenizer.decode_bytes, (prefix, middle, suffix))).decode(
        "utf-8", "replace"
    )


def _hash_words(
    purpose: str, seed: int, source_key: str, document: str, count: int
) -> tuple[int, ...]:
    """`count` 64-bit numbers decided by the names.

    The length of each name is hashed too, since names may contain any character.
    """
    digest = hashlib.sha256(f"k2train fill in the middle: {purpose}\0{seed}".encode())
    for name in (source_key, document):
        content = name.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "big") + content)
    return struct.unpack(f">{count}Q", digest.digest()[: 8 * count])
