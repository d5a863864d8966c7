"""File formats told by their first bytes: what cannot be read is refused before anything is read.

- Compressed files are looked into, so a tar or a JSON array inside of one is found, too.
- All files of a recipe are looked at first, and the first few bad ones are named at once.

Alternatives considered:
- Reading such a file as broken lines: a compressed file has few of them, and its documents vanished
  below `max_rejected_share`.
"""

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from k2train.data.prepare.containers import (
    Compression,
    broken_promise,
    compression_of,
    decompressed,
    promised_compression,
)
from k2train.data.prepare.recipe import STDLIB_ORIGINS, Recipe
from k2train.data.prepare.source import Source
from k2train.errors import DataError
from k2train.retry import open_retried

HEAD_BYTES = 2**12
# A block of bzip2 must be read whole before it gives a byte: 900 kB, here as large as it may be.
MAX_PACKED_BYTES = 2**21
STEP_BYTES = 2**16
# Opening files is waiting; a corpus on a network has many.
OPENED_AT_ONCE = 16
NAMED_FILES = 5

UNPACK = "unpack it, or pack it as .zst or .gz"
CONVERT = "convert it to jsonl or Parquet"
FETCH = "fetch it again"
RECODE = "convert it to UTF-8, as with iconv"

PARQUET = "Parquet"
LFS = "a Git LFS pointer, not the file itself"
FORMATS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x04\x22\x4d\x18", "lz4", UNPACK),
    (0, b"\x02\x21\x4c\x18", "lz4", UNPACK),
    (0, b"\x5d\x00\x00", "lzma (not xz)", UNPACK),
    (0, b"\x1f\x9d", "compress (.Z)", UNPACK),
    (0, b"\xff\x06\x00\x00sNaPpY", "snappy", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "7z archive", UNPACK),
    (0, b"Rar!\x1a\x07", "rar archive", UNPACK),
    (0, b"PK\x03\x04", "zip archive", UNPACK),
    (257, b"ustar", "tar archive", "unpack it into its files"),
    (0, b"PAR1", PARQUET, "give it a subset of kind parquet"),
    (0, b"PARE", "encrypted Parquet", "decrypt it"),
    (0, b"ARROW1", "Arrow IPC (Feather)", CONVERT),
    (0, b"FEA1", "Feather", CONVERT),
    (0, b"\xff\xff\xff\xff", "an Arrow stream", CONVERT),
    (0, b"Obj\x01", "Avro", CONVERT),
    (0, b"ORC", "ORC", CONVERT),
    (0, b"\x89HDF\r\n", "HDF5", CONVERT),
    (0, b"\x93NUMPY", "a NumPy array", CONVERT),
    (0, b"%PDF-", "PDF", CONVERT),
    (0, b"SQLite format 3\0", "a SQLite database", CONVERT),
    (0, b"version https://git-lfs", LFS, "fetch it with git lfs pull"),
    (0, codecs.BOM_UTF32_LE, "UTF-32", RECODE),
    (0, codecs.BOM_UTF32_BE, "UTF-32", RECODE),
    (0, codecs.BOM_UTF16_LE, "UTF-16", RECODE),
    (0, codecs.BOM_UTF16_BE, "UTF-16", RECODE),
)
"""Offset and bytes that tell a format, its name, and what to do with it. The first one counts."""


def check_formats(recipe: Recipe, listing: Mapping[str, Sequence[Source]]) -> None:
    """Raises DataError that names the files of a recipe which cannot be read by their kind."""
    # A file of several subsets is looked at once, for the first of them.
    wanted: dict[tuple[str, str], str] = {}
    for name, sources in listing.items():
        kind = recipe.subsets[name].kind
        if kind not in STDLIB_ORIGINS:
            for source in sources:
                wanted.setdefault((source.path, kind), f"subsets.{name}.paths: ")
    check_files([(path, kind, where) for (path, kind), where in wanted.items()])


def check_files(files: Sequence[tuple[str, str, str]]) -> None:
    """Raises DataError that names the first files (path, kind, words in front) that are refused."""
    with ThreadPoolExecutor(min(OPENED_AT_ONCE, max(1, len(files)))) as threads:
        found = threads.map(lambda file: problem_of(file[0], file[1]), files)
        problems = [
            f"{where}{path}: {problem}"
            for (path, _, where), problem in zip(files, found, strict=True)
            if problem
        ]

    if len(problems) > NAMED_FILES:
        problems[NAMED_FILES:] = [
            f"{len(problems)} of {len(files)} files cannot be read; these are the first"
        ]
    if problems:
        raise DataError("\n".join(problems))


