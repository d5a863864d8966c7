"""Optional packages."""

import pytest

from k2train.errors import UserError
from k2train.proofs.optional import package


def test_a_missing_package_names_the_extra() -> None:
    """Catches a traceback, and a line that names a module that nobody can install."""
    with pytest.raises(UserError) as caught, package("model-signing"):
        raise ModuleNotFoundError(name="model_signing.signing")
    assert str(caught.value) == (
        "proofs need the package model-signing: pip install 'k2train[release]'"
    )
    lacking = pytest.raises(UserError, match=r"model-signing \(there is no module OpenSSL\)")
    with lacking, package("model-signing"):
        raise ModuleNotFoundError(name="OpenSSL.crypto")
