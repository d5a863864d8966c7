"""Tokenizer training on text files: an even sample of their blocks, then sentencepiece BPE.

    python tools/train_tokenizer.py OUTPUT.model --vocab-size 32000 FILES_OR_GLOBS...
                                    [--text-key text ...] [--max-bytes N]

- Reads .txt, .md, .py and .jsonl, each also as .gz and .zst, and .parquet, as streams.
- With several text keys, the first that a document has is taken (of .parquet: that a file has).
- Trains on at most --max-bytes of text, because training needs about 13 times its text in memory.
- Of more text, the blocks with the smallest hashes of their names are taken. This is an even
  sample, equal on every machine and for any order of files, in one pass of reading.
- Text that cannot be read is counted and skipped.

Alternatives considered:
- The first bytes of the input as sample: they would all be of one kind.
"""

import argparse
import glob
import hashlib
import heapq
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from command_line import Parser, command

from k2train.data.prepare.progress import Progress
from k2train.data.prepare.source import Contents, Source
from k2train.data.tokenizer import Tokenizer, is_encodable
from k2train.data.tokenizer_training import LONGEST_LINE_BYTES, train_tokenizer
from k2train.errors import EXIT_DONE, DataError, UserError
from k2train.text import counted

try:
    from pyarrow import ArrowException, parquet
except ImportError:
    parquet, ArrowException = None, OSError

TEXT_KINDS = (".txt", ".md", ".py")
PACKED = ("", ".gz", ".zst")
TEXT_SUFFIXES = tuple(kind + packed for kind in TEXT_KINDS for packed in PACKED)
SUFFIXES = (*TEXT_SUFFIXES, *(f".jsonl{packed}" for packed in PACKED), ".parquet")
KINDS = f"{' '.join(TEXT_KINDS)} .jsonl (each also .gz or .zst), .parquet"
DEFAULT_MAX_BYTES = 100_000_000
BLOCK_CHARACTERS = 2**16
READ_ROWS = 256

Skipped = Counter[tuple[str, str]]
"""Number of skipped items by (noun in the singular, rest of the phrase)."""


def files_of(patterns: Sequence[str]) -> list[tuple[str, Path]]:
    """List (name, path) of every file, sorted by name: its path below the common folder.

    Raises DataError for a pattern without files, a folder, and an unsupported kind of file.
    """
    found: set[str] = set()
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        files = [match for match in matches if os.path.isfile(match)]

        if not files:
            hint = (
                f" but a folder; give a pattern, as {pattern.rstrip('/')}/**/*.txt"
                if matches
                else ""
            )
            raise DataError(f"{pattern}: no file{hint}")

        for file in files:
            if not file.endswith(SUFFIXES):
                raise DataError(f"{file}: unsupported kind of file; supported: {KINDS}")
            found.add(os.path.realpath(file))

    # Names are relative, so that the sample is the same on every machine.
    common = os.path.commonpath([os.path.dirname(path) for path in found])
    return sorted((Path(path).relative_to(common).as_posix(), Path(path)) for path in found)


def texts_of(path: Path, keys: Sequence[str], skipped: Skipped) -> Iterator[Any]:
    """Yield the texts of one file.

    These are its lines, or the value of the first of `keys` in each document.
    """
    if path.name.endswith(".parquet"):
        yield from _parquet_texts(path, keys, skipped)
        return

    lines = Contents(Source("", path.name, str(path), path.stat().st_size)).lines()

    if path.name.endswith(TEXT_SUFFIXES):
        for line in lines:
            try:
                yield line.decode() + "\n"
            except UnicodeDecodeError:
                skipped["line", " without valid UTF-8"] += 1
        return

    for line in lines:
        try:
            item = json.loads(line)
            yield item[next(key for key in keys if key in item)]
        except UnicodeDecodeError:
            skipped["line", " without valid UTF-8"] += 1
        except (json.JSONDecodeError, RecursionError):
            if line.strip():
                skipped["line", " without valid JSON"] += 1
        except (StopIteration, TypeError):
            skipped["document", f" without the key {named(keys)}"] += 1


