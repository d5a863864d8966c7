"""Side files of a checkpoint: what its shard files hold, with hashes, named by their own hash. No
torch.

    ckpt_007/facts/optimizer-shard-00001-model-00001-of-00001.json   header hash, blocks, pieces
    ckpt_007/facts/files-optimizer-00001.json                        facts of many shard files

- The rank that writes a shard file writes its side file, too. The manifest holds only the hash of
  each. A large world's table of files is cut into groups: a tree of hashes with the manifest as its
  root.
- No text is so long that one call of the JSON library keeps other threads from running for long.
- A rank reads the side files that it needs, each once. What is kept in memory is found by hash.

Alternatives considered:
- One table for all ranks: at 16,384 ranks every rank would read gigabytes, mostly about others.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from k2train.checkpoint.manifest_types import (
    FACTS,
    FOLDERS,
    CheckpointManifest,
    FileFacts,
    FileGroup,
    FileTableFacts,
    PieceFacts,
    ShardFacts,
)
from k2train.errors import CheckpointError
from k2train.json_record import first_mistake
from k2train.retry import is_link_retried
from k2train.safe_json import parse_json, read_plain_file

GROUP_FILES = 512
"""Shard files whose facts fit into one side file; more are cut into groups."""
KNOWN_SIDE_FILES = 8
"""Side files kept in memory: a rank's own, its neighbour's, and the groups that list them."""

T = TypeVar("T", bound=BaseModel)

_dumps = partial(json.dumps, sort_keys=True, separators=(",", ":"))


def side_name(name: str) -> str:
    """Name of the side file of the shard file `name`."""
    file = PurePosixPath(name)
    return f"{FACTS}/{file.parent.name}-{file.stem}.json"


def write_pieces(path: Path, name: str, facts: FileFacts, pieces: PieceFacts) -> FileFacts:
    """Write and sync the side file of shard file `name`; return `facts` with its hash.

    Raises OSError.
    """
    return facts.model_copy(update={"facts_sha256": _write(path / side_name(name), pieces)})


def group_files(
    path: Path, count: int, files: Callable[[str], Iterator[tuple[str, FileFacts]]]
) -> tuple[dict[str, FileFacts], dict[str, FileGroup]]:
    """Return the manifest's `files` and `groups`: many files go into side files, written here.

    `files` gives those of a folder, in the order of names; `count` is that of all. Raises OSError.
    """
    if count <= GROUP_FILES:
        return {name: facts for folder in FOLDERS for name, facts in files(folder)}, {}

    groups: dict[str, FileGroup] = {}
    for folder in FOLDERS:
        rest = files(folder)
        while held := dict(islice(rest, GROUP_FILES)):
            name = f"{FACTS}/files-{folder}-{len(groups) + 1:05d}.json"
            groups[name] = FileGroup(
                folder=folder,
                files=len(held),
                bytes=sum(facts.bytes for facts in held.values()),
                sha256=_write(path / name, FileTableFacts(files=held)),
            )
    return {}, groups


def _write(path: Path, content: BaseModel) -> str:
    text = _dumps(content.model_dump(mode="json", exclude_unset=True)).encode()
    # Part of a checkpoint that has no name yet: neither atomic nor known to anybody.
    with path.open("xb") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    return sha256(text).hexdigest()


class _KnownSideFiles:
    """Side files by their hash, the last few of them; thread-safe."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}
        self._lock = threading.Lock()

    def get(self, sha: str) -> Any:
        with self._lock:
            return self._known.get(sha)

    def put(self, sha: str, content: Any) -> None:
        with self._lock:
            self._known.pop(sha, None)
            self._known[sha] = content
            while len(self._known) > KNOWN_SIDE_FILES:
                self._known.pop(next(iter(self._known)))


_known_side_files = _KnownSideFiles()


