"""Verbatim search: which documents a text is from, and in which steps a run trained on them.

    python tools/trace.py RUN --text FILE                    longest spans, documents and steps
    python tools/trace.py RUN --tokens FILE                  the same of token ids, a JSON list
    python tools/trace.py RUN --stdin                        the same of text on standard input
    python tools/trace.py RUN --items FILE [--key KEY]       which items of an evaluation occur
    python tools/trace.py index RUN [--folder F] [--check]   build the index ahead, or check it

- RUN is a run directory, or a data folder: then there are places, but no steps.
- The index is built on demand, once, into `trace_index` in the data folder. The data folders of
  earlier stages are searched, too, where they can be read.
- Needs no torch.

Exit codes: 0 done; 2 an error in usage, data or run, one line on stderr.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from command_line import Parser, command, positive
from recorded_run import corpora_of, indexes_of

from k2train.data.inspect.account import find_tokenizer
from k2train.data.tokenizer import Tokenizer
from k2train.data.trace.findings import Corpus, SpanFinding, findings_of
from k2train.data.trace.items import (
    ITEM_TOKENS,
    ItemFinding,
    facts_of,
    item_finding,
    read_items,
    summary_of,
)
from k2train.data.trace.query import Spelling, TextSpan, search_texts, search_tokens, spellings_of
from k2train.data.trace.report import item_lines, span_lines
from k2train.data.trace.spans import Searcher
from k2train.errors import EXIT_DONE, DataError, UserError
from k2train.retry import retried
from k2train.text import counted

SPAN_TOKENS = 8
MOST_PLACES = 10


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    if arguments[:1] == ["index"]:
        return build(_index_options(arguments[1:]))
    options = _options(arguments)
    search = Search.open(options)
    lines = search.items(options) if options.items else search.spans(options)
    print("\n".join(lines))
    for note in search.notes:
        _tell(f"note: {note}")
    return EXIT_DONE


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="trace",
        description="Find which documents a text is from, and in which steps a run read them.",
        epilog="`trace.py index RUN` builds the index ahead.",
    )
    _add_place(parser)
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", type=Path, metavar="FILE", help="a file of text")
    query.add_argument("--tokens", type=Path, metavar="FILE", help="token ids as a JSON list")
    query.add_argument("--stdin", action="store_true", help="text from standard input")
    query.add_argument(
        "--items", type=Path, metavar="FILE", help="evaluation items, a JSON object a line"
    )
    parser.add_argument("--key", default="text", help="key of an item's text (default: text)")
    parser.add_argument(
        "--min-tokens",
        type=positive,
        metavar="N",
        help=f"shortest span (default: {SPAN_TOKENS}; of items {ITEM_TOKENS})",
    )
    parser.add_argument(
        "--places",
        type=positive,
        default=MOST_PLACES,
        metavar="N",
        help=f"places shown of each span, lines of the table of items (default: {MOST_PLACES})",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="MODEL", help="if the folder of the data has none"
    )
    parser.add_argument(
        "--across-documents",
        action="store_true",
        help="with --tokens: spans may go on behind a </s>",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser.parse_args(arguments)


def _index_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="trace index", description="Build the index of a run's data, or check it.")
    _add_place(parser)
    parser.add_argument("--check", action="store_true", help="also hash what is there")
    return parser.parse_args(arguments)


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, or a data folder")
    parser.add_argument("--data", type=Path, help="the run's data folder, if it has moved")
    parser.add_argument(
        "--folder", type=Path, metavar="F", help="where the index is (default: in the data folder)"
    )


@dataclass(frozen=True)
class Search:
    """What is searched: the corpora of a run's stages, each with its index."""

    corpora: list[Corpus]
    searchers: list[Searcher]
    tokenizer: Tokenizer | None
    earlier: list[str]

    @classmethod
    def open(cls, options: argparse.Namespace) -> "Search":
        """Open the data of the options, and build the indexes that are missing."""
        corpora, notes = corpora_of(options.run, options.data)
        searchers = [Searcher(one) for one in indexes_of(corpora, options.folder)]
        tokenizer = find_tokenizer(corpora[0].manifest, options.tokenizer)
        return cls(corpora, searchers, tokenizer, notes)

    @property
    def notes(self) -> list[str]:
        """What is not known or was not searched."""
        found = [*self.earlier]
        for corpus, searcher in zip(self.corpora, self.searchers, strict=True):
            found += corpus.notes
            if isinstance(why := searcher.index.borders, str):
                found.append(why)
            for stage in corpus.stages:
                if damaged := sum(stage.damaged):
                    found.append(f"{stage.run.name}: {damaged} damaged lines of metrics left out")
        return found

    def spans(self, options: argparse.Namespace) -> Iterator[str]:
        """Search one query; yield what is printed."""
        least, most = options.min_tokens or SPAN_TOKENS, options.places
        if options.tokens:
            unit, findings = "tokens", self._token_spans(options, least, most)
        else:
            unit = "bytes"
            text = _read_text(options)
            findings = self._text_spans(
                [spellings_of(self._needs_tokenizer(), [text])[0]], *(least, most)
            )[0]

        if options.json:
            yield from (json.dumps(one.facts(), ensure_ascii=False) for one in findings)
        elif not findings:
            yield f"no span of at least {least} tokens is in {self._names()}"
        else:
            for index, one in enumerate(findings, 1):
                yield from span_lines(index, one, unit)

    def items(self, options: argparse.Namespace) -> Iterator[str]:
        """Search evaluation items; yield what is printed."""
        least, texts = options.min_tokens or ITEM_TOKENS, read_items(options.items, options.key)
        spellings = spellings_of(self._needs_tokenizer(), texts)
        found = self._text_spans(spellings, least, options.places)
        items: list[ItemFinding] = [
            item_finding(number, text, spelled[0], spans)
            for number, (text, spelled, spans) in enumerate(
                zip(texts, spellings, found, strict=True), 1
            )
        ]
        if options.json:
            yield from (json.dumps(facts_of(item), ensure_ascii=False) for item in items)
        else:
            yield from item_lines(items, summary_of(items, least), options.places)

    def _text_spans(
        self, texts: Sequence[Sequence[Spelling]], least: int, most: int
    ) -> list[list[SpanFinding]]:
        found = [search_texts(searcher, texts, least, most) for searcher in self.searchers]
        return [self._findings([spans[number] for spans in found]) for number in range(len(texts))]

    def _token_spans(self, options: argparse.Namespace, least: int, most: int) -> list[SpanFinding]:
        tokens = _read_tokens(options.tokens)
        return self._findings(
            [
                search_tokens(one, tokens, least, most, options.across_documents)
                for one in self.searchers
            ]
        )

    def _findings(self, found: Sequence[Sequence[TextSpan]]) -> list[SpanFinding]:
        decode = self.tokenizer
        texts = (
            {span: decode.decode(span.ids) for spans in found for span in spans} if decode else {}
        )
        return findings_of(self.corpora, found, texts)

    def _needs_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(
                f"{self._names()} has no tokenizer.model with the hash of the data; give one as "
                "--tokenizer MODEL, or token ids with --tokens"
            )
        return self.tokenizer

    def _names(self) -> str:
        return " and ".join(str(corpus.manifest.folder) for corpus in self.corpora)


def build(options: argparse.Namespace) -> int:
    """Build or check the index."""
    corpora, notes = corpora_of(options.run, options.data)
    for one in indexes_of(corpora, options.folder, options.check):
        print(
            f"{one.folder}: {one.tokens:,} tokens in {counted(len(one.parts), 'part')}, "
            f"{one.bytes:,} bytes"
        )
    for note in notes:
        _tell(f"note: {note}")
    return EXIT_DONE


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def _read_text(options: argparse.Namespace) -> str:
    path = options.text
    try:
        content = sys.stdin.buffer.read() if path is None else retried(path.read_bytes, path)
        return bytes(content).decode()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path or 'standard input'}: is not UTF-8 (byte {error.start})") from None


def _read_tokens(path: Path) -> list[int]:
    try:
        tokens = json.loads(retried(path.read_bytes, path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        tokens = None
    if not isinstance(tokens, list) or not all(type(one) is int and one >= 0 for one in tokens):
        raise DataError(f"{path}: must hold a JSON list of token ids, as [12, 7, 2041]")
    return tokens


if __name__ == "__main__":
    sys.exit(main())
