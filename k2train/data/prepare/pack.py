"""Documents to samples: each document followed by `</s>`, all laid end to end, cut at the sequence length.

Nothing is padded and nothing is lost but one tail a subset, which is counted. Documents lie in an order keyed by
(seed, document), so that the order of one does not depend on which others there are. Starting each document at a
sample's beginning was refused: it pads, or cuts off, most of a corpus of short documents.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from k2train.data.prepare.documents import Document
from k2train.data.prepare.tokenizer import EOS_ID

Ids = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Piece:
    """`length` tokens of a row from token `start`, taken from token `offset` of a document (its `</s>` included)."""

    start: int
    length: int
    document: Document
    offset: int


@dataclass(frozen=True)
class Packed:
    """A subset laid end to end: `tokens` `[n]`, and where in it each document begins."""

    documents: tuple[Document, ...]
    starts: npt.NDArray[np.int64]
    tokens: Ids
    sequence_length: int

    @property
    def samples(self) -> int:
        return len(self.tokens) // self.sequence_length

    @property
    def tail_tokens(self) -> int:
        """Tokens beyond the last full sample."""
        return len(self.tokens) % self.sequence_length

    def rows(self, samples: npt.NDArray[np.int64]) -> Ids:
        """`[len(samples), sequence_length]`."""
        full = self.tokens[: self.samples * self.sequence_length]
        return full.reshape(self.samples, self.sequence_length)[samples]

    def pieces(self, sample: int) -> list[Piece]:
        """The documents of a sample, in order; their lengths add up to the sequence length."""
        first, end = sample * self.sequence_length, (sample + 1) * self.sequence_length
        index = int(np.searchsorted(self.starts, first, side="right")) - 1
        found, at = [], first
        while at < end:
            stop = int(self.starts[index + 1]) if index + 1 < len(self.starts) else len(self.tokens)
            length = min(stop, end) - at
            found.append(Piece(at - first, length, self.documents[index], at - int(self.starts[index])))
            at, index = at + length, index + 1
        return found

    def used(self, samples: int) -> list[Document]:
        """Documents that the first `samples` samples take tokens from."""
        count = int(np.searchsorted(self.starts, samples * self.sequence_length, side="left"))
        return list(self.documents[:count])


def document_key(seed: int, document: Document) -> bytes:
    """Sorting by this is the keyed order: the same for a document whatever else is in the corpus."""
    name = "\0".join((str(seed), document.subset, document.source, document.name))
    return hashlib.sha256(b"k2train document order\0" + name.encode()).digest()


def pack(documents: Sequence[Document], ids: Sequence[Sequence[int]], sequence_length: int, seed: int) -> Packed:
    """Lay the documents, `ids[i]` being the tokens of `documents[i]` without `</s>`, end to end in keyed order."""
    order = sorted(range(len(documents)), key=lambda i: document_key(seed, documents[i]))
    lengths = np.array([0, *(len(ids[i]) + 1 for i in order)], dtype=np.int64)
    ends = np.cumsum(lengths)
    tokens = np.empty(int(ends[-1]), dtype=np.uint32)
    for place, i in enumerate(order):
        tokens[ends[place] : ends[place + 1] - 1] = ids[i]
        tokens[ends[place + 1] - 1] = EOS_ID
    return Packed(tuple(documents[i] for i in order), ends[:-1], tokens, sequence_length)
