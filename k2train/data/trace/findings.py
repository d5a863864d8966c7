"""Findings of a search: each span with its documents, rows and exposures, ready to print.

- Provenance is read once a chunk, for the rows that were found.
- Data without provenance has places and steps, but no documents; a note says so.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from k2train.data.inspect.provenance import pieces_of
from k2train.data.manifest import Manifest
from k2train.data.trace.exposures import Exposure, Stage
from k2train.data.trace.query import TextSpan
from k2train.data.trace.search import Place
from k2train.errors import UserError


@dataclass(frozen=True)
class DocumentPart:
    """A part of a document that a place covers; `offset` is where in the document it begins."""

    subset: str | None
    source: str | None
    document: str | None
    offset: int | None
    tokens: int
    fim: str | None = None
    repeat: int | None = None


@dataclass(frozen=True)
class RowFinding:
    """Tokens of one row that belong to a span, with their documents and exposures."""

    chunk: str
    row: int
    start: int
    tokens: int
    documents: tuple[DocumentPart, ...]
    exposures: tuple[Exposure, ...]


@dataclass(frozen=True)
class PlaceFinding:
    """A place where a span occurs: one row, or several that follow each other in a document."""

    data: str
    rows: tuple[RowFinding, ...]


@dataclass(frozen=True)
class SpanFinding:
    """A span with its places; `count` of them there are in all."""

    tokens: int
    first: int
    """First byte of the query's text, or first token of a query that is tokens."""
    last: int
    """The one behind the last."""
    text: str
    ids: tuple[int, ...]
    count: int
    places: tuple[PlaceFinding, ...]

    @property
    def exposures(self) -> list[Exposure]:
        """Exposures of all its places."""
        return [one for place in self.places for row in place.rows for one in row.exposures]

    def facts(self) -> dict[str, Any]:
        """Return keys and values for JSON."""
        return asdict(self)


@dataclass
class Corpus:
    """A data folder that is searched, and the stages that read it; notes of what is not known."""

    manifest: Manifest
    stages: Sequence[Stage]
    notes: list[str] = field(default_factory=list)

    def findings(self, places: Iterable[Place]) -> dict[Place, PlaceFinding]:
        """Look up documents and exposures of places."""
        listed = list(dict.fromkeys(places))
        rows: dict[str, set[int]] = defaultdict(set)
        for place in listed:
            for part in place.rows():
                rows[part.chunk].add(part.row)
        pieces = {chunk: self._pieces(chunk, wanted) for chunk, wanted in rows.items()}

        name = str(self.manifest.folder)
        return {
            place: PlaceFinding(
                name, tuple(self._row(part, pieces[part.chunk]) for part in place.rows())
            )
            for place in listed
        }

    def _row(self, part: Place, pieces: Mapping[int, list[dict[str, Any]]]) -> RowFinding:
        stop = part.start + part.length
        documents = []
        for piece in pieces.get(part.row, ()):
            begin = max(part.start, piece["start"])
            end = min(stop, piece["start"] + piece["length"])
            if begin < end:
                offset = piece["offset"]
                at = None if offset is None else offset + begin - piece["start"]
                named = {key: piece[key] for key in ("subset", "source", "document")}
                named |= {key: piece[key] for key in ("fim", "repeat")}
                documents.append(DocumentPart(**named, offset=at, tokens=end - begin))

        exposures = [one for stage in self.stages for one in stage.exposures(part.chunk, part.row)]
        return RowFinding(
            part.chunk, part.row, part.start, part.length, tuple(documents), tuple(exposures)
        )

    def _pieces(self, chunk: str, rows: set[int]) -> dict[int, list[dict[str, Any]]]:
        try:
            return pieces_of(self.manifest, self.manifest.chunk(chunk), sorted(rows))
        except UserError as error:
            if str(error) not in self.notes:
                self.notes.append(str(error))
            return {}


def findings_of(
    corpora: Sequence[Corpus], found: Sequence[Sequence[TextSpan]], texts: Mapping[TextSpan, str]
) -> list[SpanFinding]:
    """Join the spans that were found in each corpus: only the longest, in the query's order.

    `texts` has the text of each span, where there is a tokenizer.
    """
    longest: dict[tuple[int, int], list[tuple[Corpus, TextSpan]]] = defaultdict(list)
    for corpus, spans in zip(corpora, found, strict=True):
        for span in spans:
            longest[span.first, span.last].append((corpus, span))

    findings: list[SpanFinding] = []
    for first, last in sorted(longest, key=lambda key: (key[0], -key[1])):
        if findings and last <= findings[-1].last:
            continue
        here = longest[first, last]
        places = [
            place for corpus, span in here for place in corpus.findings(span.span.places).values()
        ]
        span = here[0][1]
        count = sum(one.span.count for _, one in here)
        findings.append(
            SpanFinding(
                len(span.ids), first, last, texts.get(span, ""), span.ids, count, tuple(places)
            )
        )
    return findings
