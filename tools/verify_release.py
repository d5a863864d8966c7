"""Verify a release with nothing but its folder: every byte, and what its files say of each other.

    python tools/verify_release.py DIR [--key FILE | --fingerprint ID] [--sums SHA256]

- Hashes of all files; missing, altered and added ones by name.
- Ledger chain, metrics, order of the data, manifests, state roots against the tensors, Hugging Face
  folders against their records and the run's states, items of evaluations, rows of recorded steps.
- The index against the folder. Needs no torch, no run and no network.
- `--key` is the publisher's public key, `--fingerprint` its identifier, and `--sums` the hash of
  the release's SHA256SUMS: from elsewhere, because what is in DIR a forger writes, too. Without
  them the command prints what the folder claims.

Exit codes: 0 whole; 2 anything is missing, altered or added, one line each; 1 it could not be read.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, command

from k2train.errors import EXIT_DONE, EXIT_USAGE, RunError
from k2train.release.expected import Expected
from k2train.release.verify import verify
from k2train.retry import is_folder_retried
from k2train.text import counted


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(prog="verify_release.py", description="Verify a release, with itself alone.")
    parser.add_argument("release", type=Path, metavar="DIR", help="the folder of a release")
    known = parser.add_mutually_exclusive_group()
    known.add_argument("--key", type=Path, metavar="FILE", help="the publisher's public key")
    known.add_argument("--fingerprint", metavar="ID", help="that key's identifier")
    parser.add_argument("--sums", metavar="SHA256", help="the hash of its SHA256SUMS")
    given = parser.parse_args(arguments)
    expected = Expected(given.key, given.fingerprint, given.sums)
    if not is_folder_retried(given.release):
        raise RunError(f"{given.release} is not a folder; give that of a release")

    found = verify(given.release, expected)
    for problem in found.problems:
        print(problem, file=sys.stderr)
    for note in found.notes:
        print(f"note: {note}")
    if found.problems:
        print(f"{given.release}: {counted(len(found.problems), 'problem')}", file=sys.stderr)
        return EXIT_USAGE
    print(
        f"{given.release}: whole, {counted(found.files, 'file')}, "
        f"{counted(found.models, 'model')}, {counted(found.roots, 'state root')} recomputed, "
        f"{counted(found.steps, 'recorded step')} with their rows, "
        f"{counted(found.gaps, 'gap')} in the index"
        + (", signed by the key given" if given.key or given.fingerprint else "")
    )
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
