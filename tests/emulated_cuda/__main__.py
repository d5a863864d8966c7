"""Run a program under emulated CUDA: `python -m tests.emulated_cuda SCRIPT ARGUMENTS`.

A module is run by `-m MODULE` in place of the script.

The python must have a CUDA build of torch, of CUDA 13. With EMULATED_CUDA_WAITS=FILE the places
where the host waited for the device are written there when the program ends (with .RANK under a
launcher).
"""

import atexit
import os
import runpy
import sys
from pathlib import Path

from tests.emulated_cuda import libraries

WAITS = "EMULATED_CUDA_WAITS"


def run(arguments: list[str]) -> None:
    """Do what `python ARGUMENTS` does, under emulated CUDA."""
    libraries.load()
    # Not before: it imports torch.
    from tests.emulated_cuda import mode

    mode.install()
    if path := os.environ.get(WAITS):
        rank = os.environ.get("RANK")
        atexit.register(_write, Path(path + (f".{rank}" if rank else "")), mode.JOURNAL)

    first, *rest = arguments
    if first == "-m":
        sys.argv = rest
        # A module that is run is no imported one: runpy warns of that, where this process was
        # forked off a warm one.
        sys.modules.pop(f"{rest[0]}.__main__", None)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


def _write(path: Path, journal: "mode.Journal") -> None:  # type: ignore[name-defined] # noqa: F821
    lines = [f"{count} {what}" for what, count in journal.waits.most_common()]
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    run(sys.argv[1:])
