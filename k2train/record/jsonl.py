"""JSON-lines files that stay readable when the process is killed at any moment.

- A line is encoded first and passed to the kernel in one O_APPEND write, newline included. Bytes
  after the last newline were cut off by the end of the process. They were never acknowledged to a
  caller and may be set aside.
- JSON has no NaN. Non-finite floats are stored as the strings "nan", "inf" and "-inf", so that
  every JSON reader accepts them.

Alternatives considered:
- A buffered text file: its buffer is lost on kill -9, and a flush may split a line in two.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from k2train.errors import RunError
from k2train.files import sync_directory
from k2train.retry import exists
from k2train.safe_json import read_plain_file

MAX_FILE_BYTES = 2**36
"""Size limit of a file that is read whole: a hundred times the metrics of a long run."""
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def json_value(value: Any) -> Any:
    """Convert a value to JSON types.

    Scalars of array libraries become Python numbers; paths and non-string keys become strings.
    Raises TypeError when there is no such form.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)

    if isinstance(value, float):
        return (
            float(value)
            if math.isfinite(value)
            else ("nan" if math.isnan(value) else "inf" if value > 0 else "-inf")
        )

    if isinstance(value, dict):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)

    # A scalar of NumPy or PyTorch, without importing either.
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", 0) == 0:
        return json_value(item())

    raise TypeError(f"a {type(value).__name__} has no JSON form")


def encode_line(row: dict[str, Any]) -> bytes:
    """Encode one row as bytes with its newline, keeping the key order."""
    return json.dumps(json_value(row), allow_nan=False, separators=(", ", ": ")).encode() + b"\n"


def append_bytes(path: Path, data: bytes, sync: bool) -> None:
    """Append `data` atomically; with `sync` it is on the disk when this returns.

    Raises OSError (a full disk, for instance) with the file unchanged.
    """
    existed = exists(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        size_bytes = os.fstat(descriptor).st_size
        try:
            # One write call: a kill leaves all of the data, or a torn last line that a reader can
            # tell.
            written = os.write(descriptor, data)
            if written != len(data):
                raise OSError(
                    f"{path}: only {written} of {len(data)} bytes could be written; is the disk "
                    "full?"
                )
            if sync:
                os.fsync(descriptor)
        except OSError:
            # A partial line must not stay, or the next append would continue it.
            os.ftruncate(descriptor, size_bytes)
            raise
    finally:
        os.close(descriptor)

    # The name of a new file is durable only after its directory was synced.
    if sync and not existed:
        sync_directory(path.parent)


def read_lines(path: Path) -> tuple[list[bytes], bytes]:
    """Read (complete lines without newlines, torn rest).

    Raises RunError when the file is missing or unreadable.
    """
    try:
        data = read_plain_file(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        raise RunError(f"{path} does not exist; is {path.parent} the directory of a run?") from None
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None

    *lines, rest = data.split(b"\n")
    return lines, rest


def parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """Parse the object in line `number` (from 1). Raises RunError naming the line."""
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_reject_constant)
    # Thousands of nested brackets exhaust the parser's stack.
    except (ValueError, RecursionError):
        raise RunError(
            f"{path}: line {number} is not JSON: the file was changed or damaged after it was "
            "written"
        ) from None

    if not isinstance(row, dict):
        raise RunError(f"{path}: line {number} holds {type(row).__name__}, expected an object")
    return row


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def truncate(path: Path, size_bytes: int) -> None:
    """Truncate the file to `size_bytes` and sync it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.ftruncate(descriptor, size_bytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
