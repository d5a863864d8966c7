"""Verbatim spans of answers in the training data, for the pages: the longest, and who read them.

- Searched with the index that `tools/trace.py` builds. Without one there is nothing here.
- Each distinct text is searched once, many in one pass. The outcome is kept in the run, until the
  data or the record of a run that read them has changed.
- Positions are UTF-16 units of the answer, as a browser counts them.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from k2train.data.tokenizer import Tokenizer
from k2train.data.trace.build import has_index, open_index
from k2train.data.trace.findings import Corpus, RowFinding, SpanFinding, findings_of
from k2train.data.trace.query import search_texts, spellings_of
from k2train.data.trace.report import exposure_text
from k2train.data.trace.spans import Searcher
from k2train.files import sha256_file, write_synced
from k2train.gallery.answers import FOLDER
from k2train.retry import is_file_retried
from k2train.safe_json import read_json

KEPT = "verbatim.json"
SPAN_TOKENS = 8
MOST_SPANS, MOST_PLACES, MOST_USES = 3, 2, 3
"""Of an answer, of a span, of a row: what a page shows."""
TEXTS_AT_ONCE = 256

Facts = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """The data folders that a run's weights were trained on, each with its index."""

    corpora: Sequence[Corpus]
    tokenizer: Tokenizer

    def identity(self) -> str:
        """Hash of what a search depends on: data, and the record of the runs that read them."""
        parts = [str(SPAN_TOKENS)]
        for corpus in self.corpora:
            parts.append(corpus.manifest.sha256)
            for stage in corpus.stages:
                files = (stage.run.directory / n for n in ("ledger.jsonl", "metrics.jsonl"))
                parts += [sha256_file(path) for path in files if is_file_retried(path)]
        return sha256("\n".join(parts).encode()).hexdigest()


def indexed(corpora: Sequence[Corpus], folder: Path | None = None) -> bool:
    """Return whether the data of all stages have an index already."""
    return all(has_index(corpus.manifest, folder) for corpus in corpora)


def verbatim_spans(run: Path, data: Data, texts: Iterable[str]) -> dict[str, list[Facts]]:
    """Return the spans of each text that are in the data; an empty list where none is.

    Raises DataError for data that were changed since they were indexed, OSError.
    """
    path, identity = run / FOLDER / KEPT, data.identity()
    kept = _kept(path, identity)
    wanted = {_name(text): text for text in texts if _is_unicode(text)}
    lacking = [name for name in wanted if name not in kept]
    if lacking:
        searchers = [Searcher(open_index(corpus.manifest)) for corpus in data.corpora]
        for start in range(0, len(lacking), TEXTS_AT_ONCE):
            names = lacking[start : start + TEXTS_AT_ONCE]
            found = _search(data, searchers, [wanted[name] for name in names])
            kept |= dict(zip(names, found, strict=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(path, json.dumps({"identity": identity, "texts": kept}) + "\n")
    return {text: kept[name] for name, text in wanted.items()}


def _search(data: Data, searchers: Sequence[Searcher], texts: Sequence[str]) -> list[list[Facts]]:
    spellings = spellings_of(data.tokenizer, texts)
    found = [search_texts(one, spellings, SPAN_TOKENS, MOST_PLACES) for one in searchers]
    return [
        _facts(text, findings_of(data.corpora, [spans[number] for spans in found], {}))
        for number, text in enumerate(texts)
    ]


def _facts(text: str, spans: Sequence[SpanFinding]) -> list[Facts]:
    longest = sorted(spans, key=lambda span: (-span.tokens, span.first))[:MOST_SPANS]
    content = text.encode()
    return [
        {
            "tokens": span.tokens,
            "first": _utf16_units(content[: span.first]),
            "last": _utf16_units(content[: span.last]),
            "count": span.count,
            "places": [_row(place.rows[0], place.data) for place in span.places[:MOST_PLACES]],
        }
        for span in longest
    ]


def _row(row: RowFinding, data: str) -> Facts:
    documents = [f"{p.subset or '-'}: {p.source}:{p.document}" for p in row.documents if p.document]
    uses = [exposure_text(one) for one in row.exposures]
    return {
        "chunk": row.chunk,
        "row": row.row,
        # Its last names: a page may be published, the paths of a machine are its own.
        "data": "/".join(Path(data).parts[-2:]),
        "documents": documents[:MOST_PLACES],
        "uses": uses[:MOST_USES],
    }


def _utf16_units(begin: bytes) -> int:
    # A span may begin inside a character that the vocabulary spells in bytes.
    return len(begin.decode(errors="ignore").encode("utf-16-le")) // 2


def _is_unicode(text: str) -> bool:
    """Return whether a text can be in the data: it has no lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _name(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _kept(path: Path, identity: str) -> dict[str, list[Facts]]:
    """Return what an earlier search found, if it holds still."""
    if not is_file_retried(path):
        return {}
    try:
        content = read_json(path)
        right = isinstance(content, dict) and content.get("identity") == identity
        return dict(content["texts"]) if right else {}
    except (OSError, ValueError, KeyError, TypeError):
        # It is only a cache: what cannot be read is searched again.
        return {}
