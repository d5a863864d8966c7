"""The header of a plain `.npy` file: written alike by everyone who writes one, read with suspicion.

Chunks and their borders are such files. Their bytes are hashed whole, header included, so two writers must not differ in
it; and a file from elsewhere must not be mapped before its header and its size agree.
"""

import io
import os
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from k2train.errors import DataError


class Header(NamedTuple):
    """What a file says of itself, and its real size; `offset` is where its data begin, in bytes."""

    file_bytes: int
    offset: int
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]


def header_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """The header of an array in row order, version 1.0."""
    content = io.BytesIO()
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(content, header)
    return content.getvalue()


def read_header(path: Path, where: str) -> Header:
    """Reads some 128 bytes. Raises DataError, `where` in front, for a file that is missing or no `.npy` of version 1."""
    try:
        with path.open("rb") as stream:
            return Header(os.fstat(stream.fileno()).st_size, *_parse(stream))
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror}); fetch it again or prepare the data") from None
    except (ValueError, EOFError) as error:
        raise DataError(f"{where}: no NumPy header of version 1 ({error}); fetch it again") from None


def check_size(header: Header, expected_bytes: int, where: str) -> None:
    """Raises DataError for a file that is cut off or too long."""
    if header.file_bytes != expected_bytes:
        what = "truncated" if header.file_bytes < expected_bytes else "too long"
        raise DataError(f"{where}: {what}: {header.file_bytes} bytes, must be {expected_bytes}; fetch it again")


def _parse(stream: IO[bytes]) -> tuple[int, tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"it is version {version[0]}.{version[1]}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    return stream.tell(), shape, fortran, dtype
