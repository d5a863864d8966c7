"""Files of a folder that proofs cover: names, sizes and SHA-256, and which belong to checkpoints.

- Covered is every file of the folder but those in `proofs/` and, at its root, what belongs to git.
- A checkpoint is a folder with `.safetensors` files, or the one above `model/` and `optimizer/`.
- A symbolic link is refused: its target can change without a byte of the folder.
- A private key in the folder is refused: it would be published with it.

Alternatives considered:
- A list of known files: an added file would be covered by nothing, and nobody would see it.
"""

import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from k2train.errors import RunError
from k2train.files import sha256_file
from k2train.retry import (
    is_folder_retried,
    is_link_retried,
    list_retried,
    read_retried,
    stat_retried,
)

PROOFS = "proofs"
"""Folder of the proofs in the folder that they are about."""
TIMESTAMPS = "timestamps"
"""Folder of time stamps in `proofs/`; they are made after the signature."""
GIT = frozenset({".git", ".gitattributes", ".github", ".gitignore"})
"""Names at the root that a model signature leaves out by default."""
SHARD_FOLDERS = ("model", "optimizer")
MAX_KEY_BYTES = 2**16
"""No file with a key is larger."""
PRIVATE = b"PRIVATE KEY-----"


class CoveredFile(NamedTuple):
    """A file of the folder by its name in it, with `/` on every system."""

    name: str
    bytes: int
    sha256: str


def covered_files(folder: Path) -> list[CoveredFile]:
    """Hash every covered file of a folder, by name.

    Raises RunError for a folder that is none, a link and a private key; OSError, UnavailableError.
    """
    if not is_folder_retried(folder):
        raise RunError(f"{folder} is not a folder; give a run, an export or a release")

    found = []
    for path in _walk(folder, folder):
        facts = stat_retried(path)
        if facts is None:
            raise RunError(f"{path} went away; the folder must not change meanwhile")
        if not stat.S_ISREG(facts.st_mode):
            raise RunError(f"{path} is no plain file; remove it")
        if facts.st_size <= MAX_KEY_BYTES and PRIVATE in read_retried(path):
            raise RunError(f"{path} holds a private key; move it out of the folder")
        name = path.relative_to(folder).as_posix()
        found.append(CoveredFile(name, facts.st_size, sha256_file(path)))
    return sorted(found)


def _walk(folder: Path, root: Path) -> Iterator[Path]:
    for path in list_retried(folder):
        if folder == root and path.name in (PROOFS, *GIT):
            continue
        if is_link_retried(path):
            raise RunError(f"{path} is a symbolic link; copy the file itself into the folder")
        if is_folder_retried(path):
            yield from _walk(path, root)
        else:
            yield path


def checkpoint_files(files: Iterable[CoveredFile]) -> list[CoveredFile]:
    """Return the files of checkpoints: weights, and what is in the same folder or below it.

    Raises RunError where there is none.
    """
    listed = list(files)
    folders = {
        parent.parent if parent.name in SHARD_FOLDERS else parent
        for file in listed
        if file.name.endswith(".safetensors")
        for parent in (PurePosixPath(file.name).parent,)
    }
    if not folders:
        raise RunError("the folder has no weights (*.safetensors); give a run, export or release")
    return [file for file in listed if not folders.isdisjoint(PurePosixPath(file.name).parents)]
