"""Tests of whole programs: the tools as modules, waiting for something, signals."""

import importlib.util
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from tests.support.forkserver import PATIENCE_SECONDS

HANG_SECONDS = PATIENCE_SECONDS
"""Longer than anything takes that does not hang, also on a busy machine; says nothing of speed."""
TOOLS = Path(__file__).resolve().parents[2] / "tools"
TOOL_NAMES = sorted(
    path.stem
    for path in TOOLS.glob("*.py")
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
)
"""Tools that are commands; the other modules belong to them."""


def load_tool(name: str) -> ModuleType:
    """`tools/<name>.py`, imported under another name than a package of ours could have."""
    spec = importlib.util.spec_from_file_location(f"{name}_tool", TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def soon(
    condition: Callable[[], object], seconds: float = HANG_SECONDS, every_seconds: float = 0.02
) -> bool:
    """Whether the condition comes true before something must hang."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_seconds)
    return True


def hear_signals() -> None:
    """For `preexec_fn`: give these signals back their default action.

    The tests may have been started with them ignored, which children inherit and shells keep.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
