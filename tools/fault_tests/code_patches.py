"""Code patches for ranks (`FAULT_RUN_PATCH`): jumping clocks, and faults that the runner must find.

- The faults are what a careless change would do to the code. A runner that does not report them is
  worthless.
"""

import datetime
import errno
import importlib
import itertools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

JUMP_SECONDS = 3600.0
CUT = "FAULT_RUN_CUT"
"""`POINT NTH RANK FOLDER`: where `power_cut` cuts the power of the file system of FOLDER."""
FORGET = "FAULT_RUN_FORGET"
"""What `forgets_an_item` leaves out: a flat state of the optimizer, or a number of the run."""
ACKNOWLEDGED = "ledger.acknowledged="
STALE_EVERY = 20


def wrap_points(wrap: Callable[[Callable[[str], None]], Callable[[str], None]]) -> None:
    """Replace `fault_injection.point`, also where a module has imported the function by name."""
    faults: Any = importlib.import_module("k2train.fault_injection")
    point = faults.point
    wrapped = wrap(point)
    for name, module in list(sys.modules.items()):
        if name.startswith("k2train") and getattr(module, "point", None) is point:
            module.point = wrapped  # type: ignore[attr-defined]


def trace(path: str, rank: int) -> None:
    """Write each fault point that this rank reaches into the file at `path`, one write each.

    A kill cannot take back such a line. A fault that fires has a line of its own, `!POINT:ACTION`,
    written before it does.
    """
    faults: Any = importlib.import_module("k2train.fault_injection")
    write, find = _writer(path, rank), faults._find

    def tracing(point: Callable[[str], None]) -> Callable[[str], None]:
        def traced(name: str) -> None:
            write(name)
            point(name)

        return traced

    def found(name: str, armed: Any) -> Any:
        fault = find(name, armed)
        if fault is not None:
            write(f"!{fault.point}:{fault.action}")
        return fault

    wrap_points(tracing)
    faults._find = found


def _writer(path: str, rank: int | str) -> Callable[[str], None]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(name: str) -> None:
        os.write(descriptor, f"{time.monotonic():.6f} {rank} {name}\n".encode())

    return write


def power_cut() -> None:
    """Trace each event that the ledger has acknowledged, and cut the power where `CUT` says.

    The line before a cut is `!power:cut`; then all ranks are killed.
    """
    rank = os.environ["RANK"]
    write = _writer(os.environ["FAULT_RUN_TRACE"], rank)
    ledger: Any = importlib.import_module("k2train.record.ledger").Ledger
    saved: Any = importlib.import_module("k2train.record.events").CheckpointSaved
    append = ledger.append

    def acknowledged(self: Any, event: Any) -> Any:
        entry = append(self, event)
        write(f"{ACKNOWLEDGED}{entry.seq}:{event.checkpoint if isinstance(event, saved) else ''}")
        return entry

    ledger.append = acknowledged
    if armed := os.environ.get(CUT):
        _cut_at_point(armed, rank, write)


def _cut_at_point(armed: str, rank: str, write: Callable[[str], None]) -> None:
    wanted, nth, victim, folder = armed.split(" ", 3)
    disk: Any = importlib.import_module("mounted_disk")
    visits = itertools.count(1)

    def cutting(point: Callable[[str], None]) -> Callable[[str], None]:
        def reached(name: str) -> None:
            if name == wanted and rank == victim and next(visits) == int(nth):
                write("!power:cut")
                disk.cut_power(Path(folder))
                # The ranks of a job are one process group.
                os.killpg(0, signal.SIGKILL)
            point(name)

        return reached

    wrap_points(cutting)


def never_syncs() -> None:
    """A program that never syncs a file: only a power cut shows it."""
    os.fsync = lambda fd: None
    power_cut()


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


def stale_reads() -> None:
    """Let reads of data and checkpoints fail now and then, as on a network file system."""
    write = _writer(os.environ["FAULT_RUN_TRACE"], os.environ["RANK"])
    read, calls = os.preadv, itertools.count(1)

    def stale(descriptor: int, *arguments: Any) -> int:
        if next(calls) % STALE_EVERY == 0:
            write("!read:ESTALE")
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(descriptor, *arguments)

    os.preadv = stale


def writes_in_place() -> None:
    """A save that writes under the final name.

    A kill leaves half a checkpoint that looks complete.
    """
    importlib.import_module("k2train.checkpoint.commit").SaveJob.temporary = property(
        lambda job: job.final
    )


def forgets_an_item() -> None:
    """A resume that leaves out the item of the state that `FORGET` names.

    The curve looks alike, but the run differs.
    """
    item = os.environ.get(FORGET, "exp_avg_sq")
    checkpointing: Any = importlib.import_module("k2train.train.checkpointing")
    state: Any = importlib.import_module("k2train.train.state").TrainState
    optimizer: Any = importlib.import_module("k2train.optim.adamw").ShardedAdamW
    load, restore, write = checkpointing.load_states, state.of.__func__, optimizer.write_parameters
    loaded: list[bool] = []

    def forgetful(path: Path, table: Any, lines: Any, *arguments: Any) -> Any:
        kept = load(path, table, lines, *arguments)
        loaded.append(True)
        if item in lines:
            lines[item].zero_()
        return kept

    def restored(cls: Any, manifest: Any) -> Any:
        found = restore(cls, manifest)
        if item == "step":
            found.step = 0
        return found

    def written(self: Any) -> None:
        if loaded and item == "adam_steps":
            self.adam_steps = 0
        write(self)

    checkpointing.load_states, state.of = forgetful, classmethod(restored)
    optimizer.write_parameters = written


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
