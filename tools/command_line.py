"""Import path of this checkout, and what the command lines of all tools share.

- A tool is a script: only its own folder is on the import path. Importing this module puts the
  checkout there, so a tool works from a fresh clone and never uses another installed k2train.
- Imported before everything of the checkout; isort is told so in `pyproject.toml`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from k2train.command_line import Parser, command, positive

__all__ = ["Parser", "command", "positive"]
