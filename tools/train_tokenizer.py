"""Train a tokenizer on files: `train_tokenizer.py OUTPUT.model --vocab-size 32000 FILES_OR_GLOBS... [--text-key text]`.

Reads .txt, .md and .py, .jsonl, .jsonl.zst and .parquet as streams, and trains on at most --max-bytes of text: training
holds its text in memory, about 13 times over. Of more, the blocks with the smallest hashes of their names are taken: an
even sample that every machine takes again, in one pass of reading, whatever the order of the files. The first bytes of
the input were refused as a sample: they would all be of one kind. What cannot be read is counted and left out.
"""

import argparse
import glob
import hashlib
import heapq
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from k2train.data.prepare.progress import Progress
from k2train.data.prepare.tokenizer import LONGEST_LINE_BYTES, Tokenizer, train_tokenizer
from k2train.errors import EXIT_DONE, EXIT_USAGE, DataError, UserError

try:
    from pyarrow import ArrowException, parquet
except ImportError:
    parquet, ArrowException = None, OSError

try:
    import zstandard
except ImportError:
    zstandard = None  # type: ignore[assignment]

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.zst", ".parquet")
DEFAULT_MAX_BYTES = 100_000_000
BLOCK_CHARACTERS = 2**16
READ_ROWS = 256


def files_of(patterns: Sequence[str]) -> list[tuple[str, Path]]:
    """(name, path) of every file, sorted by name: its path below the folder that all have in common.

    Raises DataError for a pattern without files, a folder, and a kind of file that is not read.
    """
    found: set[str] = set()
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        files = [match for match in matches if os.path.isfile(match)]
        if not files:
            hint = f" but a folder; give a pattern, as {pattern.rstrip('/')}/**/*.txt" if matches else ""
            raise DataError(f"{pattern}: no file{hint}")
        for file in files:
            if not file.endswith(SUFFIXES):
                raise DataError(f"{file}: is none of the kinds that are read: {' '.join(SUFFIXES)}")
            found.add(os.path.realpath(file))
    common = os.path.commonpath([os.path.dirname(path) for path in found])
    return sorted((Path(path).relative_to(common).as_posix(), Path(path)) for path in found)


def texts_of(path: Path, key: str, left_out: Counter[str]) -> Iterator[str]:
    """Texts of one file: its lines, or what stands under `key` in each of its documents."""
    if path.name.endswith(".parquet"):
        yield from _parquet_texts(path, key, left_out)
        return
    with path.open("rb") as file:
        stream: Any = file
        if path.name.endswith(".zst"):
            if zstandard is None:
                raise UserError(f"{path}: reading it needs zstandard: pip install 'k2train[data]'")
            stream = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
        for line in stream:
            try:
                yield line.decode() if path.name.endswith(TEXT_SUFFIXES) else json.loads(line)[key]
            except UnicodeDecodeError:
                left_out["lines that are not UTF-8"] += 1
            except (json.JSONDecodeError, RecursionError):
                if line.strip():
                    left_out["lines that are not JSON"] += 1
            except (KeyError, TypeError):
                left_out[f"documents without the key {key!r}"] += 1


def _parquet_texts(path: Path, key: str, left_out: Counter[str]) -> Iterator[str]:
    if parquet is None:
        raise UserError(f"{path}: reading it needs pyarrow: pip install 'k2train[data]'")
    with parquet.ParquetFile(path) as table:
        if key not in table.schema_arrow.names:
            raise DataError(f"{path}: has no column {key!r} but {', '.join(table.schema_arrow.names)}: set --text-key")
        for batch in table.iter_batches(READ_ROWS, columns=[key]):
            for text in batch.column(0).to_pylist():
                if text is None:
                    left_out[f"documents without the key {key!r}"] += 1
                else:
                    yield text


def blocks_of(path: Path, key: str, left_out: Counter[str]) -> Iterator[str]:
    """The file's text in blocks of whole lines, of about 64 Ki characters or a document: what is sampled."""
    lines_only = path.name.endswith(TEXT_SUFFIXES)
    block: list[str] = []
    size = 0
    for text in texts_of(path, key, left_out):
        if not isinstance(text, str):
            left_out[f"documents whose {key!r} is no text"] += 1
            continue
        for line in text.splitlines(keepends=True) if len(text) > BLOCK_CHARACTERS else (text,):
            block.append(line)
            size += len(line)
            if size >= BLOCK_CHARACTERS:
                yield "".join(block)
                block, size = [], 0
        if not lines_only and block:
            yield "".join(block)
            block, size = [], 0
    if block:
        yield "".join(block)