def named(keys: Sequence[str]) -> str:
    """Format keys as `'a' or 'b'`."""
    return " or ".join(map(repr, keys))


def _parquet_texts(path: Path, keys: Sequence[str], skipped: Skipped) -> Iterator[Any]:
    if parquet is None:
        raise UserError(f"{path}: reading it needs pyarrow: pip install 'k2train[data]'")

    with parquet.ParquetFile(path) as table:
        columns = table.schema_arrow.names
        key = next((key for key in keys if key in columns), None)
        if key is None:
            raise DataError(
                f"{path}: has no column {named(keys)}; its columns are {', '.join(columns)}: set "
                "--text-key"
            )

        for batch in table.iter_batches(READ_ROWS, columns=[key]):
            for text in batch.column(0).to_pylist():
                if text is None:
                    skipped["document", f" without the key {named(keys)}"] += 1
                else:
                    yield text


def documents_of(path: Path, keys: Sequence[str], skipped: Skipped) -> Iterator[str]:
    """Yield the texts that can be trained on: not empty, and valid Unicode."""
    for text in texts_of(path, keys, skipped):
        if not isinstance(text, str):
            skipped["document", f" whose {named(keys)} is not text"] += 1
        elif not text.strip():
            skipped["empty document", ""] += 1
        elif not is_encodable(text):
            skipped["document", " without valid Unicode"] += 1
        else:
            yield text


def blocks_of(path: Path, keys: Sequence[str], skipped: Skipped) -> Iterator[str]:
    """Yield the units of sampling: blocks of whole lines.

    A block has about 64 Ki characters, or is one document.
    """
    lines_only = path.name.endswith(TEXT_SUFFIXES)
    block: list[str] = []
    size, empty = 0, True

    for text in (texts_of if lines_only else documents_of)(path, keys, skipped):
        empty = empty and not text.strip()
        for line in text.splitlines(keepends=True) if len(text) > BLOCK_CHARACTERS else (text,):
            block.append(line)
            size += len(line)
            if size >= BLOCK_CHARACTERS:
                yield "".join(block)
                block, size = [], 0
        if not lines_only and block:
            yield "".join(block)
            block, size = [], 0

    if lines_only and empty:
        skipped["empty file", ""] += 1
    elif block:
        yield "".join(block)


