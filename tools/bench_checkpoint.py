"""How fast checkpoints are saved and loaded, beside a plain write and read of the same bytes: `python tools/bench_checkpoint.py`.

One process with fp32 lines of random values, no model behind them. In turns, several times, so that all see the same
disk: a plain write with fsync, a save until its commit, the same with the read-back, a plain read and a load (check of
every hash, then filling the lines), from the disk and from memory; and how long training waits for a save in the background.
Ratios are of medians. Prints a table of text; the peak of resident memory is told beside the state's size.
"""

import argparse
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from k2train.checkpoint.load import agree_on_checkpoint, load_states
from k2train.checkpoint.shards import PIECE_BYTES, drop_caches
from k2train.checkpoint.writer import CheckpointWriter
from k2train.launch.environment import Launch
from k2train.parallel.grad_buffer import ShardLayout
from k2train.parallel.grid import SINGLE, ProcessGrid, start_process_group, stop_process_group
from k2train.parallel.shard import ParamSlice
from k2train.plan.layout import Layout

FACTS = {"step": 1, "adam_steps": 1, "consumed_tokens": 0, "chunks": {}, "config": {}, "data": {}}
STATES = ("master", "exp_avg", "exp_avg_sq")
WIDTH = 2048


def table_of(elements: int, tensors: int) -> ShardLayout:
    """`tensors` matrices of WIDTH columns, `elements` values together (rounded down)."""
    rows = elements // tensors // WIDTH
    shape = (rows, WIDTH)
    pieces = [
        (
            torch.nn.Parameter(torch.empty(shape, device="meta")),
            ParamSlice(f"layers.{n}.weight", shape, 0, 0, rows, 0, 0.02, True),
        )
        for n in range(tensors)
    ]
    return ShardLayout(pieces, SINGLE["dp"])


def seconds_of(part: Callable[[], object]) -> float:
    """How long `part` takes."""
    began = time.monotonic()
    part()
    return time.monotonic() - began


def plain_write(path: Path, content: memoryview) -> None:
    """Write `content` to a new file and sync it."""
    with path.open("wb", buffering=0) as stream:
        for start in range(0, len(content), PIECE_BYTES):
            stream.write(content[start : start + PIECE_BYTES])
        os.fsync(stream.fileno())


def plain_read(path: Path) -> None:
    """Read all files below `path` once, in blocks."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    for file in path.glob("*/*"):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def dirty(lines: dict[str, torch.Tensor]) -> None:
    """Another step's values, so that no copy is of pages that did not change."""
    for line in lines.values():
        line.add_(1.0)


class Bench:
    """The parts that are timed; each leaves the folder as it was, but for `ckpt_000`."""

    def __init__(self, folder: Path, megabytes: int, dtype: torch.dtype):
        self.folder, self.dtype = folder, dtype
        self.grid = ProcessGrid(Layout(), 0, torch.device("cpu"))
        weight_bytes = torch.empty((), dtype=dtype).element_size()
        self.table = table_of(megabytes * 10**6 // (12 + weight_bytes), 8)
        self.lines = {state: torch.rand(self.table.elements) for state in STATES}
        self.times: dict[str, list[float]] = {}
        self.save(0)
        self.bytes = sum(file.stat().st_size for file in (folder / "ckpt_000").glob("*/*"))
        self.content = memoryview(bytearray(os.urandom(1 << 20)) * (self.bytes >> 20))

    def note(self, what: str, seconds: float) -> None:
        self.times.setdefault(what, []).append(seconds)

    def save(self, number: int, background: bool = False) -> None:
        """Save; notes when it was committed and read back (from the copy on), and how long the caller waited."""
        writer = CheckpointWriter(self.folder, self.grid, 0, background)
        # A first snapshot takes fresh memory; all that follow in a run find theirs.
        writer.snapshot(self.table, self.lines, self.dtype)
        dirty(self.lines)
        ends: list[float] = []
        began = time.monotonic()
        frozen = writer.snapshot(self.table, self.lines, self.dtype)
        copied = time.monotonic()
        writer.save(f"ckpt_{number:03d}", frozen, FACTS, lambda *_: ends.append(time.monotonic()))
        waited = time.monotonic() - began
        writer.wait()
        if number == 0:
            return
        if background:
            self.note("background save: training waits", waited)
        else:
            self.note("save: until the commit", ends[0] - copied)
            self.note("save: and read back", time.monotonic() - copied)
            self.note("save waited for: training waits", waited)
        shutil.rmtree(self.folder / f"ckpt_{number:03d}")

    def write(self) -> None:
        path = self.folder / "plain"
        self.note("plain write and fsync", seconds_of(lambda: plain_write(path, self.content)))
        path.unlink()

    def load(self, what: str, cold: bool) -> None:
        path = self.folder / "ckpt_000"

        def whole() -> None:
            taken, refused = agree_on_checkpoint([path], self.grid)
            assert taken is not None, refused
            load_states(path, self.table, self.lines, self.grid, self.dtype)

        for name, part in (
            (f"plain read {what}", lambda: plain_read(path)),
            (f"load {what}", whole),
        ):
            if cold:
                drop_caches(path)
            else:
                plain_read(path)
            self.note(name, seconds_of(part))

    def round(self, number: int) -> None:
        self.write()
        self.save(number)
        self.save(number, background=True)
        self.load("from the disk", cold=True)
        self.load("from memory", cold=False)


BESIDE = {
    "save: until the commit": "plain write and fsync",
    "save: and read back": "plain write and fsync",
    "load from the disk": "plain read from the disk",
    "load from memory": "plain read from memory",
    "background save: training waits": "save waited for: training waits",
}


def report(bench: Bench) -> list[str]:
    """The table: median seconds, GB/s, speed beside the plain form."""
    medians = {what: statistics.median(times) for what, times in bench.times.items()}
    lines = [f"{'':<42}{'seconds':>9}{'GB/s':>7}{'beside plain':>14}"]
    for what, seconds in medians.items():
        ratio = f"{medians[BESIDE[what]] / seconds:14.2f}" if what in BESIDE else ""
        lines.append(f"{what:<42}{seconds:9.3f}{bench.bytes / seconds / 1e9:7.2f}{ratio}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines.append(
        f"{bench.bytes / 1e6:.0f} MB a checkpoint; peak of resident memory {peak / 1e6:.0f} MB"
    )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="bench_checkpoint.py", description="Time saving and loading."
    )
    parser.add_argument("--megabytes", type=int, default=1000, help="size of a checkpoint (1000)")
    parser.add_argument("--rounds", type=int, default=5, help="times each is done (5)")
    parser.add_argument(
        "--weights", choices=("fp32", "bf16"), default="bf16", help="dtype of the weights (bf16)"
    )
    parser.add_argument("--folder", type=Path, default=None, help="a folder on the disk to measure")
    given = parser.parse_args(arguments)
    start_process_group(Launch(0, 1, 0, launched=False), torch.device("cpu"))
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        bench = Bench(
            Path(folder),
            given.megabytes,
            torch.float32 if given.weights == "fp32" else torch.bfloat16,
        )
        for number in range(1, given.rounds + 1):
            bench.round(number)
        print("\n".join(report(bench)))
    stop_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