def _read(path: Path, name: str, sha: str, kind: type[T], fresh: bool, keep: bool = True) -> T:
    """Read a side file, or find it in memory; raises CheckpointError and UnavailableError."""
    found = None if fresh else _known_side_files.get(sha)
    if isinstance(found, kind):
        return found

    try:
        # A link inside the checkpoint could point out of it.
        if is_link_retried(path / name):
            raise ValueError("a symbolic link")
        text = read_plain_file(path / name)
    except OSError as error:
        raise CheckpointError(f"{path}: {name} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {name} is {error}") from None

    if sha256(text).hexdigest() != sha:
        raise CheckpointError(
            f"{path}: {name} does not match its hash in the manifest; it was changed or damaged"
        )
    try:
        content = kind.model_validate(parse_json(text))
    except ValidationError as error:
        raise CheckpointError(f"{path / name}: {first_mistake(error)}") from None
    except ValueError as error:
        raise CheckpointError(f"{path / name}: not valid JSON ({error})") from None

    if keep:
        _known_side_files.put(sha, content)
    return content


def read_pieces(
    path: Path, manifest: CheckpointManifest, name: str, facts: FileFacts, fresh: bool = False
) -> PieceFacts | ShardFacts | None:
    """Return what shard file `name` with these `facts` holds; None in format 1.

    `fresh` reads the side file even if it is known. Raises CheckpointError, UnavailableError.
    """
    if facts.facts_sha256 is None:
        return manifest.shards.get(name)
    return _read(path, side_name(name), facts.facts_sha256, PieceFacts, fresh)


class FileTable:
    """Shard files of checkpoint `path` with their facts, read from side files where they lie there.

    `fresh` reads side files even if they are known. Methods raise CheckpointError, and
    UnavailableError when a side file cannot be read for now.
    """

    def __init__(self, path: Path, manifest: CheckpointManifest, fresh: bool = False) -> None:
        self.path, self.manifest, self.fresh = path, manifest, fresh
        self._groups: dict[str, Sequence[tuple[str, FileFacts]]] = {}

    def count(self, folder: str) -> int:
        """Number of files of `folder`."""
        return sum(len(part) for _, part in self._parts(folder))

    def names(self, folder: str) -> set[str]:
        """Return the names of all files of `folder`; their facts are not kept."""
        found: set[str] = set()
        for _, part in self._parts(folder):
            files = part if isinstance(part, list) else self._read_group(part, keep=False)
            found.update(name for name, _ in files)
        return found

    def all(self, folder: str) -> dict[str, FileFacts]:
        """Return every file of `folder`, sorted by name."""
        return self.share(folder, 0, 1)

    def shares(self, folders: Sequence[str], first: int, step: int) -> dict[str, FileFacts]:
        """Return the `share` of every one of `folders`."""
        parts = (self.share(folder, first, step) for folder in folders)
        return {name: facts for part in parts for name, facts in part.items()}

    def share(self, folder: str, first: int, step: int) -> dict[str, FileFacts]:
        """Return every `step`-th file of `folder` from index `first` on, in the order of names.

        Only the groups that hold one of them are read.
        """
        found: dict[str, FileFacts] = {}
        for start, part in self._parts(folder):
            # Indices within the part that are `first` modulo `step` in the whole.
            begin = first - start if first >= start else (first - start) % step
            wanted = range(begin, len(part), step)
            if wanted:
                names = part if isinstance(part, list) else self._read_group(part)
                found.update(list(names)[index] for index in wanted)
        return found

    def _parts(self, folder: str) -> "Iterator[tuple[int, list[tuple[str, FileFacts]] | _Group]]":
        """Yield (index of its first file, part) in the order of names."""
        own = sorted(
            item for item in self.manifest.files.items() if item[0].startswith(f"{folder}/")
        )
        yield 0, own
        start = len(own)
        for name in sorted(self.manifest.groups):
            group = self.manifest.groups[name]
            if group.folder == folder:
                yield start, _Group(name, group)
                start += group.files

    def _read_group(self, group: "_Group", keep: bool = True) -> Sequence[tuple[str, FileFacts]]:
        if group.name in self._groups:
            return self._groups[group.name]
        facts = group.facts
        table = _read(self.path, group.name, facts.sha256, FileTableFacts, self.fresh, keep).files
        if len(table) != facts.files or not all(
            name.startswith(f"{facts.folder}/") and file.facts_sha256
            for name, file in table.items()
        ):
            raise CheckpointError(f"{self.path}: {group.name} lists other files than it should")
        files = sorted(table.items())
        if keep:
            self._groups[group.name] = files
        return files


class _Group:
    """A group of the manifest by its name; as long as its files are many."""

    def __init__(self, name: str, facts: FileGroup) -> None:
        self.name, self.facts = name, facts

    def __len__(self) -> int:
        return self.facts.files
