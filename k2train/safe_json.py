"""JSON from a file that may have come from anywhere: read with a bound on its size, its depth and its numbers.

Python's reader takes more than JSON: NaN, 1e400 as infinity, the last of two equal keys in silence; it opens a device or
a pipe that stands in a file's place and reads it without end, and brackets nested by the thousand end it with an error
that nobody expects. Whatever is refused here is a ValueError of one short line, which every reader of JSON expects anyway.
A schema was refused: what must be in a file is for its owner to say.
"""

import json
import math
import os
import stat
from itertools import accumulate
from pathlib import Path
from typing import Any

MAX_DEPTH = 64
MAX_FILE_BYTES = 2**28
"""Far above any manifest of ours, which has a few hundred bytes for each shard and tensor."""


def read_json(path: Path, max_bytes: int = MAX_FILE_BYTES) -> Any:
    """What the file at `path` holds. Raises OSError when it cannot be read, ValueError for all else that is wrong."""
    return parse_json(read_plain_file(path, max_bytes))


def read_plain_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """All of a plain file. Raises ValueError for a device, a pipe, a directory, or more than `max_bytes`; OSError."""
    # Without O_NONBLOCK opening a pipe waits for a writer; what it was is asked of the open file, not of its name.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as stream:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("not a plain file")
        if facts.st_size > max_bytes:
            raise ValueError(f"larger than {max_bytes} bytes")
        return stream.read()


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text in UTF-8. Raises ValueError."""
    text = content.decode("utf-8") if isinstance(content, bytes) else content
    if (
        _depth(text.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
        > MAX_DEPTH
    ):
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return json.loads(text, object_pairs_hook=_object, parse_constant=_refused, parse_float=_finite)


def _depth(text: bytes) -> int:
    """How deep brackets are nested, those inside of text taken out; no step of it is Python's for each character."""
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in text else text
    brackets = b"".join(bare.split(b'"')[::2]).translate(_KINDS, _NO_BRACKETS)
    return max(accumulate(map(_STEP, brackets)), default=0)


_KINDS = bytes.maketrans(b"[{]}", b"\2\2\0\0")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))
_STEP = (-1).__add__


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:40]!r} stands twice in one object")
    return found


def _refused(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value
