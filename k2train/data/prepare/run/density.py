"""Tokens in a byte of a corpus, from the heads of a few files: the amounts behind `--estimate`.

- Files are drawn by size, apart for each compression, so a large file counts for what it holds.
- Of a file the head is decompressed, parsed, chosen from and encoded as the preparation does it.
- A compression is measured over more than the encoded head, since it gets better further on. The
  text of a Parquet file is known from its footer.
- Not seen: duplicates, and files that are sorted so that their heads differ from the rest.

Alternatives considered:
- Sizes of files as if they were plain text: 4 times too low for zstd.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePath

from k2train.data.prepare.containers import decompressed, promised_compression
from k2train.data.prepare.field_keys import Matcher
from k2train.data.prepare.recipe import STDLIB_ORIGINS, SubsetRecipe
from k2train.data.prepare.source import Source, first_position, split_position
from k2train.data.prepare.sources.parquet_rows import open_parquet, parquet_rows
from k2train.data.prepare.sources.readers import Document, read_documents
from k2train.data.tokenizer import Tokenizer, is_encodable
from k2train.retry import open_retried

FILES = 8
SMALL_FILES = 32
"""Files to look into, of each compression; more where a file is one document."""
HEAD_BYTES = 2**16
PACKED_BYTES = 2**19
STEP_BYTES = 2**12
LENGTH_BYTES = 4
"""Bytes of a text's length in a Parquet page."""


@dataclass(frozen=True)
class Density:
    """What one pass of a subset holds."""

    tokens: int
    text_bytes: int
    files: int


@dataclass
class _Head:
    """What the head of a file held: all of it, and the part that the subset takes."""

    size_bytes: int = 0
    text_bytes: int = 0
    tokens: int = 0


def subset_density(
    subset: SubsetRecipe, sources: Sequence[Source], tokenizer: Tokenizer
) -> Density:
    """Estimate the tokens and text of one pass from a few of the files.

    Raises DataError for a file that is damaged at its head.
    """
    low, high = map(first_position, subset.share)
    part = subset.documents[1] - subset.documents[0]
    if subset.split_by == "source":
        # The names decide; nothing needs to be estimated.
        sources = [s for s in sources if low <= split_position(s.key) < high]
    else:
        part *= subset.share[1] - subset.share[0]

    groups: dict[tuple[str, str], list[Source]] = {}
    for source in sources:
        promised = promised_compression(source.name)
        kind = PurePath(source.name).suffix.lower()
        groups.setdefault((promised.name if promised else "", kind), []).append(source)

    tokens = text_bytes = 0.0
    files = 0
    for group in groups.values():
        drawn = _drawn(group, FILES if subset.kind in ("jsonl", "parquet") else SMALL_FILES)
        stored = part * sum(source.size_bytes for source in group)
        files += len(drawn)
        for source, weight in drawn.items():
            of_tokens, of_text = _per_stored_byte(subset, source, tokenizer)
            tokens += stored * weight * of_tokens
            text_bytes += stored * weight * of_text
    return Density(round(tokens), round(text_bytes), files)


def _drawn(sources: Sequence[Source], count: int) -> dict[Source, float]:
    """Up to `count` files with their weights, which add up to 1.

    All of a few; of more, those at even distances of bytes, so that chance does not favour small
    files.
    """
    ends = list(accumulate(source.size_bytes for source in sources))
    total = ends[-1]
    if total == 0:
        return {}
    if len(sources) <= count:
        return {s: s.size_bytes / total for s in sources if s.size_bytes}
    found: Counter[Source] = Counter()
    index = 0
    for number in range(count):
        while ends[index] * 2 * count <= (2 * number + 1) * total:
            index += 1
        found[sources[index]] += 1
    return {source: times / count for source, times in found.items()}


def _per_stored_byte(
    subset: SubsetRecipe, source: Source, tokenizer: Tokenizer
) -> tuple[float, float]:
    """Tokens and text in a byte of a file as it is stored, by its head."""
    if subset.kind == "parquet":
        head, whole = _parquet_head(subset, source, tokenizer)
    elif subset.kind == "text":
        head, whole = _text_head(subset, source, tokenizer), _unpacked_bytes(source)
    else:
        head, whole = _document_head(subset, source, tokenizer), _unpacked_bytes(source)
    # Bytes of the head to bytes of the whole file, as stored.
    scale = whole / max(1, head.size_bytes) / max(1, source.size_bytes)
    return head.tokens * scale, head.text_bytes * scale


