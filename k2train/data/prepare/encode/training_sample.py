"""Sample of a corpus to train a tokenizer on: each text once, bounded, the same everywhere.

- Documents are cut into blocks of about 64 KiB. Of more than `max_bytes`, the blocks with the
  smallest hashes of their text are taken: an even sample in one pass, for any order of files.
- A block that occurs again is left out. Only the hashes of the sample are held for it.
- What takes no part is counted, in documents and bytes.

Alternatives considered:
- The first bytes of the corpus: they would all be of one kind.
- Limits from the sizes of the files: compressed ones hold several times as much.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k2train.data.prepare.field_keys import Matcher
from k2train.data.prepare.recipe import SubsetRecipe
from k2train.data.prepare.source import Contents, Source
from k2train.data.prepare.sources.readers import Document, read_documents
from k2train.data.tokenizer_training import cut_line
from k2train.text import bytes_text, counted

BLOCK_BYTES = 2**16


@dataclass
class Taken:
    """How much of a corpus takes part in training."""

    documents: int
    blocks: int
    size_bytes: int


class TrainingSample:
    """The distinct blocks of smallest hash with at most `max_bytes` together.

    `left_out` counts what could not be used, by noun in the singular and the rest of the phrase.
    `duplicates` are the blocks of the sample that came again, and their bytes.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.documents = self.blocks = self.seen_bytes = self.kept_bytes = 0
        self.duplicates = [0, 0]
        self.left_out: Counter[tuple[str, str]] = Counter()
        # (negative hash, number of the block, number of its document, text)
        self._kept: list[tuple[int, int, int, str]] = []
        self._hashes: set[int] = set()
        self._limit = 2**128

    def read(
        self,
        subset: SubsetRecipe,
        source: Source,
        conditions: Sequence[Mapping[str, Sequence[Any]]] = ({},),
    ) -> None:
        """Offer the texts of a source that meet one of the conditions on their fields.

        Raises DataError for a file that cannot be read.
        """
        if subset.kind == "text":
            self._read_lines(source)
            return

        fields = list(dict.fromkeys(key for where in conditions for key in where))
        matchers = [Matcher(where, fields) for where in conditions]
        reading = read_documents(subset, source, fields)
        for item in reading:
            if isinstance(item, Document):
                if any(matcher.matches(item.fields) for matcher in matchers):
                    self.add(item.text)
            else:
                # Without the place inside of the document, which differs each time.
                self.left_out["broken document", f" ({item.reason.partition(' (')[0]})"] += 1
        self.left_out["empty document", ""] += reading.counts.empty

    def _read_lines(self, source: Source) -> None:
        """Offer a text file line by line, so that a large one is never held."""
        lines: list[str] = []
        size, blank = 0, True
        self.documents += 1
        for content in Contents(source).lines(keep_ends=True):
            try:
                line = content.decode()
            except UnicodeDecodeError:
                self.left_out["line", " that is not UTF-8"] += 1
                blank = False
                continue
            blank = blank and not line.strip()
            for part in cut_line(line, BLOCK_BYTES):
                lines.append(part)
                size += len(part)
                if size >= BLOCK_BYTES:
                    self._offer("".join(lines))
                    lines, size = [], 0

        if blank:
            self.left_out["empty document", ""] += 1
            self.documents -= 1
        elif lines:
            self._offer("".join(lines))

    def add(self, text: str) -> None:
        """Offer a document."""
        self.documents += 1
        for block in blocks_of(text):
            self._offer(block)

    def _offer(self, block: str) -> None:
        content = block.encode()
        self.blocks += 1
        self.seen_bytes += len(content)
        digest = hashlib.sha256(b"k2train tokenizer sample\0" + content).digest()
        rank = int.from_bytes(digest[:16], "big")
        # The limit only falls: a block above it can never be in the sample.
        if rank >= self._limit:
            return
        if rank in self._hashes:
            self.duplicates[0] += 1
            self.duplicates[1] += len(content)
            return

        heapq.heappush(self._kept, (-rank, self.blocks, self.documents, block))
        self._hashes.add(rank)
        self.kept_bytes += len(content)
        while self.kept_bytes > self.max_bytes:
            worst, _, _, dropped = heapq.heappop(self._kept)
            self._limit = -worst
            self._hashes.discard(-worst)
            self.kept_bytes -= len(dropped.encode())

    def texts(self) -> list[str]:
        """The blocks of the sample, in the order in which they came."""
        return [text for _, _, _, text in sorted(self._kept, key=lambda kept: kept[1])]

    @property
    def taken(self) -> Taken:
        """What takes part in training; a document counts when any of its blocks does."""
        documents = len({document for _, _, document, _ in self._kept})
        return Taken(documents, len(self._kept), self.kept_bytes)

    def report(self) -> list[str]:
        """Lines for people: what takes part, and what does not, in documents and bytes."""
        taken, again = self.taken, self.duplicates
        lines = [
            f"tokenizer: trains on {counted(taken.documents, 'document')} of {self.documents:,}, "
            f"{bytes_text(taken.size_bytes)} of {bytes_text(self.seen_bytes)}"
        ]
        parts = [
            counted(count, noun) + rest
            for (noun, rest), count in sorted(self.left_out.items())
            if count
        ]
        if again[0]:
            parts.append(f"{counted(again[0], 'repeated text')} ({bytes_text(again[1])})")
        rest = self.seen_bytes - self.kept_bytes - again[1]
        if rest:
            parts.append(
                f"{bytes_text(rest)} beyond the sample of {bytes_text(self.max_bytes)} (max_bytes)"
            )
        return lines + (
            [f"tokenizer: left out of its training: {', '.join(parts)}"] if parts else []
        )


def blocks_of(text: str) -> Iterator[str]:
    """Cut a document into blocks of whole lines; a longer line is cut at spaces."""
    if 4 * len(text) <= BLOCK_BYTES:
        yield text
        return

    block: list[str] = []
    size = 0
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        ended = line if number == len(lines) else line + "\n"
        for part in cut_line(ended, BLOCK_BYTES):
            block.append(part)
            size += len(part)
            if size >= BLOCK_BYTES:
                yield "".join(block)
                block, size = [], 0
    if block:
        yield "".join(block)
