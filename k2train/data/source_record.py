"""Record of a data folder's source files (`sources.json`), and the data that two folders share.

- Two stages must not train on the same documents, so each folder names the files it was made of.
- The manifest has the hash of the record. An older folder without one has no known sources.

Alternatives considered:
- A key of the manifest: every reader of the manifest would parse a line per source file.
"""

from dataclasses import dataclass

from pydantic import Field

from k2train.data.manifest import MAX_MANIFEST_BYTES, Manifest
from k2train.data.text_record import TEXTS_NAME, TextOverlap, open_texts, sampled_overlap
from k2train.errors import DataError
from k2train.files import sha256_file
from k2train.json_record import Record
from k2train.retry import is_file_retried
from k2train.safe_json import read_json

SOURCES_NAME = "sources.json"
CHUNKS_ALONE, CHUNKS_AND_FILES = "chunks alone", "chunks and source files"
"""What was compared where texts could not be, with the reason behind it."""


class SourceFile(Record):
    """Size and hash of a source file; its modification time only while a preparation is running."""

    sha256: str
    bytes: int | None = None
    mtime_ns: int | None = None


class Sources(Record):
    """Content of `sources.json`: the source files of a data folder.

    `training` and `held_out` are used whole. Of others only a share of [0, 1] is used: of their
    documents by name (`shares`), or by text (`text_shares`). `files` are all that were read.
    """

    training: tuple[str, ...]
    held_out: tuple[str, ...]
    shares: dict[str, tuple[float, float]] = Field(default_factory=dict)
    text_shares: dict[str, tuple[float, float]] = Field(default_factory=dict)
    files: dict[str, SourceFile] = Field(default_factory=dict)

    @property
    def whole(self) -> frozenset[str]:
        """Files used whole, in training or held out."""
        return frozenset((*self.training, *self.held_out))

    @property
    def contents(self) -> dict[str, str]:
        """Hashes of the used files, where they are recorded."""
        used = self.whole | self.shares.keys() | self.text_shares.keys()
        return {name: file.sha256 for name, file in self.files.items() if name in used}


@dataclass(frozen=True)
class Comparison:
    """What two data folders share, a line each, and what was compared, in words."""

    shared: tuple[str, ...]
    method: str


def compare_data(first: Manifest, second: Manifest) -> Comparison:
    """Compare an earlier and a later data folder: chunks, then texts, or else source files.

    Texts are compared where both folders have a record of them: all of few, a sample of many. With
    a sample, source files are compared too, unless the later folder left out all texts of the
    earlier one. A file that is split inside is shared when its two shares overlap.

    A damaged record of the earlier folder is not compared, and the method says so. Raises DataError
    for one of the later folder.
    """
    shared = _common_chunks(first, second)
    overlap, why = _text_overlap(first, second)
    if overlap is not None and overlap.shared:
        shared.append(overlap.message)
    if overlap is not None and overlap.is_exact:
        return Comparison(tuple(shared), overlap.method)

    left_out = first.facts.texts is not None and first.facts.texts.sha256 in second.facts.seen
    if overlap is not None and left_out:
        how = "the recipe left out what the earlier data has"
        return Comparison(tuple(shared), f"{overlap.method}; {how}")

    mine = read_sources(second)
    try:
        theirs = read_sources(first)
    except DataError:
        missing = f"the list of source files of {first.path.parent.name} is missing or damaged"
        method = f"{CHUNKS_ALONE} ({why}; {missing})"
        if overlap is not None:
            method = f"{overlap.method}; {missing}"
        return Comparison(tuple(shared), method)

    method = f"{CHUNKS_AND_FILES} ({why})"
    if overlap is not None:
        method = f"{overlap.method}, and source files"
    return Comparison((*shared, *_common_sources(theirs, mine)), method)


def _text_overlap(first: Manifest, second: Manifest) -> tuple[TextOverlap | None, str]:
    """Compare the texts of two folders; None, and why, where the records do not allow it."""
    later = open_texts(second)
    try:
        earlier = open_texts(first)
        if earlier is not None and later is not None:
            return sampled_overlap(earlier, later), ""
    except DataError as error:
        # What is wrong with a record begins with its path.
        if not str(error).startswith(f"{first.folder / TEXTS_NAME}:"):
            raise
        return None, f"the record of texts of {first.path.parent.name} is missing or damaged"
    without = [m.path.parent.name for m, t in ((first, earlier), (second, later)) if t is None]
    return None, f"{' and '.join(without)} without a record of texts"


def common_data(first: Manifest, second: Manifest) -> list[str]:
    """The data that two folders share, see `compare_data`; empty when they are disjoint."""
    return list(compare_data(first, second).shared)


def _common_chunks(first: Manifest, second: Manifest) -> list[str]:
    """Describe equal chunks of two folders."""
    hashes = {info.sha256: info.name for info in first.all_chunks()}
    return [
        f"{hashes[i.sha256]} and {i.name}: same bytes"
        for i in second.all_chunks()
        if i.sha256 in hashes
    ]


def _common_sources(earlier: Sources, later: Sources) -> list[str]:
    """Describe the files that two folders share."""
    whole, named, texts = (
        {name: (0.0, 1.0) for name in (*earlier.training, *earlier.held_out)},
        earlier.shares,
        earlier.text_shares,
    )
    used = {**whole, **named, **texts}
    mine = {**{name: (0.0, 1.0) for name in later.whole}, **later.shares, **later.text_shares}

    found = []
    for name in sorted(used.keys() & mine.keys()):
        # A share by text and one by name are cut at different documents, so they overlap.
        alike = (name in named) == (name in later.shares)
        if not alike or _overlap(used[name], mine[name]):
            found.append(f"source {name}")

    # A share by name is cut by the file's name too, so equal content under another name overlaps.
    by_content = {digest: name for name, digest in earlier.contents.items()}
    same = []
    for name, digest in later.contents.items():
        other = by_content.get(digest, name)
        by_text = name in later.text_shares and other in texts
        if other != name and (not by_text or _overlap(texts[other], later.text_shares[name])):
            same.append((other, name))

    return found + [f"source {name} is {other} of the earlier data" for other, name in sorted(same)]


def _overlap(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether the intervals [a, b) and [c, d) overlap."""
    return max(first[0], second[0]) < min(first[1], second[1])


def read_sources(manifest: Manifest) -> Sources:
    """Read the recorded sources of a data folder; none when it has no record.

    Raises DataError for a damaged record.
    """
    path, recorded = manifest.folder / SOURCES_NAME, manifest.facts.sources_sha256
    if recorded is None:
        return Sources(training=(), held_out=())

    if not is_file_retried(path) or sha256_file(path) != recorded:
        raise DataError(
            f"{path}: missing, or not the file {manifest.path} was written with; fetch it again"
        )

    try:
        return Sources.parse(read_json(path, MAX_MANIFEST_BYTES))
    except ValueError as error:
        raise DataError(f"{path}: is not a record of sources ({error}); fetch it again") from None
