"""Optional packages of proofs: an import that lacks one is a line that names the extra.

with package("model-signing"):
    from model_signing import signing
"""

from collections.abc import Iterator
from contextlib import contextmanager

from k2train.errors import UserError

EXTRA = "pip install 'k2train[release]'"


@contextmanager
def package(owner: str) -> Iterator[None]:
    """Turn a failed import of the package `owner` into a UserError."""
    try:
        yield
    except ModuleNotFoundError as error:
        lacking = str(error.name).partition(".")[0]
        same = lacking.replace("_", "-") == owner
        beside = "" if same else f" (there is no module {lacking})"
        raise UserError(f"proofs need the package {owner}{beside}: {EXTRA}") from None
