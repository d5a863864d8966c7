"""A process in which importing torch is an error, and the server that forks it.

- What answers before torch is imported has then been imported, so a command line starts in
  milliseconds.
- That its own modules load no torch is seen by the import of this one.
"""

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class Refuse(importlib.abc.MetaPathFinder):
    """Finds torch before Python does."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.split(".")[0] == "torch":
            raise AssertionError("torch was imported")
        return None


assert "torch" not in sys.modules, "this process has it already"
sys.meta_path.insert(0, Refuse())

import k2train.train.__main__  # noqa: E402
import k2train.train.preflight  # noqa: E402, F401
