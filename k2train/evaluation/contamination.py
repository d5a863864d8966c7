"""Contamination: test items in the chunks that a run has read, and the step that read them.

- A span is a longest exact match by token. Its ends are extended by bytes: a text in the middle of
  a line has other tokens at its edges than by itself.
- An item is judged by the share of its tokens in spans of at least N tokens (13). Of a part with
  fewer than N tokens the whole must match; below 8 tokens a match says nothing.
- `exposed`: 80% or more of one part is covered by what the run has trained on. `partly`: 20% or
  more. `clean`: less. These are the bounds of Llama 2, without its skipgrams.
- A place counts at the step that trained on its row, wherever deferrals have moved that. Rows that
  were read in steps undone later, skipped, or after the branch are named, and do not count.
- Each chunk is searched by itself, and what it has in every row: a longer span hides no shorter one
  that was read at another step.

Alternatives considered:
- Any one 13-gram, as GPT-3: one quotation of a law makes a long item dirty.
- 70% of 8-grams, as PaLM: `--tokens 8 --exposed 0.7` is the same on tokens instead of words.
- Skipgrams, as Llama 2: they find small changes, which a suffix array cannot.

Source: Brown et al. 2020 (arXiv:2005.14165) appendix C; Chowdhery et al. 2022 (arXiv:2204.02311)
section 8; Touvron et al. 2023 (arXiv:2307.09288) appendix A.6.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from k2train.data.inspect.run_progress import TRAINED
from k2train.data.tokenizer import Tokenizer
from k2train.data.trace.build import Index
from k2train.data.trace.exposures import Exposure
from k2train.data.trace.findings import Corpus
from k2train.data.trace.query import (
    Spelling,
    TextSpan,
    search_texts,
    search_texts_everywhere,
    spellings_of,
)
from k2train.data.trace.search import Place
from k2train.data.trace.spans import Searcher
from k2train.evaluation.contamination_findings import (
    SHORT,
    Hit,
    ItemFinding,
    PartFinding,
    Row,
    Rules,
)
from k2train.evaluation.contamination_items import ANSWERED, SearchedItem

EDGE_TOKENS = 4
"""Tokens at both edges of a span that may differ although their bytes are the same."""
EDGE_BYTES = 64

Bools = npt.NDArray[np.bool_]


@dataclass
class Contamination:
    """Search of test items in the data of a run's stages."""

    corpora: Sequence[Corpus]
    indexes: Sequence[Index]
    tokenizer: Tokenizer
    rules: Rules
    _exposures: dict[tuple[int, str, int], tuple[tuple[Exposure, ...], tuple[int, ...]]] = field(
        default_factory=dict
    )

    @property
    def has_steps(self) -> bool:
        """Whether a run has read the data."""
        return any(corpus.stages for corpus in self.corpora)

    def find(self, items: Sequence[SearchedItem]) -> list[ItemFinding]:
        """Search all parts of all items. Raises DataError for text that is not Unicode."""
        parts = [(at, name, text) for at, item in enumerate(items) for name, text in item.parts()]
        spellings = spellings_of(self.tokenizer, [text for _, _, text in parts])
        hits = self._hits([text.encode() for _, _, text in parts], spellings)

        found: list[list[PartFinding]] = [[] for _ in items]
        for (at, name, _), spelled, own in zip(parts, spellings, hits, strict=True):
            border = len(items[at].prompt.encode()) if name == ANSWERED else None
            found[at].append(self._part(name, spelled[0].offsets, own, border))
        return [
            ItemFinding(item.name, self._label(own), tuple(own))
            for item, own in zip(items, found, strict=True)
        ]

    def _label(self, parts: Sequence[PartFinding]) -> str:
        judged = [part.covered for part in parts if part.is_judged]
        return self.rules.label(max(judged)) if judged else SHORT

    def _hits(
        self, texts: Sequence[bytes], spellings: Sequence[Sequence[Spelling]]
    ) -> list[list[Hit]]:
        """Find the places of each text, in each of the data folders."""
        found: list[list[Hit]] = [[] for _ in texts]
        needed = [self.rules.needed(len(spelled[0].ids)) for spelled in spellings]
        for least in sorted({max(1, one - EDGE_TOKENS) for one in needed if one}):
            here = [at for at, one in enumerate(needed) if max(1, one - EDGE_TOKENS) == least]
            wanted = [spellings[at] for at in here]
            for number, searcher, rows in self._searchers():
                spans = search_texts(searcher, wanted, least, self.rules.places)
                # Only of what occurs at all: there, other rows may have a shorter part of it.
                there = [at for at, own in zip(here, spans, strict=True) if own]
                again = [spellings[at] for at in there]
                more = search_texts_everywhere(searcher, again, least, self.rules.places)
                shorter = dict(zip(there, more, strict=True))
                for at, own in zip(here, spans, strict=True):
                    offsets = spellings[at][0].offsets
                    one = _Wanted(texts[at], offsets, needed[at])
                    found[at] += self._places(number, rows, one, [*own, *shorter.get(at, ())])
        return found

    def _searchers(self) -> Iterable[tuple[int, Searcher, "_RowReader"]]:
        """Yield number of the data folder, searcher and rows: of each chunk, then across rows."""
        for number, index in enumerate(self.indexes):
            whole = Searcher(index)
            rows = _RowReader(whole, self.tokenizer)
            for info in index.manifest.all_chunks():
                one = copy(whole)
                one.borders = None
                one.parts = [part for part in whole.parts if part.part.info.name == info.name]
                yield number, one, rows
            if whole.borders is not None:
                across = copy(whole)
                across.parts = []
                yield number, across, rows

    def _places(
        self, number: int, rows: "_RowReader", wanted: "_Wanted", spans: Sequence[TextSpan]
    ) -> Iterable[Hit]:
        seen: dict[tuple[tuple[str, int], ...], list[tuple[int, int]]] = defaultdict(list)
        # The longest first: what a hit has in the same rows is no other one.
        for span in sorted(spans, key=lambda span: -span.span.length):
            for place in span.span.places:
                known = seen[tuple((one.chunk, one.row) for one in place.rows())]
                if _is_within(known, span.first, span.last):
                    continue
                first, last = rows.extended(place, wanted.text, span.first, span.last)
                tokens = wanted.tokens_in(first, last)
                if tokens < wanted.needed or _is_within(known, first, last):
                    continue
                known.append((first, last))
                yield Hit(
                    first, last, tokens, tuple(self._row(number, one) for one in place.rows())
                )

    def _row(self, number: int, place: Place) -> Row:
        corpus = self.corpora[number]
        key = (number, place.chunk, place.row)
        if key not in self._exposures:
            uses: list[Exposure] = []
            steps: set[int] = set()
            for stage in corpus.stages:
                own = stage.exposures(place.chunk, place.row)
                uses += own
                # What an earlier stage has read was read before the first step of this one.
                trained = {one.step or 0 for one in own if one.state == TRAINED}
                steps |= {0} if stage.branch and trained else trained
            self._exposures[key] = (tuple(uses), tuple(sorted(steps)))
        exposures, trained_at = self._exposures[key]
        data = str(corpus.manifest.folder)
        return Row(data, place.chunk, place.row, place.start, place.length, exposures, trained_at)

    def _part(
        self,
        name: str,
        offsets: npt.NDArray[np.int64],
        hits: Sequence[Hit],
        border: int | None,
    ) -> PartFinding:
        # Of a data folder without a run, all of it counts.
        counted = [hit for hit in hits if hit.step is not None or not self.has_steps]
        trained = sorted(((hit.step or 0, hit) for hit in counted), key=lambda pair: pair[0])
        read, everywhere = _Cover(offsets), _Cover(offsets)
        exposed_at: int | None = None
        for step, hit in trained:
            read.add(hit)
            enough = read.share >= self.rules.exposed
            if exposed_at is None and enough and self.has_steps:
                exposed_at = step
        for hit in hits:
            everywhere.add(hit)

        end = int(offsets[-1])
        with_answer = border is not None and any(
            hit.first < border and hit.last >= end for _, hit in trained
        )
        return PartFinding(
            name,
            len(offsets) - 1,
            self.rules.needed(len(offsets) - 1),
            max((hit.tokens for _, hit in trained), default=0),
            read.share,
            exposed_at,
            everywhere.share,
            with_answer,
            tuple(sorted(hits, key=lambda hit: (hit.step is None, hit.step or 0, -hit.tokens))),
        )


