"""Spans of token sequences in a data folder: the longest matches, in rows and across them.

- A span is a match that no longer one contains: at most one begins at each position.
- Each part of each chunk is searched by itself; the longest match of all of them counts.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from k2train.data.trace.build import Index
from k2train.data.trace.joined import BorderSearcher, JoinedMatch
from k2train.data.trace.search import BLOCK_POSITIONS, Ints, OpenPart, Place, Queries, Span


class Searcher:
    """Searches one data folder by its index."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.parts = [OpenPart(index.manifest, index.folder, part) for part in index.parts]
        borders = index.borders
        self.borders = None if isinstance(borders, str) else BorderSearcher(index.manifest, borders)

    def matches(self, queries: Queries) -> Ints:
        """Length of the longest match that begins at each position: [parts, positions]."""
        found = np.zeros((len(self.parts), len(queries.tokens)), dtype=np.int64)
        positions = queries.begins
        for number, part in enumerate(self.parts):
            for begin in range(0, len(positions), BLOCK_POSITIONS):
                block = positions[begin : begin + BLOCK_POSITIONS]
                found[number, block] = part.lower_bounds(queries, block, queries.ends[block])[1]
        return found

    def spans(self, queries: Queries, min_tokens: int, most_places: int) -> list[Span]:
        """Find the spans of at least `min_tokens`, in the order of their start.

        Those across rows, too; a span that a longer one contains is left out.
        """
        found = self._spans_in_rows(queries, min_tokens, most_places)
        if self.borders is not None:
            found += _joined_spans(self.borders.matches(queries), min_tokens, most_places)
        kept: list[Span] = []
        for span in sorted(found, key=lambda s: (s.start, -s.stop)):
            if not kept or span.stop > kept[-1].stop:
                kept.append(span)
            elif (span.start, span.stop) == (kept[-1].start, kept[-1].stop):
                places = (*kept[-1].places, *span.places)[:most_places]
                kept[-1] = Span(span.start, span.length, places, kept[-1].count + span.count)
        return kept

    def matches_everywhere(self, queries: Queries, min_tokens: int, most_places: int) -> list[Span]:
        """Find matches of at least `min_tokens`, also those that a longer one elsewhere contains.

        Each has one place. Of a window of `min_tokens`, the first places in a part are looked at.
        """
        lengths = self.matches(queries)
        found: list[Span] = []
        for number, part in enumerate(self.parts):
            starts = np.flatnonzero(lengths[number] >= min_tokens)
            first, _ = part.lower_bounds(queries, starts, starts + min_tokens)
            behind, _ = part.lower_bounds(queries, starts, starts + min_tokens, after=True)
            # Windows one behind the other in text and row are one match.
            windows: dict[int, list[int]] = defaultdict(list)
            for start, low, high in zip(starts.tolist(), first, behind, strict=True):
                # The first ones in the order of the rows, which are those of the earliest steps.
                positions = np.sort(part.suffixes[low:high])[:most_places]
                for position in positions.tolist():
                    windows[position - start].append(start)
            for shift, own in windows.items():
                for begin, count in _runs(own):
                    length = count - 1 + min_tokens
                    place = part.place(begin + shift, length)
                    found.append(Span(begin, length, (place,), 1))
        if self.borders is not None:
            joined = self.borders.matches(queries)
            found += [
                Span(one.start, one.stop - one.start, (one.place,), 1)
                for one in joined
                if one.stop - one.start >= min_tokens
            ]
        return sorted(found, key=lambda span: (span.start, -span.stop))

    def _spans_in_rows(self, queries: Queries, min_tokens: int, most_places: int) -> list[Span]:
        lengths = self.matches(queries)
        starts = maximal_starts(lengths.max(axis=0, initial=0), min_tokens)
        longest = lengths.max(axis=0, initial=0)[starts]
        ends = starts + longest

        counts = np.zeros(len(starts), dtype=np.int64)
        places: list[list[Place]] = [[] for _ in starts]
        for number, part in enumerate(self.parts):
            here = np.flatnonzero(lengths[number, starts] == longest)
            if not len(here):
                continue
            first, _ = part.lower_bounds(queries, starts[here], ends[here])
            behind, _ = part.lower_bounds(queries, starts[here], ends[here], after=True)
            counts[here] += behind - first
            for span, low, high in zip(here, first, behind, strict=True):
                high = min(high, low + most_places - len(places[span]))
                places[span] += [
                    part.place(int(at), int(longest[span])) for at in part.suffixes[low:high]
                ]

        return [
            Span(int(start), int(length), tuple(sorted(where, key=_in_order)), int(count))
            for start, length, where, count in zip(starts, longest, places, counts, strict=True)
        ]


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and count of each run of ascending numbers without a gap."""
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [(int(run[0]), len(run)) for run in np.split(np.asarray(numbers), cuts)]


def _joined_spans(matches: Sequence[JoinedMatch], min_tokens: int, most_places: int) -> list[Span]:
    places: dict[tuple[int, int], list[Place]] = defaultdict(list)
    for match in matches:
        if match.stop - match.start >= min_tokens:
            places[match.start, match.stop].append(match.place)
    return [
        Span(start, stop - start, tuple(sorted(found, key=_in_order)[:most_places]), len(found))
        for (start, stop), found in places.items()
    ]


def _in_order(place: Place) -> tuple[str, int, int]:
    return place.chunk, place.row, place.start


def maximal_starts(lengths: Ints, min_tokens: int) -> Ints:
    """Starts of the matches of at least `min_tokens` that the match before does not contain.

    `lengths` [positions] are those of the longest matches. A match that begins one token earlier
    contains this one if it is at least one token longer.
    """
    before = np.concatenate(([0], lengths[:-1])) if len(lengths) else lengths
    return np.flatnonzero((lengths >= min_tokens) & (before < lengths + 1))
