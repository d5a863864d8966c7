"""Checkpoint benchmark: saving and loading beside a plain write and read of the same bytes.

    python tools/bench_checkpoint.py [--megabytes N] [--rounds N] [--folder DIR]
    python tools/bench_checkpoint.py --manifests [--worlds N ...]

- One process with fp32 shards of random values, without a model.
- Timed in turns, several times, so that all phases see the same disk: a plain write with fsync, a
  save until its commit, the same with the read-back, a plain read, and a load. A load checks the
  manifest, reads the optimizer's files into the shards and checks every byte there, from the disk
  and from memory. It is compared with a plain read of the same files: it leaves out the weights.
- Also timed: how long training waits for a save in the background, and the longest time for which
  that save keeps a thread from running that wakes every millisecond.
- Ratios are of medians. The peak of resident memory is shown beside the size of the state.
- `--manifests` times manifests and side files of K2-65B instead, on worlds of any size.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from command_line import Parser, command

from benchmarks.manifests import WORLDS, PauseMeter, manifest_report
from benchmarks.timing import seconds_of
from k2train.checkpoint.load import agree_on_checkpoint, load_states
from k2train.checkpoint.manifest import CheckpointManifest, DataFacts, DataPosition, SaveFacts
from k2train.checkpoint.save_events import SaveEvents, SavePolicy
from k2train.checkpoint.shards import WRITE_BYTES, drop_caches
from k2train.checkpoint.writer import CheckpointWriter
from k2train.launch.environment import Launch
from k2train.parallel.grid import SINGLE, ProcessGrid, start_process_group, stop_process_group
from k2train.parallel.shard import ParamSlice
from k2train.parallel.shard_layout import ShardLayout
from k2train.plan.layout import Layout
from k2train.processes import peak_resident_bytes
from k2train.text import bytes_text, table
from k2train.train.host_memory import startup_objects_frozen

FACTS = SaveFacts(
    step=1,
    adam_steps=1,
    consumed_tokens=0,
    chunks=DataPosition(consumed=0),
    config={},
    data=DataFacts(),
)
STATES = ("master", "exp_avg", "exp_avg_sq")
WIDTH = 2048


class Commits(SaveEvents):
    """When the last checkpoint was complete, before it was read back."""

    at = 0.0

    def committed(self, path: Path, manifest: CheckpointManifest) -> None:
        self.at = time.monotonic()


def shard_layout(elements: int, tensors: int) -> ShardLayout:
    """Layout of `tensors` matrices of WIDTH columns, `elements` values together (rounded down)."""
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


def plain_write(path: Path, content: memoryview) -> None:
    """Write `content` to a new file and fsync it."""
    with path.open("wb", buffering=0) as stream:
        for start in range(0, len(content), WRITE_BYTES):
            stream.write(content[start : start + WRITE_BYTES])
        os.fsync(stream.fileno())


def plain_read(path: Path) -> None:
    """Read the files once, in blocks, that a load of checkpoint `path` reads."""
    buffer = memoryview(bytearray(WRITE_BYTES))
    for file in path.glob("optimizer/*"):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def dirty(shards: dict[str, torch.Tensor]) -> None:
    """Change all values, as a step does, so that every page must be copied again."""
    for shard in shards.values():
        shard.add_(1.0)


class Bench:
    """The timed phases; each leaves the folder as it was, except for `ckpt_000`."""

    def __init__(self, folder: Path, megabytes: int, dtype: torch.dtype):
        self.folder, self.dtype = folder, dtype
        self.grid = ProcessGrid(Layout(), 0, torch.device("cpu"))
        weight_bytes = torch.empty((), dtype=dtype).element_size()
        self.layout = shard_layout(megabytes * 10**6 // (12 + weight_bytes), 8)
        self.shards = {state: torch.rand(self.layout.elements) for state in STATES}
        self.times: dict[str, list[float]] = {}
        self.pauses: list[float] = []
        """Longest pause of another thread in each save in the background."""
        self.save(0)
        self.bytes = sum(file.stat().st_size for file in (folder / "ckpt_000").glob("*/*"))
        self.loaded_bytes = sum(
            file.stat().st_size for file in (folder / "ckpt_000").glob("optimizer/*")
        )
        self.content = memoryview(bytearray(os.urandom(1 << 20)) * (self.bytes >> 20))

    def record(self, what: str, seconds: float) -> None:
        """Record a measured time under its name."""
        self.times.setdefault(what, []).append(seconds)

    def save(self, number: int, background: bool = False) -> None:
        """Save once; record the time to commit and read-back (without the copy), and the wait."""
        commits = Commits()
        writer = CheckpointWriter(
            self.folder, self.grid, SavePolicy(asynchronous=background), commits
        )
        # The first snapshot allocates memory; all later ones of a run reuse it.
        writer.snapshot(self.layout, self.shards, self.dtype)
        dirty(self.shards)

        with PauseMeter() if background else nullcontext() as meter:
            began = time.monotonic()
            frozen = writer.snapshot(self.layout, self.shards, self.dtype)
            copied = time.monotonic()
            writer.save(f"ckpt_{number:03d}", frozen, FACTS)
            waited = time.monotonic() - began
            writer.wait()
            ended = time.monotonic()

        if number == 0:
            return

        if meter is not None:
            self.pauses.append(meter.longest)
            self.record("background save: training waits", waited)
        else:
            self.record("save: until the commit", commits.at - copied)
            self.record("save: and read back", ended - copied)
            self.record("save waited for: training waits", waited)

        shutil.rmtree(self.folder / f"ckpt_{number:03d}")

    def write(self) -> None:
        """Time a plain write of a checkpoint's bytes."""
        path = self.folder / "plain"
        self.record("plain write and fsync", seconds_of(lambda: plain_write(path, self.content)))
        path.unlink()

    def load(self, what: str, cold: bool) -> None:
        """Time a plain read and a load; `cold` without the page cache."""
        path = self.folder / "ckpt_000"

        def whole() -> None:
            taken, refused = agree_on_checkpoint([path], self.grid, to_load=True)
            assert taken is not None, refused
            load_states(path, self.layout, self.shards, self.grid, self.dtype)

        for name, part in (
            (f"plain read {what}", lambda: plain_read(path)),
            (f"load {what}", whole),
        ):
            # The page cache is empty or full on purpose, never by chance.
            if cold:
                drop_caches(path)
            else:
                plain_read(path)
            self.record(name, seconds_of(part))

    def round(self, number: int) -> None:
        """Time every phase once."""
        self.write()
        self.save(number)
        self.save(number, background=True)
        self.load("from the disk", cold=True)
        self.load("from memory", cold=False)