def _is_within(known: Sequence[tuple[int, int]], first: int, last: int) -> bool:
    """Whether one of the known stretches contains another one."""
    return any(begin <= first and last <= end for begin, end in known)


@dataclass(frozen=True)
class _Wanted:
    """A text that is searched: its bytes, where its tokens begin, and the shortest span."""

    text: bytes
    offsets: npt.NDArray[np.int64]
    needed: int

    def tokens_in(self, first: int, last: int) -> int:
        """Number of its tokens within bytes `first` to `last`."""
        begins, ends = self.offsets[:-1], self.offsets[1:]
        return int(((begins >= first) & (ends <= last) & (begins < ends)).sum())


class _Cover:
    """Tokens of a text that are in any span so far."""

    def __init__(self, offsets: npt.NDArray[np.int64]) -> None:
        self._begins, self._ends = offsets[:-1], offsets[1:]
        self._bytes: Bools = np.zeros(int(offsets[-1]) + 1, dtype=np.bool_)

    def add(self, hit: Hit) -> None:
        self._bytes[hit.first : hit.last] = True

    @property
    def share(self) -> float:
        """Share of the tokens all of whose bytes are covered."""
        covered = np.concatenate(([0], np.cumsum(self._bytes)))
        lengths = self._ends - self._begins
        whole = covered[self._ends] - covered[self._begins] == lengths
        # A token without bytes is in no span.
        return float(whole[lengths > 0].mean()) if lengths.any() else 0.0


