"""Safe JSON reading for untrusted files: bounded size, depth and numbers.

- Python's reader accepts more than JSON: NaN, 1e400 as infinity, a repeated key without a word.
- It opens a device or a pipe in a file's place and reads it without end.
- Thousands of nested brackets end it with a RecursionError.
- Everything refused here is a ValueError with one short line, which readers of JSON expect anyway.

Alternatives considered:
- A schema: what a file must contain is for the module that owns the format (`json_record`).
"""

import json
import math
import os
import stat
from itertools import accumulate
from pathlib import Path
from typing import Any

from k2train.retry import retried

MAX_DEPTH = 64
MAX_FILE_BYTES = 2**28
"""Far above any manifest of this project, which has a few hundred bytes per shard and tensor."""


def read_json(path: Path, max_bytes: int = MAX_FILE_BYTES) -> Any:
    """Read the JSON value in `path`.

    Raises OSError when it cannot be read, ValueError for everything else that is wrong.
    """
    return parse_json(read_plain_file(path, max_bytes))


def read_plain_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Read a regular file whole.

    Raises ValueError for a device, pipe or directory, or more than `max_bytes`; OSError;
    UnavailableError for an error of the file system that did not pass.
    """
    return retried(lambda: _read_once(path, max_bytes), path)


def _read_once(path: Path, max_bytes: int) -> bytes:
    # Without O_NONBLOCK, opening a pipe waits for a writer. The type is taken from the open file,
    # because its name may point to another file by then.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as stream:
        facts = os.fstat(descriptor)

        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("not a plain file")
        if facts.st_size > max_bytes:
            raise ValueError(f"larger than {max_bytes} bytes")

        return stream.read()


def parse_json(content: bytes | str) -> Any:
    """Parse a JSON text in UTF-8. Raises ValueError."""
    text = content.decode("utf-8") if isinstance(content, bytes) else content

    encoded = text.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    if _depth(encoded) > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")

    return json.loads(
        text, object_pairs_hook=_object, parse_constant=_reject_constant, parse_float=_finite
    )


def _depth(text: bytes) -> int:
    """Nesting depth of brackets outside strings, without Python code for each character."""
    # Without escaped quotes, every second part between quotes is outside a string.
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in text else text
    brackets = b"".join(bare.split(b'"')[::2]).translate(_KINDS, _NO_BRACKETS)
    # Brackets become steps of +1 and -1; the running sum of them is the depth.
    return max(accumulate(map(_STEP, brackets)), default=0)


_KINDS = bytes.maketrans(b"[{]}", b"\2\2\0\0")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))
_STEP = (-1).__add__


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)

    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:40]!r} appears twice in one object")
    return found


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)

    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value
