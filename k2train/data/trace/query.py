"""Text queries: a text in the tokens that a document would have, and spans back to its bytes.

- The tokens of a text depend on what stands before it. So it is encoded twice, as it is and with a
  space in front: a quotation from the middle of a document then keeps its first word.
- Only the first tokens of the two differ. Matches that begin behind these are searched once.
- A token sequence is cut behind each `</s>`, so that no match goes from one document to the next,
  unless asked for. Text has none: what it quotes of control tokens is encoded as text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from k2train.data.tokenizer import EOS_ID, Tokenizer
from k2train.data.trace.search import Queries, Span
from k2train.data.trace.spans import Searcher

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Spelling:
    """One encoding of a text: its ids, and the byte of the text at which each of them begins.

    `offsets` has one more entry, the end. A space that was put in front is at byte -1.
    """

    ids: Ints
    offsets: Ints
    heads: int
    """At how many first positions a match may begin; the rest is that of the spelling before."""


def spellings_of(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[Spelling]]:
    """Return the encodings of each text. Raises DataError for text that is not Unicode."""
    plain, spaced = (
        tokenizer.encode_arrays([before + text for text in texts], begins=[False] * len(texts))
        for before in ("", " ")
    )
    found = []
    for first, second in zip(plain, spaced, strict=True):
        shared = _shared_tail(first, second)
        found.append(
            [
                _spelling(tokenizer, first, 0, len(first)),
                _spelling(tokenizer, second, -1, len(second) - shared),
            ]
        )
    return found


def _spelling(tokenizer: Tokenizer, ids: npt.NDArray[np.int32], start: int, heads: int) -> Spelling:
    widths = [len(tokenizer.decode_bytes([token])) for token in ids.tolist()]
    return Spelling(ids.astype(np.int64), np.cumsum([start, *widths]), heads)


def _shared_tail(first: npt.NDArray[np.int32], second: npt.NDArray[np.int32]) -> int:
    """Number of last tokens that two encodings have in common."""
    length = min(len(first), len(second))
    if not length:
        return 0
    differs = np.flatnonzero(first[::-1][:length] != second[::-1][:length])
    return int(differs[0]) if len(differs) else length


@dataclass(frozen=True)
class TextSpan:
    """A span of a text: its ids, the bytes of the text that it covers, and where it occurs."""

    ids: tuple[int, ...]
    first: int
    last: int
    """The byte behind the last one."""
    span: Span


def search_texts(
    searcher: Searcher,
    texts: Sequence[Sequence[Spelling]],
    min_tokens: int,
    most_places: int,
) -> list[list[TextSpan]]:
    """Find the spans of each text, in all its spellings; those within a longer one are left out."""
    queries = _queries(texts)
    spans = searcher.spans(queries, min_tokens, most_places)
    return [_outermost(own) for own in _in_texts(texts, spans)]


def search_texts_everywhere(
    searcher: Searcher,
    texts: Sequence[Sequence[Spelling]],
    min_tokens: int,
    most_places: int,
) -> list[list[TextSpan]]:
    """Find the matches of each text in every row, however long those of other rows are."""
    queries = _queries(texts)
    return _in_texts(texts, searcher.matches_everywhere(queries, min_tokens, most_places))


def _queries(texts: Sequence[Sequence[Spelling]]) -> Queries:
    flat = [one for text in texts for one in text]
    return Queries.of([one.ids for one in flat], [one.heads for one in flat])


def _in_texts(texts: Sequence[Sequence[Spelling]], spans: Iterable[Span]) -> list[list[TextSpan]]:
    """Return the spans of the spellings of all texts by text, with the bytes that they cover."""
    flat = [(number, one) for number, text in enumerate(texts) for one in text]
    ends = np.cumsum([len(one.ids) for _, one in flat])

    found: list[list[TextSpan]] = [[] for _ in texts]
    for span in spans:
        index = int(np.searchsorted(ends, span.start, side="right"))
        number, spelling = flat[index]
        base = int(ends[index]) - len(spelling.ids)
        begin, stop = span.start - base, span.stop - base
        found[number].append(
            TextSpan(
                tuple(spelling.ids[begin:stop].tolist()),
                max(0, int(spelling.offsets[begin])),
                int(spelling.offsets[stop]),
                span,
            )
        )
    return found


def _outermost(spans: Iterable[TextSpan]) -> list[TextSpan]:
    """Spans that no other one contains, in the order of the text."""
    kept: list[TextSpan] = []
    for one in sorted(spans, key=lambda s: (s.first, -s.last, -s.span.length)):
        if not kept or one.last > kept[-1].last:
            kept.append(one)
    return kept


def search_tokens(
    searcher: Searcher,
    tokens: Sequence[int],
    min_tokens: int,
    most_places: int,
    across_documents: bool = False,
) -> list[TextSpan]:
    """Find the spans of a token sequence; its bytes are counted as tokens."""
    cuts = [0, len(tokens)]
    if not across_documents:
        cuts += [i + 1 for i, token in enumerate(tokens) if token == EOS_ID]
    cuts = sorted(set(cuts))
    parts = [tokens[begin:end] for begin, end in pairwise(cuts)]

    return [
        TextSpan(tuple(tokens[span.start : span.stop]), span.start, span.stop, span)
        for span in searcher.spans(Queries.of(parts), min_tokens, most_places)
    ]