BASELINE = {
    "save: until the commit": "plain write and fsync",
    "save: and read back": "plain write and fsync",
    "load from the disk": "plain read from the disk",
    "load from memory": "plain read from memory",
    "background save: training waits": "save waited for: training waits",
}


def report(bench: Bench) -> list[str]:
    """Table of median seconds, rate, and speed relative to the plain form."""
    medians = {what: statistics.median(times) for what, times in bench.times.items()}
    rows = [
        [
            what,
            f"{seconds:.3f}",
            f"{bytes_text((bench.loaded_bytes if 'from' in what else bench.bytes) / seconds)}/s",
            f"{medians[BASELINE[what]] / seconds:.2f}" if what in BASELINE else "",
        ]
        for what, seconds in medians.items()
    ]
    lines = table(["what", "seconds", "rate", "speed against plain"], rows)

    pause = 1000 * statistics.median(bench.pauses)
    lines.append(f"longest pause of another thread in a save in the background: {pause:.1f} ms")
    peak = peak_resident_bytes()
    lines.append(
        f"{bytes_text(bench.bytes)} per checkpoint, {bytes_text(bench.loaded_bytes)} of them to "
        f"load; peak of resident memory {bytes_text(peak)}"
    )
    return lines


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(prog="bench_checkpoint.py", description="Time saving and loading.")
    parser.add_argument(
        "--megabytes", type=int, default=1000, help="size of a checkpoint in 10^6 bytes (1000)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each phase (5)")
    parser.add_argument(
        "--weights", choices=("fp32", "bf16"), default="bf16", help="dtype of the weights (bf16)"
    )
    parser.add_argument("--folder", type=Path, default=None, help="folder on the disk to measure")
    parser.add_argument(
        "--manifests", action="store_true", help="time manifests of large worlds instead"
    )
    parser.add_argument(
        "--worlds",
        type=int,
        nargs="+",
        default=WORLDS,
        help="ranks of these worlds, multiples of 32 (480 4096 16384)",
    )

    given = parser.parse_args(arguments)
    if given.manifests:
        with startup_objects_frozen(), tempfile.TemporaryDirectory(dir=given.folder) as folder:
            print("\n".join(manifest_report(Path(folder), given.worlds)))
        return 0

    start_process_group(Launch(0, 1, 0, launched=False), torch.device("cpu"))

    with startup_objects_frozen(), tempfile.TemporaryDirectory(dir=given.folder) as folder:
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
