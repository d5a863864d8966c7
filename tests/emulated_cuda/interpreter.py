"""The python whose torch is a CUDA build, and what has to be there for the emulated tests.

- K2TRAIN_CUDA_PYTHON names it. `scripts/setup_cuda.sh` makes one.
- Continuous integration installs it while other tests run: K2TRAIN_CUDA_INSTALLED names a file
  that is written when the installation has ended: `ok`, or why there is none.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

PYTHON, INSTALLED = "K2TRAIN_CUDA_PYTHON", "K2TRAIN_CUDA_INSTALLED"
PATIENCE_SECONDS = 1800.0
"""A guard against waiting for ever: the installation has a limit of its own, below this."""
CUDA = "13."
"""Version that the emulated runtime is made for."""


def why_not() -> str | None:
    """Return why the emulated tests cannot run here; None when they can.

    Waits for an installation that is under way. Raises AssertionError where a python is named that
    cannot be used: whoever names one wants the tests to run.
    """
    named = os.environ.get(PYTHON)
    if not named:
        return (
            f"no CUDA build of torch: bash scripts/setup_cuda.sh FOLDER, "
            f"then export {PYTHON}=FOLDER/bin/python"
        )
    if (ended := _end_of_installation()) not in (None, "ok"):
        return f"a CUDA build of torch could not be installed: {ended}"

    assert shutil.which("gcc") is not None, f"{PYTHON} is set, and there is no gcc"
    asked = subprocess.run(
        [named, "-c", "import torch; print(torch.version.cuda)"],
        capture_output=True,
        text=True,
    )
    version = asked.stdout.strip()
    assert version.startswith(CUDA), (
        f"{PYTHON} ({named}) must have a torch for CUDA {CUDA}x, not {version or asked.stderr}"
    )
    return None


def _end_of_installation() -> str | None:
    """Return what the installation has said at its end; None where none was started."""
    if not (path := os.environ.get(INSTALLED)):
        return None
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not Path(path).exists():
        assert time.monotonic() < deadline, f"no {path} after {PATIENCE_SECONDS:.0f} s"
        time.sleep(0.5)
    return Path(path).read_text(encoding="utf-8").strip()
