"""Removal of temporary files and folders that killed processes left behind.

- Temporary names end in `.host.pid.tmp`. Only those of dead processes of this machine are removed.
- The processes of other machines cannot be checked from here; the end of a preparation removes what
  they left.
- Alternatives considered: removing every such name; two processes may do the same task at once.
"""

import re
import shutil
import socket
from pathlib import Path

from k2train.processes import exists
from k2train.retry import is_folder_retried, list_retried


def remove_leftovers(folder: Path, prefix: str = "") -> None:
    """Remove temporary entries of `folder` that dead processes of this machine left.

    Only names that begin with `prefix` are considered.
    """
    suffix = re.compile(re.escape(f".{socket.gethostname()}.") + r"(\d+)\.tmp$")
    for path in list_retried(folder):
        match = suffix.search(path.name) if path.name.startswith(prefix) else None
        if match is None or exists(int(match[1])):
            continue
        if is_folder_retried(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
