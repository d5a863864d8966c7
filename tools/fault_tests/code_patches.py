"""Code patches for ranks (`FAULT_RUN_PATCH`): jumping clocks, and faults that the runner must find.

- The faults are what a careless change would do to the code. A runner that does not report them is
  worthless.
"""

import datetime
import importlib
import itertools
import shutil
import sys
import time
from pathlib import Path
from typing import Any

JUMP_SECONDS = 3600.0


def jumping_clock() -> None:
    """Make the time of day jump by an hour back and forth, ten times a second."""
    real = time.time

    def jumped() -> float:
        return real() + JUMP_SECONDS * (int(real() * 10) % 3 - 1)

    class Jumping(datetime.datetime):
        """A datetime whose `now` follows the jumping clock."""

        @classmethod
        def now(cls, tz: Any = None) -> "Jumping":
            return cls.fromtimestamp(jumped(), tz)

    time.time = jumped

    for module in list(sys.modules.values()):
        if (
            getattr(module, "__name__", "").startswith("k2train")
            and getattr(module, "datetime", None) is datetime.datetime
        ):
            module.datetime = Jumping  # type: ignore[attr-defined]


def writes_in_place() -> None:
    """A save that writes under the final name.

    A kill leaves half a checkpoint that looks complete.
    """
    importlib.import_module("k2train.checkpoint.commit").SaveJob.temporary = property(
        lambda job: job.final
    )


def forgets_a_moment() -> None:
    """A resume that starts the second moments from zero.

    The curve looks alike, but the run differs.
    """
    checkpointing: Any = importlib.import_module("k2train.train.checkpointing")
    load = checkpointing.load_states

    def forgetful(path: Path, table: Any, lines: Any, *arguments: Any) -> Any:
        kept = load(path, table, lines, *arguments)
        lines["exp_avg_sq"].zero_()
        return kept

    checkpointing.load_states = forgetful


def keeps_none() -> None:
    """A save that deletes all older checkpoints first."""
    writer = importlib.import_module("k2train.checkpoint.writer").CheckpointWriter
    save = writer.save
    counter = itertools.count()

    def careless(self: Any, *arguments: Any, **options: Any) -> Any:
        if next(counter) > 1 and self.grid.rank == 0:
            self.wait()
            for path in Path(self.directory).glob("ckpt_???"):
                shutil.rmtree(path)
        return save(self, *arguments, **options)

    writer.save = careless