def problem_of(path: str, kind: str) -> str:
    """Why a file is not one of its kind (jsonl, parquet or text), by its head; "" when it may be.

    Raises DataError for a compressed file that is cut off or damaged there.
    """
    try:
        with open_retried(Path(path)) as stream:
            head = stream.read(HEAD_BYTES)
            compression = compression_of(head)
            promised = promised_compression(path)
            if kind == "parquet":
                return _parquet_problem(head, compression)
            if compression is None:
                return broken_promise(promised, head) if promised else _plain_problem(head, kind)
            inside = _unpacked_head(path, chain([head], iter(lambda: stream.read(STEP_BYTES), b"")))
    except OSError as error:
        return f"cannot be read ({error.strerror}); it existed when the sources were listed"
    except DataError as error:
        return str(error).removeprefix(f"{path}: ")

    twice = compression_of(inside)
    problem = f"{twice.name}, packed twice; unpack it once" if twice else ""
    problem = problem or _plain_problem(inside, kind)
    return f"{compression.name}, and inside of it {problem}" if problem else ""


def _unpacked_head(path: str, blocks: Iterable[bytes]) -> bytes:
    """The first `HEAD_BYTES` of a compressed file, or all of a smaller one."""
    head, end = bytearray(), False

    def limited() -> Iterator[bytes]:
        nonlocal end
        taken = 0
        for block in blocks:
            taken += len(block)
            yield block
            if taken >= MAX_PACKED_BYTES:
                end = True
                return

    try:
        for piece in decompressed(path, limited()):
            head += piece
            if len(head) >= HEAD_BYTES:
                break
    except DataError:
        # Cut off by the limit of this function, not in the file.
        if not end:
            raise
    return bytes(head[:HEAD_BYTES])


def _parquet_problem(head: bytes, compression: Compression | None) -> str:
    if head.startswith(b"PAR1"):
        return ""
    if not head:
        return f"0 bytes, no Parquet file: an empty download; {FETCH}"
    if compression is not None:
        return f"{compression.name}, not Parquet; unpack it, or give it another kind"
    name, remedy = _format_of(head)
    if name:
        return f"{name}, not Parquet; {remedy}"
    return f"not a complete Parquet file (it does not begin as one); {FETCH}"


def _plain_problem(head: bytes, kind: str) -> str:
    """Why uncompressed contents that begin with `head` are not text, or not JSON lines."""
    name, remedy = _format_of(head)
    if name:
        return f"{name}, which kind {kind} does not read; {remedy}"
    # UTF-16 without a byte order mark: every second byte of plain English is zero.
    if len(head) >= 4 and (not any(head[:64:2]) or not any(head[1:64:2])) and any(head[:64]):
        return f"UTF-16, which kind {kind} does not read; {RECODE}"
    return _json_problem(head.removeprefix(codecs.BOM_UTF8)) if kind == "jsonl" else ""


def _format_of(head: bytes) -> tuple[str, str]:
    """Name and remedy of a known format; empty for any other contents."""
    for offset, magic, name, remedy in FORMATS:
        # A text may begin with the letters of a format; its files hold bytes that no text has.
        if head[offset:].startswith(magic) and (name == LFS or not _is_text(head)):
            return name, remedy
    return "", ""


def _is_text(head: bytes) -> bool:
    """Whether contents look like UTF-8 text; the last character may be cut."""
    return b"\0" not in head and not codecs.getincrementaldecoder("utf-8")("replace").decode(
        head
    ).count("\ufffd")


def _json_problem(head: bytes) -> str:
    """Why contents are not JSON lines, though they may be JSON."""
    begin = head.lstrip()
    if begin.startswith(b"<"):
        return f"an HTML or XML page, not JSON lines: perhaps a failed download; {FETCH}"
    if begin.startswith(b"[") and not _is_one_line(begin):
        return "a JSON array, not JSON lines; write one object a line, as `jq -c '.[]'` does"
    if begin.startswith(b"{") and _spans_lines(begin.decode("utf-8", "replace")):
        return "JSON over several lines, not JSON lines; write one object a line, as `jq -c .` does"
    return ""


def _is_one_line(begin: bytes) -> bool:
    """Whether a list is one line of several: a broken line, but of a file of JSON lines."""
    line, newline, rest = begin.partition(b"\n")
    if not newline or not rest.lstrip().startswith(b"{"):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _spans_lines(text: str) -> bool:
    """Whether the first JSON object of a text goes on in its second line."""
    line, newline, rest = text.partition("\n")
    if not newline:
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except RecursionError:
        return False
    except json.JSONDecodeError as error:
        # A broken first line fails at the start of the second one, at the latest.
        return error.pos > len(text) - len(rest.lstrip())
    return end > len(line)
