"""Files of a gallery: pages, scripts and data, written so that a reader never sees a mixture.

- Scripts and data are in a folder named by the hash of their content. The pages name it and are
  replaced last, one at a time; then older folders are removed.
- Data are scripts that hand over one JSON value: a page that is opened from a disk may load
  scripts, but may read no file.
- A text of a model appears in data files alone, in ASCII, with everything else as `\\u` escapes.
- A folder that holds something else is refused.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from k2train.errors import RunError
from k2train.files import AtomicFile, alone_in, sync_directory
from k2train.gallery.style import STYLE
from k2train.retry import exists_retried, is_folder_retried, list_retried
from k2train.safe_json import read_plain_file

MARKER = "gallery.json"
PREFIX = "files_"
STATIC = Path(__file__).parent / "static"
SCRIPTS = (
    *("store.js", "text.js", "controls.js", "keys.js", "chart.js"),
    *("prompts.js", "evaluation.js"),
)
MAX_SCRIPT_BYTES = 2**20


@dataclass(frozen=True)
class Written:
    """What was written: the first page, and all bytes of the gallery."""

    page: Path
    bytes: int
    files: int


def refuse_other(folder: Path) -> None:
    """Raise RunError where `folder` holds something else than a gallery, which would be mixed."""
    if not exists_retried(folder):
        return
    if not is_folder_retried(folder):
        raise RunError(f"--out: {folder} is no folder; name a new one")
    if list_retried(folder) and not exists_retried(folder / MARKER):
        raise RunError(f"--out: {folder} has files and is no gallery; name a new folder")


def data_script(name: str, value: Any) -> bytes:
    """Return a data file: a call that hands one value to the page.

    JSON in ASCII is JavaScript, whatever its texts hold.
    """
    content = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return f"gallery.take({json.dumps(name)},{content});\n".encode("ascii")


def write_site(
    folder: Path, pages: Iterable[tuple[str, str]], data: Iterable[tuple[str, Any]]
) -> Written:
    """Write a gallery; `pages` are HTML with `{files}` for the folder of scripts and data.

    Raises RunError for a folder of something else, OSError.
    """
    refuse_other(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Each process removes the folders of others.
    with alone_in(folder):
        return _write_alone(folder, pages, data)


def _write_alone(
    folder: Path, pages: Iterable[tuple[str, str]], data: Iterable[tuple[str, Any]]
) -> Written:
    _write(folder / MARKER, b'{"format": 1}\n')
    growing = folder / f"{PREFIX}new_{os.getpid()}.tmp"
    # Left by a process that was killed: containers give the same numbers again.
    shutil.rmtree(growing, ignore_errors=True)
    try:
        name, size, count = _write_files(growing, data)
        if exists_retried(folder / name):
            shutil.rmtree(growing)
        else:
            os.rename(growing, folder / name)
    except BaseException:
        shutil.rmtree(growing, ignore_errors=True)
        raise
    sync_directory(folder)

    first = None
    for page, html in pages:
        content = html.replace("{files}", name).encode()
        _write(folder / page, content)
        size, count, first = size + len(content), count + 1, first or folder / page
    assert first is not None, "a gallery has pages"
    for path in list_retried(folder):
        if path.name.startswith(PREFIX) and path.name != name:
            shutil.rmtree(path, ignore_errors=True)
    return Written(first, size, count)


def _write_files(folder: Path, data: Iterable[tuple[str, Any]]) -> tuple[str, int, int]:
    """Write scripts and data; return the name by their content, their bytes and number."""
    folder.mkdir()
    digest, size, count = sha256(), 0, 0
    for name, content in _contents(data):
        digest.update(f"{name} {len(content)}\n".encode() + content)
        with (folder / name).open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        size, count = size + len(content), count + 1
    sync_directory(folder)
    return f"{PREFIX}{digest.hexdigest()[:16]}", size, count


def _contents(data: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, bytes]]:
    yield "gallery.css", STYLE.encode()
    for name in SCRIPTS:
        yield name, read_plain_file(STATIC / name, MAX_SCRIPT_BYTES)
    for name, value in data:
        yield f"data_{name}.js", data_script(name, value)


def _write(path: Path, content: bytes) -> None:
    with AtomicFile(path, f".{os.getpid()}") as stream:
        stream.write(content)
