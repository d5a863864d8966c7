"""Patterns of source files: `*`, `?`, `[...]` and `**`, as `glob` understands them.

- A folder that cannot be read for a moment is read again, and at last is an error.
- Names that begin with a dot match only patterns that do.

Alternatives considered:
- `glob`: it leaves out what it cannot read, and the data would lack a folder without a word.
"""

import glob
import re
from collections.abc import Iterator
from fnmatch import translate
from pathlib import Path

from k2train.retry import exists_retried, is_folder_retried, is_link_retried, list_retried


def matching_paths(pattern: str) -> list[Path]:
    """Return what matches a pattern, seen from the working directory; folders, too.

    Raises OSError and UnavailableError for a folder that cannot be read.
    """
    whole = Path(pattern)
    found = [Path(whole.anchor)]
    parts = whole.parts[1:] if whole.anchor else whole.parts
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if part == "**":
            found = [path for start in found for path in _below(start, with_files=last)]
        elif glob.has_magic(part):
            found = [path for start in found for path in _named(start, part)]
        else:
            named = (start / part for start in found)
            # A link to nothing is listed, so that whoever opens it is told.
            found = [path for path in named if exists_retried(path) or is_link_retried(path)]
    # Two `**` reach the same path in several ways.
    return list(dict.fromkeys(found))


def files_below(folder: Path) -> list[Path]:
    """Return the files in a folder and its folders, but hidden ones; links to folders are left out.

    Raises OSError and UnavailableError for a folder that cannot be read.
    """
    found = []
    for path in _visible(folder):
        if not is_folder_retried(path):
            found.append(path)
        elif not is_link_retried(path):
            found += files_below(path)
    return found


def _named(folder: Path, part: str) -> list[Path]:
    """What is in a folder and matches one part of a pattern."""
    matches = re.compile(translate(part)).match
    inside = list_retried(folder) if is_folder_retried(folder) else []
    hidden = part.startswith(".")
    return [path for path in inside if matches(path.name) and path.name.startswith(".") <= hidden]


def _below(folder: Path, with_files: bool) -> Iterator[Path]:
    """A folder and, at any depth, the folders in it; the files in them, too, if `with_files`."""
    if not is_folder_retried(folder):
        return
    yield folder
    for path in _visible(folder):
        if is_folder_retried(path):
            yield from _below(path, with_files)
        elif with_files:
            yield path


def _visible(folder: Path) -> list[Path]:
    return [path for path in list_retried(folder) if not path.name.startswith(".")]
