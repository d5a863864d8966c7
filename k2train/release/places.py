"""Names in a release folder, and copies that are whole or absent.

- `STAGE/ckpt_NNN` are Hugging Face folders. `STAGE/run` is a directory of a run, which all tools
  of this project read. `STAGE/data` is a data folder.
- `SHA256SUMS` names every other file. It is written last, so a folder without it is not whole.

Alternatives considered:
- Every file at the top: two stages have checkpoints of the same names.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from k2train.errors import RunError
from k2train.files import AtomicFile
from k2train.retry import (
    is_file_retried,
    is_folder_retried,
    is_link_retried,
    list_retried,
    open_retried,
)

CARD, INDEX, INDEX_PAGE = "README.md", "index.json", "INDEX.md"
SUMS = "SHA256SUMS"
NOT_WHOLE = "NOT_WHOLE"
"""File of a folder that is still being written."""
LICENCES = {"code": "LICENSE", "weights": "LICENSE.weights", "data": "LICENSE.data"}
RUN, DATA, FOLLOWING = "run", "data", "following"
MANIFESTS = "manifests"
"""Folder of a run's manifests of checkpoints that are not released."""
EVALUATION, GALLERY, SPIKES, REPORT = "evaluation", "gallery", "spikes", "report.html"
CONTAMINATION = "contamination.json"
ROW_LOSSES = "row_losses"
LEDGER, HEAD, CONFIG = "ledger.jsonl", "ledger.head", "config.yaml"
METRICS, SCORES, ROOTS = "metrics.jsonl", "held_out.jsonl", "state_roots.jsonl"
ORDER = "order.json"
PROOFS = "proofs"
MAX_DEPTH = 32
"""Folders inside each other; a run has six."""


def unfinished(out: Path) -> Path:
    """Return the name of a release while it is written."""
    return out.with_name(f"{out.name}.unfinished")


def files_below(folder: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    """Yield all files below a folder, sorted.

    Raises RunError for links, pipes and devices, and for folders more than `depth` deep.
    """
    if depth == 0:
        raise RunError(f"{folder.name} is nested more than {MAX_DEPTH} folders deep")
    for path in list_retried(folder):
        if is_link_retried(path):
            raise RunError(f"{path} is a link; a release holds files and folders only")
        if is_folder_retried(path):
            yield from files_below(path, depth - 1)
        elif is_file_retried(path):
            yield path
        else:
            # Reading a pipe would wait for its writer.
            raise RunError(f"{path} is no plain file; a release holds files and folders only")


def copy_file(source: Path, place: Path) -> None:
    """Copy a file; it is whole and synced, or not there. Raises OSError."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with open_retried(source) as stream, AtomicFile(place) as copy:
        shutil.copyfileobj(stream, copy, 2**22)


def copy_tree(source: Path, place: Path) -> None:
    """Copy all files below a folder, except temporary ones. Raises OSError, RunError."""
    for path in files_below(source):
        if path.suffix != ".tmp":
            copy_file(path, place / path.relative_to(source))


def write_bytes(place: Path, content: bytes) -> None:
    """Write a file; it is whole and synced, or not there. Raises OSError."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with AtomicFile(place) as stream:
        stream.write(content)


def size_below(folder: Path) -> int:
    """Return the bytes of all files below a folder; 0 without one."""
    if not is_folder_retried(folder):
        return 0
    return sum(os.stat(path).st_size for path in files_below(folder))