def _add(head: _Head, subset: SubsetRecipe, texts: Iterable[str], tokenizer: Tokenizer) -> None:
    """Encode the texts that a subset takes; each gets the end of a document."""
    taken = [text for text in texts if len(text) >= subset.min_characters and text.strip()]
    head.text_bytes += sum(len(text.encode()) for text in taken)
    head.tokens += sum(len(ids) + 1 for ids in tokenizer.encode_arrays(taken))


def _document_head(subset: SubsetRecipe, source: Source, tokenizer: Tokenizer) -> _Head:
    """The first documents of JSON lines, or all of a file of the library."""
    fields = list(subset.where)
    matcher, head, taken = Matcher(subset.where, fields), _Head(), []
    reading = read_documents(subset, source, fields)
    whole = subset.kind in STDLIB_ORIGINS
    for item in reading:
        if isinstance(item, Document) and matcher.matches(item.fields):
            taken.append(item.text)
        counts = reading.counts
        # Each line has an end of its own.
        lines = counts.documents + counts.rejected + counts.empty
        head.size_bytes = counts.document_bytes + counts.rejected_bytes + lines
        if head.size_bytes >= HEAD_BYTES and not whole:
            break
    if whole:
        head.size_bytes = source.size_bytes
    _add(head, subset, taken, tokenizer)
    return head


def _text_head(subset: SubsetRecipe, source: Source, tokenizer: Tokenizer) -> _Head:
    """The first lines of a text."""
    content = bytearray()
    for block in decompressed(source.path, _blocks(source)):
        content += block
        if len(content) >= HEAD_BYTES:
            break
    del content[HEAD_BYTES:]
    head = _Head(len(content))
    _add(head, subset, [content.decode("utf-8", "ignore")], tokenizer)
    return head


def _parquet_head(
    subset: SubsetRecipe, source: Source, tokenizer: Tokenizer
) -> tuple[_Head, float]:
    """The first rows of a file, and the bytes of text in all of them, by its footer."""
    fields = list(subset.where)
    matcher, head, taken = Matcher(subset.where, fields), _Head(), []
    for row in parquet_rows(source.path, subset.text_key, None, fields):
        if isinstance(row, UnicodeDecodeError) or not isinstance(row[0], str):
            continue
        if not is_encodable(row[0]):
            continue
        head.size_bytes += len(row[0].encode())
        if matcher.matches(row[2]):
            taken.append(row[0])
        if head.size_bytes >= HEAD_BYTES:
            break
    _add(head, subset, taken, tokenizer)
    return head, _text_column_bytes(source.path, subset.text_key)


def _text_column_bytes(path: str, keys: Sequence[str]) -> float:
    """Bytes of the text columns of a Parquet file before compression, without their lengths."""
    with open_parquet(path) as file:
        metadata, found = file.metadata, 0.0
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            columns = (group.column(index) for index in range(group.num_columns))
            sizes = [c.total_uncompressed_size for c in columns if c.path_in_schema in keys]
            found += max(0, sum(sizes) - LENGTH_BYTES * group.num_rows)
    return found


def _unpacked_bytes(source: Source) -> float:
    """Size of a file when decompressed, by as much of its head as is worth reading."""
    if not source.path:
        return source.size_bytes
    fed = unpacked = at = 0

    def blocks() -> Iterator[bytes]:
        nonlocal fed
        for block in _blocks(source):
            fed += len(block)
            yield block

    for piece in decompressed(source.path, blocks()):
        if piece:
            # What went in and did not come out yet belongs to a later piece.
            unpacked, at = unpacked + len(piece), fed
        if fed >= PACKED_BYTES and unpacked:
            break
    return source.size_bytes * unpacked / max(1, at)


def _blocks(source: Source) -> Iterator[bytes]:
    """A file in small blocks, so that what comes out is known for each of them."""
    with open_retried(Path(source.path)) as stream:
        while block := stream.read(STEP_BYTES):
            yield block
