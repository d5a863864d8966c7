"""Proofs of a release that other programs read: the calls to the room `proofs`.

- Without a key they are written unsigned, and say so.
- They cover every file of the release but their own, `SHA256SUMS` included.
"""

from collections.abc import Sequence
from pathlib import Path

from k2train.proofs.check import check_proofs, key_of
from k2train.proofs.write import write_proofs
from k2train.release.places import PROOFS
from k2train.retry import is_folder_retried


def write(release: Path, runs: Sequence[Path], key: Path | None) -> list[str]:
    """Write the proofs of a release of `runs`; returns what they leave open, a line each.

    Raises UserError, OSError.
    """
    return list(write_proofs(release, list(runs), key))


def problems(release: Path, key: str | None = None) -> list[str]:
    """Return the problems of the proofs of a release, a line each; none without proofs.

    `key` is the identifier of the publisher's key. Raises UserError where a package that reads
    them is missing.
    """
    if not is_folder_retried(release / PROOFS):
        return []
    return list(check_proofs(release, key))


def signer(release: Path) -> str | None:
    """Return the identifier of the key that a release names as its signer's; None without one.

    Raises UserError for what is no key, and where the package that reads it is missing.
    """
    return key_of(release)
