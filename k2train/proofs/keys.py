"""Elliptic-curve keys that sign proofs: reading, making, fingerprint, ECDSA signatures.

- Curves are those of OpenSSF model signatures: NIST P-256, P-384 and P-521, hashed with SHA-256,
  SHA-384 and SHA-512.
- A key identifier is the SHA-256 of the public key as PEM, as in a model signature.
- A private key is read where it is, and never copied.

Alternatives considered:
- Ed25519: `model-signing` accepts none.
- Keyless signatures (Sigstore): they need a network and publish an identity.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from k2train.errors import UserError
from k2train.files import sync_directory
from k2train.proofs.optional import package
from k2train.retry import exists_retried
from k2train.safe_json import read_plain_file

CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
"""Curve -> its hash."""
MAX_BYTES = 2**16


def _hash_of(key: Any) -> Any:
    with package("cryptography"):
        from cryptography.hazmat.primitives import hashes
    return getattr(hashes, CURVES[key.curve.name])()


def read_private_key(path: Path) -> Any:
    """Read an unencrypted private key in PEM. Raises UserError, one line without its content."""
    with package("cryptography"):
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    return _checked(path, lambda data: load_pem_private_key(data, None))


def read_public_key(path: Path) -> Any:
    """Read a public key in PEM. Raises UserError."""
    with package("cryptography"):
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    return _checked(path, load_pem_public_key)


def _checked(path: Path, load: Any) -> Any:
    try:
        key = load(read_plain_file(path, MAX_BYTES))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a key file") from None
    except TypeError:
        raise UserError(
            f"{path} is encrypted; decrypt it for the time of signing: openssl ec -in KEY -out FILE"
        ) from None
    except Exception:
        # The library has an error for each way to be no key, and some of them quote the file.
        raise UserError(
            f"{path} is no key in PEM; make one with --new-key, or with openssl ecparam -genkey "
            "-name prime256v1 -noout"
        ) from None

    name = getattr(getattr(key, "curve", None), "name", type(key).__name__)
    if name not in CURVES:
        raise UserError(f"{path}: a key of {name}; signatures take {', '.join(CURVES)}")
    return key


def new_key(path: Path) -> str:
    """Make a P-256 key that only its owner may read; returns its identifier.

    Raises UserError where the file exists.
    """
    with package("cryptography"):
        from cryptography.hazmat.primitives import serialization as forms
        from cryptography.hazmat.primitives.asymmetric import ec
    key = ec.generate_private_key(ec.SECP256R1())
    content = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise UserError(f"--new-key: {path} exists; name a new file") from None
    with open(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    sync_directory(path.parent)
    return key_id(key.public_key())


def public_pem(key: Any) -> bytes:
    """Return a public key as PEM (SubjectPublicKeyInfo)."""
    with package("cryptography"):
        from cryptography.hazmat.primitives import serialization as forms
    found: bytes = key.public_bytes(
        encoding=forms.Encoding.PEM, format=forms.PublicFormat.SubjectPublicKeyInfo
    )
    return found


def key_id(key: Any) -> str:
    """Return the identifier of a public key: SHA-256 of its PEM, in hexadecimal."""
    return hashlib.sha256(public_pem(key)).hexdigest()


def sign(key: Any, message: bytes) -> bytes:
    """Sign a message with a private key: ECDSA, in DER."""
    with package("cryptography"):
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    signature: bytes = key.sign(message, ECDSA(_hash_of(key)))
    return signature


def is_signed(key: Any, signature: bytes, message: bytes) -> bool:
    """Return whether a signature of a message is that of a public key."""
    with package("cryptography"):
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    try:
        key.verify(signature, message, ECDSA(_hash_of(key)))
    except InvalidSignature:
        return False
    return True


def refuse_inside(key: Path, folder: Path) -> None:
    """Raise UserError where a private key is inside the folder that is to be published."""
    if exists_retried(key) and key.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--key: {key} is inside {folder}, which is published; move it out")
