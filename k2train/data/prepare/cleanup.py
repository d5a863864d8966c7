"""What a killed attempt left: files and folders under a name of its own, removed when nobody can be writing them.

A name ends in `.host.pid.tmp`. Only what a dead process of this machine left goes; of another machine's processes
nothing is known here, and the end of a preparation sweeps what they left. Removing whatever has the ending was
refused: two processes may do the same task at once.
"""

import os
import re
import shutil
import socket
from pathlib import Path


def remove_leftovers(folder: Path, prefix: str = "") -> None:
    """Remove from `folder` what dead processes of this machine left under names that begin with `prefix`."""
    suffix = re.compile(re.escape(f".{socket.gethostname()}.") + r"(\d+)\.tmp$")
    for path in list(folder.iterdir()):
        match = suffix.search(path.name) if path.name.startswith(prefix) else None
        if match is None or is_alive(int(match[1])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine has this number; one of another user counts."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
