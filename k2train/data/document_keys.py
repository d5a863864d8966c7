"""Document keys: find the chunks that can hold a document without reading any chunk.

- Documents of a subset are ordered by key, so each chunk holds a range of keys.
- The manifest keeps these ranges as leading bits: a few bytes per chunk, enough to open one chunk
  instead of all.

Alternatives considered:
- An index of documents: as large as their names.
"""

import hashlib
from typing import Any

from k2train.data.manifest import Manifest

SCHEME = "blake2b-64"
KEY_BITS = 64


def key_base(seed: int, subset: str, pass_number: int, source_key: str) -> "hashlib.blake2b":
    """Hash state shared by all documents of a source, for `key_of` to copy."""
    head = "\0".join(
        ("k2train document order", str(seed), subset, str(pass_number), source_key, "")
    )
    return hashlib.blake2b(head.encode(), digest_size=8)


def key_of(base: "hashlib.blake2b", name: bytes) -> bytes:
    """Key of a document: 8 bytes, big-endian."""
    digest = base.copy()
    digest.update(name)
    return digest.digest()


def document_key64(seed: int, subset: str, pass_number: int, source_key: str, name: str) -> int:
    """Position of a document in one pass over its subset, as a number below 2**64.

    Depends on names and seed only, never on which other documents exist.
    """
    return int.from_bytes(
        key_of(key_base(seed, subset, pass_number, source_key), name.encode()), "big"
    )


def chunks_of_document(
    manifest: Manifest, subset: str, source_key: str, name: str
) -> set[str] | None:
    """Names of the chunks that can contain the document, the held-out one included.

    None when the manifest has no key ranges, or orders documents in another way.
    """
    facts = manifest.facts.get("document_keys")
    if (
        not isinstance(facts, dict)
        or facts.get("scheme") != SCHEME
        or subset not in facts["subsets"]
    ):
        return None

    entry: dict[str, Any] = facts["subsets"][subset]
    # One bucket per pass: the leading bits of the document's key in that pass.
    buckets = [
        document_key64(facts["seed"], subset, number, source_key, name) >> (KEY_BITS - bits)
        for number, bits in enumerate(entry["bits"])
    ]

    return {
        chunk
        for chunk, ranges in entry["chunks"].items()
        if any(first <= buckets[number] <= last for number, first, last in ranges)
    }
