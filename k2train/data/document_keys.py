"""Document keys: find the chunks that can hold a document without reading any chunk.

- Documents of a subset are ordered by key, so each chunk holds a range of keys.
- The manifest keeps these ranges as leading bits: a few bytes per chunk, enough to open one chunk
  instead of all.

Alternatives considered:
- An index of documents: as large as their names.
"""

import hashlib
from typing import Annotated

from pydantic import Field

from k2train.data.manifest import Manifest
from k2train.errors import DataError
from k2train.json_record import Count, Record

SCHEME = "blake2b-64"
KEY_BITS = 64


class KeyRanges(Record):
    """Ranges of a subset's keys: leading `bits` by pass; by chunk [pass, first, last] of these."""

    bits: tuple[Annotated[int, Field(ge=0, le=KEY_BITS, strict=True)], ...]
    chunks: dict[str, tuple[tuple[Count, Count, Count], ...]]


class DocumentKeys(Record):
    """Key ranges of all chunks by subset, as the preparation recorded them in this scheme."""

    seed: Count
    subsets: dict[str, KeyRanges]


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
    recorded = manifest.facts.document_keys
    if recorded is None or recorded.get("scheme") != SCHEME:
        return None
    try:
        keys = DocumentKeys.parse(recorded)
    except ValueError as error:
        raise DataError(f"{manifest.path}: facts.document_keys: {error}") from None

    if (ranges := keys.subsets.get(subset)) is None:
        return None
    # One bucket per pass: the leading bits of the document's key in that pass.
    buckets = [
        document_key64(keys.seed, subset, number, source_key, name) >> (KEY_BITS - bits)
        for number, bits in enumerate(ranges.bits)
    ]

    return {
        chunk
        for chunk, found in ranges.chunks.items()
        if any(
            number < len(buckets) and first <= buckets[number] <= last
            for number, first, last in found
        )
    }
