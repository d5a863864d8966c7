"""In which chunks a document can be, told by its key without reading a chunk: what the manifest keeps for that.

A subset lies in the chunks in the order of its documents' keys, so each chunk has a range of them. The manifest keeps
the ranges, as leading bits: enough to look into one chunk instead of all, in a few bytes a chunk. An index of documents
was refused: it is as large as their names.
"""

import hashlib
from typing import Any

from k2train.data.manifest import Manifest

SCHEME = "blake2b-64"
KEY_BITS = 64


def key_base(seed: int, subset: str, pass_number: int, source_key: str) -> "hashlib.blake2b":
    """What is the same for all documents of a source; `key_of` copies it."""
    head = "\0".join(
        ("k2train document order", str(seed), subset, str(pass_number), source_key, "")
    )
    return hashlib.blake2b(head.encode(), digest_size=8)


def key_of(base: "hashlib.blake2b", name: bytes) -> bytes:
    """The key of a document as 8 bytes, the highest first."""
    digest = base.copy()
    digest.update(name)
    return digest.digest()


def document_key64(seed: int, subset: str, pass_number: int, source_key: str, name: str) -> int:
    """Where a document lies in one pass of a subset's stream, below 2**64: decided by names, whatever else there is."""
    return int.from_bytes(
        key_of(key_base(seed, subset, pass_number, source_key), name.encode()), "big"
    )


def chunks_of_document(
    manifest: Manifest, subset: str, source_key: str, name: str
) -> set[str] | None:
    """Names of the chunks in which the document can be, the held-out one included; in no other it is.

    None when the folder does not tell, or has another way of ordering documents.
    """
    facts = manifest.facts.get("document_keys")
    if (
        not isinstance(facts, dict)
        or facts.get("scheme") != SCHEME
        or subset not in facts["subsets"]
    ):
        return None
    entry: dict[str, Any] = facts["subsets"][subset]
    buckets = [
        document_key64(facts["seed"], subset, number, source_key, name) >> (KEY_BITS - bits)
        for number, bits in enumerate(entry["bits"])
    ]
    return {
        chunk
        for chunk, ranges in entry["chunks"].items()
        if any(first <= buckets[number] <= last for number, first, last in ranges)
    }