class Sample:
    """The blocks of smallest hash that hold at most `max_bytes` together; equal for any order of `add`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.seen_bytes = self.kept_bytes = self.seen = 0
        self._kept: list[tuple[int, str, int, str]] = []
        self._limit = 2**64

    def add(self, name: str, number: int, text: str) -> None:
        size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        self.seen += 1
        self.seen_bytes += size
        digest = hashlib.sha256(f"k2train tokenizer sample\0{name}\0{number}".encode("utf-8", "surrogatepass"))
        rank = int.from_bytes(digest.digest()[:8], "big")
        if rank >= self._limit:
            return
        heapq.heappush(self._kept, (-rank, name, number, text))
        self.kept_bytes += size
        while self.kept_bytes > self.max_bytes:
            worst, _, _, dropped = heapq.heappop(self._kept)
            self._limit = -worst
            self.kept_bytes -= len(dropped.encode("utf-8", "surrogatepass"))

    def texts(self) -> list[str]:
        """The kept blocks, in the order of the files."""
        return [text for _, _, _, text in sorted(self._kept, key=lambda kept: kept[1:3])]


def read_sample(files: Sequence[tuple[str, Path]], key: str, max_bytes: int, left_out: Counter[str]) -> Sample:
    """Read every file once. Raises DataError for a file that cannot be read, and when no text is found."""
    sample = Sample(max_bytes)
    unreadable = (OSError, ArrowException, *([zstandard.ZstdError] if zstandard else []))
    for name, path in Progress().over("read", files, unit="files"):
        try:
            for number, block in enumerate(blocks_of(path, key, left_out)):
                sample.add(name, number, block)
        except unreadable as error:
            raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not sample.kept_bytes:
        why = f"; left out: {told(left_out)}" if left_out else ""
        raise DataError(f"{len(files)} files hold no text to train on within --max-bytes {max_bytes}{why}")
    return sample


def told(left_out: Counter[str]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in sorted(left_out.items()))


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str], text_bytes: int) -> float:
    return text_bytes / sum(len(ids) for text in texts for ids in tokenizer.encode_arrays([text]))


def train(given: argparse.Namespace) -> None:
    """Train, save and tell. Raises UserError."""
    output: Path = given.output
    if output.exists() and not given.force:
        raise UserError(
            f"{output}: exists; --force replaces it, and data prepared with it then belongs to no tokenizer"
        )
    begun = time.monotonic()
    files = files_of(given.files)
    left_out: Counter[str] = Counter()
    sample = read_sample(files, given.text_key, given.max_bytes, left_out)
    texts = sample.texts()
    whole = len(texts) == sample.seen
    print(f"read {len(files):,} files, {sample.seen_bytes:,} bytes of text in {sample.seen:,} blocks")
    part = (
        "all" if whole else f"{len(texts):,} blocks, {sample.kept_bytes:,} bytes, those of smallest hash by file name"
    )
    print(f"trained on {part} (--max-bytes {given.max_bytes:,})", flush=True)
    long = sum(len(line.encode("utf-8", "replace")) > LONGEST_LINE_BYTES for text in texts for line in text.split("\n"))
    if long:
        left_out[f"lines above {LONGEST_LINE_BYTES} bytes"] = long
    if left_out:
        print(f"left out: {told(left_out)}")
    try:
        tokenizer = train_tokenizer(texts, given.vocab_size)
        tokenizer.save(output)
    except DataError as error:
        raise DataError(str(error).replace("tokenizer.train.vocab_size", "--vocab-size")) from None
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None
    ratio = bytes_per_token(tokenizer, [text.encode("utf-8", "ignore").decode() for text in texts], sample.kept_bytes)
    print(f"{output}: {tokenizer.base_size:,} pieces and {len(tokenizer.specials)} special tokens behind them")
    print(f"{ratio:.3f} bytes a token on the text it was trained on, {time.monotonic() - begun:.1f} s in all")
    print(f"sha256 {tokenizer.sha256} (the pieces and the special tokens: the tokenizer_sha256 of a manifest)")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="train_tokenizer.py", description="Train a tokenizer on files.")
    parser.add_argument("output", metavar="OUTPUT.model", type=Path)
    parser.add_argument("files", nargs="+", metavar="FILE_OR_GLOB", help=f"kinds: {' '.join(SUFFIXES)}; ** goes deep")
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces; the special tokens come on top")
    parser.add_argument("--text-key", default="text", help="key or column of the text in .jsonl and .parquet")
    parser.add_argument("--max-bytes", type=int, default=DEFAULT_MAX_BYTES, help="text to train on; of more, a sample")
    parser.add_argument("--force", action="store_true", help="replace OUTPUT.model")
    try:
        train(parser.parse_args(arguments))
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
