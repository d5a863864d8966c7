"""NumPy `.npy` headers: one way to write them, and safe reading of untrusted files.

- Chunks and their document boundaries are `.npy` files of version 1.
- Files are hashed whole, header included, so all writers must produce the same header bytes.
- A file from elsewhere is mapped only after its header and its size agree.
"""

import io
import os
import stat
import tokenize
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from k2train.errors import DataError
from k2train.retry import retried


class Header(NamedTuple):
    """Header of a file and its actual size; `offset` is the first byte of the data."""

    file_bytes: int
    offset: int
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]


def header_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """Encode the header of an array in row order, version 1.0."""
    content = io.BytesIO()
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(content, header)
    return content.getvalue()


def read_header(path: Path, where: str) -> Header:
    """Read the header of a file, some 128 bytes.

    Raises DataError that begins with `where` when the file is missing or not `.npy` version 1,
    UnavailableError when it cannot be read for now.
    """
    try:
        return retried(lambda: _read_once(path), where)
    except OSError as error:
        raise DataError(
            f"{where}: cannot be read ({error.strerror}); fetch it again or prepare the data"
        ) from None
    except (ValueError, EOFError) as error:
        why = " ".join(str(error).split())[:200]
        raise DataError(f"{where}: not a NumPy file of version 1 ({why}); fetch it again") from None


def check_size(header: Header, expected_bytes: int, where: str) -> None:
    """Check the file's actual size. Raises DataError when it is truncated or too long."""
    if header.file_bytes != expected_bytes:
        what = "truncated" if header.file_bytes < expected_bytes else "too long"
        raise DataError(
            f"{where}: {what}: {header.file_bytes} bytes, must be {expected_bytes}; fetch it again"
        )


def _read_once(path: Path) -> Header:
    # A plain open of a pipe in the file's place would wait for ever.
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as stream:
        facts = os.fstat(stream.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("it is not a plain file")
        return Header(facts.st_size, *_parse(stream))


def _parse(stream: IO[bytes]) -> tuple[int, tuple[int, ...], bool, np.dtype[Any]]:
    # Only version 1.0 is ever written; others would need another header parser.
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"it is version {version[0]}.{version[1]}")

    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    # NumPy evaluates the header as a Python literal, so a hostile one raises what the parser
    # raises.
    except (
        SyntaxError,
        RecursionError,
        MemoryError,
        TypeError,
        KeyError,
        AttributeError,
        tokenize.TokenError,
    ) as error:
        raise ValueError(f"unreadable header: {type(error).__name__}") from None
    return stream.tell(), shape, fortran, dtype
