"""Content hash of provenance: of the values, whatever wrote the Parquet file."""

import hashlib
import struct
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
from pyarrow import parquet

from k2train.data.prepare.write.provenance import schema
from k2train.data.provenance_digest import ProvenanceDigest

LINES = 40


def lines() -> list[dict[str, Any]]:
    return [
        {
            "row": i // 3,
            "start": i % 3,
            "length": 5,
            "subset": ("web", "books")[i % 2],
            "source": f"web/é{i % 7}",
            "document": ("", "a", "zwölf")[i % 3] + str(i),
            "offset": i * 2**33,
            "fim": ("none", "psm", "spm")[i % 3],
            "repeat": i % 2,
        }
        for i in range(LINES)
    ]


def digest_of(*tables: Any) -> str:
    digest = ProvenanceDigest()
    for table in tables:
        digest.add(table)
    return digest.hexdigest()


def test_the_hash_is_of_the_values() -> None:
    """Catches another definition of the hash: recorded ones could not be compared for ever."""
    table = arrow.Table.from_pylist(lines(), schema())
    parts = [f"k2train provenance 1\n{LINES}\n"]
    for name in sorted(schema().names):
        values = [line[name] for line in lines()]
        if name in ("subset", "source", "fim"):
            content = b"".join(hashlib.sha256(v.encode()).digest()[7::-1] for v in values)
            parts.append(f"{name} {hashlib.sha256(content).hexdigest()}\n")
        elif name == "document":
            texts = [value.encode() for value in values]
            sizes = b"".join(struct.pack("<q", len(text)) for text in texts)
            hashes = [hashlib.sha256(part).hexdigest() for part in (b"".join(texts), sizes)]
            parts.append(f"{name} {' '.join(hashes)}\n")
        else:
            content = b"".join(struct.pack("<q", value) for value in values)
            parts.append(f"{name} {hashlib.sha256(content).hexdigest()}\n")

    assert digest_of(table) == hashlib.sha256("".join(parts).encode()).hexdigest()


def test_another_writer_makes_the_same_hash(tmp_path: Path) -> None:
    """Catches a hash that depends on row groups, compression, dictionaries or widths."""
    table = arrow.Table.from_pylist(lines(), schema())
    plain = arrow.schema(
        [
            (name, {"document": arrow.large_string()}.get(name, arrow.string()))
            if arrow.types.is_dictionary(schema().field(name).type) or name == "document"
            else (name, arrow.int64())
            for name in schema().names
        ]
    )
    others: list[tuple[Any, dict[str, Any]]] = [
        (table, {"compression": "zstd", "row_group_size": 7}),
        (table, {"compression": "gzip", "use_dictionary": False, "store_schema": False}),
        (arrow.Table.from_pylist(lines(), plain), {"compression": "none", "version": "1.0"}),
    ]
    found = {digest_of(table), digest_of(table.slice(0, 3), table.slice(3, 0), table.slice(3))}
    for number, (content, options) in enumerate(others):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(content, path, **options)
        found.add(digest_of(parquet.read_table(path)))
        with parquet.ParquetFile(path) as file:
            found.add(digest_of(*file.iter_batches(9)))

    assert len(found) == 1


@pytest.mark.parametrize("name", schema().names)
def test_every_value_is_in_the_hash(name: str) -> None:
    """Catches a column that can change unnoticed, and a text that moves between two lines."""
    table = arrow.Table.from_pylist(lines(), schema())
    changed = lines()
    changed[17][name] = "x" if isinstance(changed[17][name], str) else 9999
    missing = lines()
    missing[17][name] = None
    found = {digest_of(arrow.Table.from_pylist(each, schema())) for each in (changed, missing)}
    assert len(found | {digest_of(table)}) == 3

    moved = lines()
    moved[0]["document"], moved[1]["document"] = "", moved[0]["document"] + moved[1]["document"]
    assert digest_of(arrow.Table.from_pylist(moved, schema())) != digest_of(table)