class _RowReader:
    """Bytes beside a place, to extend a span behind its first and last token."""

    def __init__(self, searcher: Searcher, tokenizer: Tokenizer) -> None:
        self._parts, self._tokenizer = searcher.parts, tokenizer

    def extended(self, place: Place, text: bytes, first: int, last: int) -> tuple[int, int]:
        """Extend bytes `first` to `last` of a text as far as the row has the same."""
        *_, end = place.rows()
        before = self._bytes(place, place.start - EDGE_BYTES, place.start, from_left=False)
        stop = end.start + end.length
        behind = self._bytes(end, stop, stop + EDGE_BYTES, from_left=True)
        while first > 0 and before and before[-1] == text[first - 1]:
            first, before = first - 1, before[:-1]
        same = 0
        while last + same < len(text) and same < len(behind) and behind[same] == text[last + same]:
            same += 1
        return first, last + same

    def _bytes(self, place: Place, begin: int, end: int, from_left: bool) -> bytes:
        """Bytes of tokens `begin` to `end` of a place's row, within its document."""
        for part in self._parts:
            if part.part.info.name == place.chunk and place.row in part.part.rows:
                base = (place.row - part.part.rows.start) * part.row_length
                begin, end = max(0, begin), min(part.row_length, end)
                ids = part.ids[base + begin : base + max(begin, end)].tolist()
                break
        else:
            return b""
        eos = self._tokenizer.eos_id
        if eos in ids:
            at = ids.index(eos) if from_left else len(ids) - ids[::-1].index(eos)
            ids = ids[:at] if from_left else ids[at:]
        return self._tokenizer.decode_bytes(ids)
