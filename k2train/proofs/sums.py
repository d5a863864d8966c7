"""Lists of SHA-256 sums, in the form of `sha256sum`: which files a folder has, and whether whole.

- `sha256sum -c SHA256SUMS` in the folder reads them.
- They find accidents in what no signature reaches: unsigned documents, bytes of a time stamp that
  its authority did not sign. Against an intention, only the signature helps.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from k2train.files import sha256_file
from k2train.retry import is_file_retried, is_link_retried, list_retried
from k2train.safe_json import read_plain_file

SUMS = "SHA256SUMS"


def sums_text(digests: Mapping[str, str]) -> str:
    """Return the content of a list: one line per file, by name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def read_sums(folder: Path) -> dict[str, str]:
    """Return name -> SHA-256 of a folder's list; empty without one. Raises OSError, ValueError."""
    if not is_file_retried(folder / SUMS):
        return {}
    lines = read_plain_file(folder / SUMS).decode().splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def sum_problems(folder: Path, where: str, others: Collection[str] = ()) -> list[str]:
    """Compare a folder with its list; one line per problem, with `where` before the names.

    `others` are names that the list leaves out. Raises OSError, UnavailableError.
    """
    try:
        listed = read_sums(folder)
    except ValueError:
        return [f"{where}/{SUMS}: is no list of sums"]
    there = {path.name: path for path in list_retried(folder)}
    if SUMS not in there:
        return [f"{where}/{SUMS}: is missing"]

    problems = []
    for name, digest in listed.items():
        if name not in there or not is_file_retried(there[name]):
            problems.append(f"{where}/{name}: is missing")
        elif is_link_retried(there[name]):
            problems.append(f"{where}/{name}: is a link, whose target may be another tomorrow")
        elif sha256_file(there[name]) != digest:
            problems.append(f"{where}/{name}: is not what was written")
    added = there.keys() - {*listed, SUMS, *others}
    problems += [f"{where}/{name}: was added" for name in sorted(added)]
    if not problems and sums_text(listed).encode() != read_plain_file(folder / SUMS):
        problems.append(f"{where}/{SUMS}: is not what was written")
    return problems
