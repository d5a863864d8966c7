"""Croissant description of the training data: each file of the chunks, with its SHA-256, in JSON.

- Croissant 1.0 (http://mlcommons.org/croissant/1.0), the format of `mlcroissant`.
- A file that is in the folder has its place there; another one has its name alone.
- Record sets are the origins of the tokens, from the chunks' Parquet files: Croissant has no reader
  of `.npy`, which `numpy.load` opens.

Alternatives considered:
- Chunks as records: a copy of all tokens in a second format.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from k2train.data.manifest import ChunkInfo
from k2train.proofs.facts import Stage, chunk_files
from k2train.proofs.folder import CoveredFile
from k2train.text import counted

CONFORMS_TO = "http://mlcommons.org/croissant/1.0"
COLUMNS = {
    **dict.fromkeys(("row", "start", "length"), "sc:Integer"),
    **dict.fromkeys(("subset", "source", "document"), "sc:Text"),
}
"""Columns that every provenance file has -> their types."""
COLUMN_TEXTS = {
    "row": "row of the chunk",
    "start": "first token of the piece in its row",
    "length": "tokens of the piece",
    "subset": "part of the mixture",
    "source": "file that the document was read from",
    "document": "name of the document",
}
FORMATS = {"npy": "application/x-npy", "parquet": "application/x-parquet"}
CONTEXT: Mapping[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""JSON-LD context that the specification asks for."""

Json = dict[str, Any]


def data_description(files: Iterable[CoveredFile], stages: Sequence[Stage]) -> Json | None:
    """Return the description of the data of all stages; None where no manifest is known.

    It stands in a folder directly below that of the `files`.
    """
    known = [stage for stage in stages if stage.data is not None]
    if not known:
        return None
    places = {file.sha256: file for file in files}
    listed = [one for stage in known for one in _distribution(stage, places)]
    records = [one for stage in known for one in _record_sets(stage, places)]
    name = known[-1].name
    digests = json.dumps([one["sha256"] for one in listed])

    found: Json = {
        "@context": dict(CONTEXT),
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        "name": f"{name}-training-data",
        "description": _description(known),
        # Versions of Croissant are three numbers. The hash tells which data it is.
        "version": "1.0.0",
        "identifier": f"sha256:{hashlib.sha256(digests.encode()).hexdigest()}",
        "distribution": listed,
    }
    return found | ({"recordSet": records} if records else {})


def described_digests(description: Any) -> dict[str, str]:
    """Return place in the folder -> SHA-256 of the files that a description finds there.

    Raises ValueError.
    """
    try:
        found = {str(one["contentUrl"]): str(one["sha256"]) for one in description["distribution"]}
    except (TypeError, LookupError):
        raise ValueError("is no Croissant description") from None
    return {
        place.removeprefix("../"): digest
        for place, digest in found.items()
        if place.startswith("../")
    }


def _description(stages: Sequence[Stage]) -> str:
    parts = []
    for stage in stages:
        data = stage.data
        assert data is not None, "stages without data are left out"
        tokens = sum(info.tokens for info in stage.chunks)
        parts.append(
            f"{stage.name}: {counted(len(stage.chunks), 'chunk')}, {tokens} tokens in rows of "
            f"{data.sequence_length}, {data.vocab_size} ids, {data.dtype}"
        )
    return "Training data as token ids. " + "; ".join(parts) + "."


def _distribution(stage: Stage, places: Mapping[str, CoveredFile]) -> Iterator[Json]:
    for _, name, digest in chunk_files(stage):
        there = places.get(digest)
        one = {
            "@type": "cr:FileObject",
            "@id": _id(stage, name),
            "name": _id(stage, name),
            "contentUrl": f"../{there.name}" if there else name,
            "encodingFormat": FORMATS.get(name.rpartition(".")[2], "application/octet-stream"),
            "sha256": digest,
        }
        yield one | ({"contentSize": f"{there.bytes} B"} if there else {})


def _record_sets(stage: Stage, places: Mapping[str, CoveredFile]) -> Iterator[Json]:
    for info in (*stage.chunks, *filter(None, [stage.held_out])):
        # A record set of a file that is not there could not be read.
        if info.provenance is not None and info.provenance_sha256 in places:
            yield _record_set(stage, info, info.provenance)


def _record_set(stage: Stage, info: ChunkInfo, file: str) -> Json:
    own = _id(stage, f"{info.name}_pieces")
    return {
        "@type": "cr:RecordSet",
        "@id": own,
        "name": own,
        "description": f"Pieces of the rows of {info.name}: where its tokens come from.",
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"{own}/{column}",
                "name": f"{own}/{column}",
                "description": COLUMN_TEXTS[column],
                "dataType": kind,
                "source": {
                    "fileObject": {"@id": _id(stage, file)},
                    "extract": {"column": column},
                },
            }
            for column, kind in COLUMNS.items()
        ],
    }


def _id(stage: Stage, name: str) -> str:
    return f"{stage.name}/{name}"
