"""Identity of the documents that were read, and which sources have changed since.

- A source is its name, size and hash. Modification times only save reading what did not change.

Alternatives considered:
- Modification times as the test: they change when nothing does.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from k2train.data.prepare.source import Contents, Source
from k2train.data.prepare.sources.stdlib import topic_page
from k2train.data.source_record import SourceFile
from k2train.errors import DataError
from k2train.retry import stat_retried


def sources_identity(records: Iterable[Mapping[str, Any]]) -> str:
    """Identity of the documents: hash of the names and contents of all sources.

    `records` are the encode records. Raises DataError when a source that two tasks read differed
    between the two.
    """
    hashes: dict[str, str] = {}
    for source in (source for record in records for source in record["sources"]):
        if hashes.setdefault(source["key"], source["sha256"]) != source["sha256"]:
            raise DataError(
                f"{source['key']}: changed while it was prepared; "
                "wait until nothing writes to it, then start again"
            )
    digest = hashlib.sha256()
    for key in sorted(hashes):
        digest.update(f"{key}\0{hashes[key]}\n".encode())
    return digest.hexdigest()


def changed_sources(sources: Iterable[Source], known: Mapping[str, SourceFile]) -> list[str]:
    """Keys of sources that differ from the `known` ones by key, including new and missing ones.

    Equal size and modification time count as equal content. When only the time differs, the file is
    read and compared.
    """
    changed, seen = set(), set()
    for source in sources:
        seen.add(source.key)
        if source.key not in known or not _is_unchanged(source, known[source.key]):
            changed.add(source.key)
    return sorted(changed | (set(known) - seen))


def _is_unchanged(source: Source, known: SourceFile) -> bool:
    """Whether a source still has the known size and hash."""
    if not source.path:
        contents = Contents(source, topic_page(source.name))
    else:
        try:
            status = stat_retried(Path(source.path))
        except OSError:
            return False

        if status is None or status.st_size != known.bytes:
            return False
        # Same size and time: unchanged, without reading the file.
        if status.st_mtime_ns == known.mtime_ns:
            return True
        contents = Contents(source)

    contents.hash_only()
    return bool(contents.facts["sha256"] == known.sha256)
