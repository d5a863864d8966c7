"""Envelopes: other projects' verifiers take them, and no changed byte passes."""

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey

from k2train.proofs.envelope import PAYLOAD_TYPE, opened, pre_authentication_encoding, sealed
from k2train.proofs.keys import key_id, new_key, public_pem, read_private_key

STATEMENT = {"name": "a model", "numbers": [1, 2.5, None]}


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("key") / "key"
    new_key(path)
    return read_private_key(path)


def stock_verify(envelope: Any, key: Any) -> bytes:
    """The payload, as securesystemslib verifies it."""
    read = Envelope.from_dict(json.loads(json.dumps(envelope)))
    read.verify([SSlibKey.from_crypto(key.public_key(), keyid=key_id(key.public_key()))], 1)
    payload: bytes = read.payload
    return payload


def test_securesystemslib_takes_it(key: Any) -> None:
    """Catches an encoding of our own, and a key that nobody else finds."""
    envelope = sealed(STATEMENT, key)
    assert json.loads(stock_verify(envelope, key)) == STATEMENT
    assert opened(envelope, key.public_key()) == STATEMENT
    # The example of the DSSE specification.
    encoded = pre_authentication_encoding(b"hello world").replace(PAYLOAD_TYPE.encode(), b"")
    assert encoded == b"DSSEv1 28  11 hello world"


def test_openssl_takes_it(key: Any, tmp_path: Path) -> None:
    """Catches a signature that only libraries of Python agree about."""
    envelope = sealed(STATEMENT, key)
    (tmp_path / "p").write_bytes(public_pem(key.public_key()))
    (tmp_path / "s").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    payload = base64.b64decode(envelope["payload"])
    (tmp_path / "m").write_bytes(
        f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} ".encode() + payload
    )
    command = ["openssl", "dgst", "-sha256", "-verify", "p", "-signature", "s", "m"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "Verified OK\n"


def test_a_changed_byte_is_found(key: Any) -> None:
    """Catches a payload, type or signature that nothing protects."""
    envelope = sealed(STATEMENT, key)
    payload = base64.b64decode(envelope["payload"])
    for place in range(len(payload)):
        changed = bytearray(payload)
        changed[place] ^= 1
        other = {**envelope, "payload": base64.b64encode(changed).decode()}
        with pytest.raises(ValueError, match="was changed"):
            opened(other, key.public_key())
        with pytest.raises(VerificationError):
            stock_verify(other, key)


def test_what_is_no_envelope_is_one_line(key: Any, tmp_path: Path) -> None:
    """Catches a traceback for a file from elsewhere, and a signature of another key."""
    envelope = sealed(STATEMENT, key)
    public = key.public_key()
    for broken in (None, [], {}, {**envelope, "payload": "?"}, {**envelope, "signatures": []}):
        with pytest.raises(ValueError, match="is no DSSE envelope"):
            opened(broken, public)
    with pytest.raises(ValueError, match="must hold"):
        opened({**envelope, "payloadType": "text/plain"}, public)
    new_key(tmp_path / "other")
    with pytest.raises(ValueError, match="is signed by key"):
        opened(envelope, read_private_key(tmp_path / "other").public_key())
