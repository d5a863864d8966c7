"""Expected publisher and release of a verification: what a reader knows from elsewhere.

- A key, as a file or by its identifier, which `attest.py` and `verify_release.py` print.
- The SHA-256 of `SHA256SUMS`, which names one release: an older one of the same key is another.

Alternatives considered:
- Beginnings of identifiers: 64 bits of them can be matched by trying keys.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from k2train.errors import RunError
from k2train.proofs.keys import key_id, read_public_key

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Expected:
    """What a reader knows of a release. Raises RunError for what is no hash."""

    key: Path | None = None
    """File with the publisher's public key, in PEM."""
    fingerprint: str | None = None
    """The key's identifier instead: the SHA-256 of its PEM."""
    sums: str | None = None
    """SHA-256 of `SHA256SUMS`."""

    def __post_init__(self) -> None:
        for option, value in (("--fingerprint", self.fingerprint), ("--sums", self.sums)):
            if value is not None and not _SHA256.fullmatch(value):
                raise RunError(
                    f"{option}: {value!a:.80} is no SHA-256; give all of its 64 digits and small "
                    "letters"
                )

    def key_id(self) -> str | None:
        """Return the identifier of the publisher's key; None where it is not known.

        Raises UserError for a file that is no key.
        """
        return self.fingerprint if self.key is None else key_id(read_public_key(self.key))


NOBODY = Expected()
"""Nothing is known from elsewhere."""
