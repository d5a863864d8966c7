"""Descriptions of data: mlcroissant loads them, reads their records, and finds a changed byte."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import mlcroissant
import pytest

from k2train.proofs.croissant import data_description, described_digests
from k2train.proofs.facts import read_stages
from k2train.proofs.folder import CoveredFile
from tests.proofs.conftest import SUBSETS, Made, used_files

RECORDS = "tiny/chunk_001_pieces"


def load(folder: Path) -> Any:
    """The description, as mlcroissant reads it."""
    return mlcroissant.Dataset(jsonld=str(folder / "proofs" / "croissant.json"))


def first_records(folder: Path, count: int) -> list[dict[str, Any]]:
    """The first records of a chunk's pieces, by column."""
    rows = islice(load(folder).records(record_set=RECORDS), count)
    return [{key.rpartition("/")[2]: value for key, value in row.items()} for row in rows]


def test_mlcroissant_reads_it(signed: Path) -> None:
    """Catches an error of the format, and records that are not those of the chunk."""
    data = load(signed)
    assert not data.metadata.issues.errors
    assert "context" not in data.metadata.issues.report()
    files = [one for one in data.metadata.distribution]
    assert sorted(one.name for one in files if one.name.endswith(".npy")) == [
        "tiny/chunk_000.npy",
        "tiny/chunk_001.npy",
        "tiny/held_out.npy",
    ]
    first, second = first_records(signed, 2)
    assert (first["row"], first["start"], first["length"]) == (0, 0, SUBSETS["letters"])
    assert (second["start"], second["subset"]) == (SUBSETS["letters"], b"forms")
    assert (second["source"], second["document"]) == (b"forms.txt", b"chunk_001-1")


def test_a_changed_byte_is_found(own: Path) -> None:
    """Catches a hash that nobody compares: mlcroissant reads no records of a changed file."""
    path = own / "data" / "chunk_001.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(mlcroissant.GenerationError, match="Download") as caught:
        first_records(own, 1)
    assert "is not identical" in str(caught.value.__cause__)


def test_data_elsewhere_has_a_name_alone(made: Made, tmp_path: Path) -> None:
    """Catches a place that leads nowhere, and records that cannot be read."""
    stages = read_stages([made.run])
    found = data_description([CoveredFile("model.safetensors", 1, "0" * 64)], stages)
    assert found is not None and "recordSet" not in found and described_digests(found) == {}
    assert {one["contentUrl"] for one in found["distribution"]} == {
        path.name for path in used_files(made.data)
    }
    (tmp_path / "proofs").mkdir()
    (tmp_path / "proofs" / "croissant.json").write_text(json.dumps(found))
    assert not load(tmp_path).metadata.issues.errors


def test_what_is_no_description_is_one_line() -> None:
    """Catches a traceback for a file from elsewhere."""
    for broken in (None, [], {}, {"distribution": [1]}):
        with pytest.raises(ValueError, match="is no Croissant"):
            described_digests(broken)