class Sample:
    """The blocks of smallest hash with at most `max_bytes` together.

    Equal for any order of `add`.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.seen_bytes = self.kept_bytes = self.seen = 0
        self._kept: list[tuple[int, str, int, str]] = []
        self._limit = 2**64

    def add(self, name: str, number: int, text: str) -> None:
        """Offer a block to the sample."""
        size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        self.seen += 1
        self.seen_bytes += size
        digest = hashlib.sha256(
            f"k2train tokenizer sample\0{name}\0{number}".encode("utf-8", "surrogatepass")
        )
        rank = int.from_bytes(digest.digest()[:8], "big")

        # The limit only falls: a block above it can never be in the sample.
        if rank >= self._limit:
            return
        heapq.heappush(self._kept, (-rank, name, number, text))
        self.kept_bytes += size

        while self.kept_bytes > self.max_bytes:
            worst, _, _, dropped = heapq.heappop(self._kept)
            self._limit = -worst
            self.kept_bytes -= len(dropped.encode("utf-8", "surrogatepass"))

    def texts(self) -> list[str]:
        """The kept blocks in the order of the files."""
        return [text for _, _, _, text in sorted(self._kept, key=lambda kept: kept[1:3])]


def read_sample(
    files: Sequence[tuple[str, Path]], keys: Sequence[str], max_bytes: int, skipped: Skipped
) -> Sample:
    """Read every file once and sample its blocks.

    Raises DataError for a file that cannot be read, and when no text is found.
    """
    sample = Sample(max_bytes)
    unit = "files" if len(files) != 1 else "file"
    for name, path in Progress(sys.stderr).track("read", files, unit=unit):
        try:
            for number, block in enumerate(blocks_of(path, keys, skipped)):
                sample.add(name, number, block)
        except (OSError, ArrowException) as error:
            raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None

    if sample.seen and not sample.kept_bytes:
        raise DataError(
            f"--max-bytes ({max_bytes}) is less than any of {counted(sample.seen, 'block')} of "
            "text: raise it"
        )
    if not sample.kept_bytes:
        why = f"; skipped: {skipped_text(skipped)}" if skipped else ""
        raise DataError(f"no text to train on in {counted(len(files), 'file')}{why}")
    return sample


def skipped_text(skipped: Skipped) -> str:
    """Format the counts of skipped items."""
    return ", ".join(counted(count, what) + rest for (what, rest), count in sorted(skipped.items()))


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str], text_bytes: int) -> float:
    """UTF-8 bytes per token over `texts`."""
    return text_bytes / sum(len(ids) for text in texts for ids in tokenizer.encode_arrays([text]))


def train(given: argparse.Namespace) -> None:
    """Train and save the tokenizer, and print a report. Raises UserError."""
    output: Path = given.output
    if output.exists() and not given.force:
        raise UserError(
            f"{output}: exists; --force replaces it, and data prepared with it then has no "
            "tokenizer"
        )

    begun = time.monotonic()
    files = files_of(given.files)
    skipped: Skipped = Counter()
    sample = read_sample(files, given.text_key, given.max_bytes, skipped)
    texts = sample.texts()
    whole = len(texts) == sample.seen

    print(
        f"read {counted(len(files), 'file')}, {sample.seen_bytes:,} bytes of text in "
        f"{counted(sample.seen, 'block')}"
    )
    kept = f"{counted(len(texts), 'block')}, {sample.kept_bytes:,} bytes"
    part = "all" if whole else f"{kept}, those of smallest hash by file name"
    print(f"trained on {part} (--max-bytes {given.max_bytes:,})", flush=True)

    # The trainer skips these lines without a word.
    long = sum(
        len(line.encode("utf-8", "replace")) > LONGEST_LINE_BYTES
        for text in texts
        for line in text.split("\n")
    )

    if long:
        skipped["line", f" above {LONGEST_LINE_BYTES} bytes"] = long
    if skipped:
        print(f"skipped: {skipped_text(skipped)}")

    try:
        tokenizer = train_tokenizer(texts, given.vocab_size)
        tokenizer.save(output)
    except DataError as error:
        raise DataError(str(error).replace("tokenizer.train.vocab_size", "--vocab-size")) from None
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None

    ratio = bytes_per_token(
        tokenizer, [text.encode("utf-8", "ignore").decode() for text in texts], sample.kept_bytes
    )
    print(
        f"{output}: {tokenizer.base_size:,} pieces, then {len(tokenizer.specials)} special tokens"
    )
    print(
        f"{ratio:.3f} bytes per token on its training text, {time.monotonic() - begun:.1f} s in all"
    )
    print(
        f"sha256 {tokenizer.sha256} (the pieces and the special tokens: the tokenizer_sha256 of a "
        "manifest)"
    )


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and check the command line; exits with one line on an error."""
    parser = Parser(prog="train_tokenizer", description="Train a tokenizer on files.")
    add = parser.add_argument
    add("output", metavar="OUTPUT.model", type=Path)
    add(
        "files",
        nargs="+",
        metavar="FILE_OR_GLOB",
        help=f"kinds: {KINDS}; ** matches subfolders; before --text-key",
    )
    add(
        "--vocab-size", type=int, required=True, help="number of pieces, without the special tokens"
    )
    add(
        "--text-key",
        nargs="+",
        action="extend",
        help="keys or columns of the text; the first that exists is used (text)",
    )
    add(
        "--max-bytes",
        type=int,
        default=DEFAULT_MAX_BYTES,
        help="bytes of text to train on; of more, a sample",
    )
    add("--force", action="store_true", help="replace OUTPUT.model")
    given = parser.parse_args(arguments)

    given.text_key = given.text_key or ["text"]
    for name in ("vocab_size", "max_bytes"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} ({getattr(given, name)}) must be at least 1")

    if files := [key for key in given.text_key if os.path.exists(key) and key.endswith(SUFFIXES)]:
        parser.error(f"--text-key: {files[0]} is a file; name the files before --text-key")
    return given


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    train(options_of(arguments))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
