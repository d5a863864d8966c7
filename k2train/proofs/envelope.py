"""Signed in-toto statements: a DSSE envelope around JSON, and its verification.

- DSSE signs `DSSEv1 LENGTH TYPE LENGTH PAYLOAD`, so that a payload cannot pass for another type
  (https://github.com/secure-systems-lab/dsse, `protocol.md`).
- One signature, by an elliptic-curve key. Any DSSE verifier reads it.

Alternatives considered:
- A signature over canonical JSON: two libraries that differ in one space disagree.
"""

import base64
import binascii
import json
from typing import Any

from k2train.proofs.keys import is_signed, key_id, sign
from k2train.safe_json import parse_json

PAYLOAD_TYPE = "application/vnd.in-toto+json"


def pre_authentication_encoding(payload: bytes) -> bytes:
    """Return the bytes that are signed for a payload (PAE of DSSE 1.0)."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sealed(statement: Any, key: Any) -> dict[str, Any]:
    """Return the envelope of a statement, signed by a private key."""
    payload = json.dumps(statement, ensure_ascii=False, indent=1).encode()
    signature = sign(key, pre_authentication_encoding(payload))
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [
            {"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}
        ],
    }


def opened(envelope: Any, key: Any) -> Any:
    """Return the statement of an envelope whose signature is that of a public key.

    Raises ValueError.
    """
    try:
        kind = envelope["payloadType"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        (entry,) = envelope["signatures"]
        signature = base64.b64decode(entry["sig"], validate=True)
        named = entry["keyid"]
    except (TypeError, LookupError, ValueError, binascii.Error):
        raise ValueError("is no DSSE envelope with one signature") from None

    if kind != PAYLOAD_TYPE:
        raise ValueError(f"holds {str(kind)[:60]!a}, must hold {PAYLOAD_TYPE}")
    if named != key_id(key):
        raise ValueError(f"is signed by key {str(named)[:16]!a}, not by {key_id(key)[:16]}")
    if not is_signed(key, signature, pre_authentication_encoding(payload)):
        raise ValueError("has a signature that is not its key's: it was changed")
    return parse_json(payload)
