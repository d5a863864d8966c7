"""`SHA256SUMS`: every file of a folder with its hash, as `sha256sum --check` reads it.

- One line a file, sorted by name. The text is a function of the folder, so it is compared as a
  whole: a changed byte in it is found like one in any other file.
- What lies in `proofs/` is not in it: proofs are written later, cover it, and have their own list.

Alternatives considered:
- Hashes in the index alone: no stock tool reads them.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from k2train.errors import RunError
from k2train.files import sha256_file, write_synced
from k2train.release.places import NOT_WHOLE, PROOFS, SUMS, files_below
from k2train.retry import is_file_retried
from k2train.safe_json import read_plain_file

THREADS = 4
GIT = ".git"
"""Where a clone of a published release keeps its history."""


def summed_files(folder: Path) -> list[str]:
    """Return the names that a folder's list must have. Raises RunError for a link."""
    names = (path.relative_to(folder).as_posix() for path in files_below(folder))
    return sorted(
        name
        for name in names
        if name not in (SUMS, NOT_WHOLE) and name.split("/")[0] not in (PROOFS, GIT)
    )


def sums_text(folder: Path, names: Iterable[str]) -> str:
    """Hash files of a folder. Raises OSError, and RunError for a name that no line can hold."""
    listed = list(names)
    for name in listed:
        if not name.isprintable() or "\\" in name:
            raise RunError(f"{ascii(name)[:120]} cannot be a name in {SUMS}; rename the file")
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = pool.map(lambda name: sha256_file(folder / name), listed)
        return "".join(f"{one}  {name}\n" for one, name in zip(hashes, listed, strict=True))


def write_sums(folder: Path) -> None:
    """Write the list of a folder. Raises OSError, RunError."""
    write_synced(folder / SUMS, sums_text(folder, summed_files(folder)))


def sums_problems(folder: Path) -> Iterator[str]:
    """Say which files of a folder are missing, altered or added."""
    if not is_file_retried(folder / SUMS):
        yield f"{SUMS}: is missing; the release was never finished, or the file was removed"
        return
    text = read_plain_file(folder / SUMS).decode("utf-8", "replace")
    known: dict[str, str] = {}
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        known[name] = digest
    there = summed_files(folder)
    found = dict(
        (line.split("  ", 1)[1], line.split("  ", 1)[0])
        for line in sums_text(folder, there).splitlines()
    )
    problems = [f"{name}: is missing" for name in known if name not in found]
    problems += [f"{name}: is not in {SUMS}: it was added" for name in there if name not in known]
    problems += [
        f"{name}: was altered, its SHA-256 is {found[name][:12]}, {SUMS} says {known[name][:12]}"
        for name in there
        if name in known and known[name] != found[name]
    ]
    if not problems and text != "".join(f"{found[name]}  {name}\n" for name in there):
        problems.append(f"{SUMS}: was altered")
    yield from problems
