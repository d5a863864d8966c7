"""Record of a data folder's source files (`sources.json`), and the data that two folders share.

- Two stages must not train on the same documents, so each folder names the files it was made of.
- The manifest has the hash of the record. An older folder without one has no known sources.

Alternatives considered:
- A key of the manifest: every reader of the manifest would parse a line per source file.
"""

from pydantic import Field

from k2train.data.manifest import MAX_MANIFEST_BYTES, Manifest
from k2train.errors import DataError
from k2train.files import sha256_file
from k2train.json_record import Record
from k2train.retry import is_file_retried
from k2train.safe_json import read_json

SOURCES_NAME = "sources.json"


class SourceFile(Record):
    """Size and hash of a source file; its modification time only while a preparation is running."""

    sha256: str
    bytes: int | None = None
    mtime_ns: int | None = None


class Sources(Record):
    """Content of `sources.json`: the source files of a data folder.

    `training` and `held_out` are used whole; `shares` by their documents within a share of [0, 1].
    `files` are all that were read.
    """

    training: tuple[str, ...]
    held_out: tuple[str, ...]
    shares: dict[str, tuple[float, float]] = Field(default_factory=dict)
    files: dict[str, SourceFile] = Field(default_factory=dict)

    @property
    def whole(self) -> frozenset[str]:
        """Files used whole, in training or held out."""
        return frozenset((*self.training, *self.held_out))

    @property
    def contents(self) -> dict[str, str]:
        """Hashes of the used files, where they are recorded."""
        used = self.whole | self.shares.keys()
        return {name: file.sha256 for name, file in self.files.items() if name in used}


def common_data(first: Manifest, second: Manifest) -> list[str]:
    """Describe the data that two folders share: equal chunks, and common source files if recorded.

    Empty when they are disjoint. A source shared by two stages would be seen twice. A file that is
    split inside is shared when its two shares overlap.
    """
    hashes = {info.sha256: info.name for info in first.all_chunks()}
    shared = [
        f"{hashes[i.sha256]} and {i.name}: same bytes"
        for i in second.all_chunks()
        if i.sha256 in hashes
    ]

    later, earlier = read_sources(second), read_sources(first)
    # A file used whole by one folder overlaps with any share of it.
    mixed = (earlier.whole & later.shares.keys()) | (earlier.shares.keys() & later.whole)
    for name in earlier.shares.keys() & later.shares.keys():
        (a, b), (c, d) = earlier.shares[name], later.shares[name]
        # The intervals [a, b) and [c, d) overlap.
        if max(a, c) < min(b, d):
            mixed |= {name}

    found = [f"source {name}" for name in sorted((earlier.whole & later.whole) | mixed)]
    # A file's shares are cut by its name, so equal content under another name is always shared.
    by_content = {digest: name for name, digest in earlier.contents.items()}
    same = [
        (by_content[d], name)
        for name, d in later.contents.items()
        if by_content.get(d, name) != name
    ]

    return (
        shared
        + found
        + [f"source {name} is {other} of the earlier data" for other, name in sorted(same)]
    )


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
