"""Manifest bench: bytes, seconds and interpreter pauses of K2-65B's manifests on any world.

- The files are made by the code of a save, for tensor 8, pipeline 4, and data parallelism for the
  rest. Shard files themselves are not written, and side files only of the ranks that are read.
- A thread that wakes every millisecond notes its longest pause: what a training thread would wait
  while the work holds the interpreter. The first row shows that of the machine alone.
- What a start has made is taken out of the garbage collection before, as training does.
- Each row is one role's work in a save or at a start, in one thread.
"""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from k2train.checkpoint import manifest, side_files
from k2train.checkpoint.commit import manifest_content
from k2train.checkpoint.gathered_files import GatheredFiles, pack_files, shard_name
from k2train.checkpoint.likely_files import likely_files
from k2train.checkpoint.manifest import (
    FACTS,
    MANIFEST,
    BlockFacts,
    CheckpointManifest,
    DataFacts,
    DataPosition,
    FileFacts,
    PieceFacts,
    SaveFacts,
    manifest_text,
    read_manifest,
)
from k2train.checkpoint.run_facts import RunIdentity
from k2train.checkpoint.shards import PIECE_BYTES
from k2train.checkpoint.side_files import FileTable, read_pieces, write_pieces
from k2train.files import write_synced
from k2train.parallel.shard import even_slice
from k2train.plan.layout import Layout
from k2train.text import bytes_text, table

WORLDS = (480, 4096, 16384)
TENSOR, PIPELINE, LAYERS, CHUNKS = 8, 4, 80, 360
HIDDEN, FFN, VOCAB = 8192, 22016, 32032
STATES = {"master": 4, "exp_avg": 4, "exp_avg_sq": 4}
FOLDERS = {"model": {"": 2}, "optimizer": {f".{state}": n for state, n in STATES.items()}}
"""What the name of a tensor ends with in each folder, and its bytes per value."""
HASH = sha256(b"").hexdigest()


def tensors_of_stage(stage: int) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """Global shape and tensor-parallel dimension of every tensor of a pipeline stage."""
    found: dict[str, tuple[tuple[int, ...], int | None]] = {}
    if stage == 0:
        found["embedding.weight"] = ((VOCAB, HIDDEN), 0)
    for layer in range(stage * LAYERS // PIPELINE, (stage + 1) * LAYERS // PIPELINE):
        for name in ("query", "key", "value"):
            found[f"layers.{layer}.attention.{name}.weight"] = ((HIDDEN, HIDDEN), 0)
        found[f"layers.{layer}.attention.output.weight"] = ((HIDDEN, HIDDEN), 1)
        for name in ("gate", "up"):
            found[f"layers.{layer}.mlp.{name}.weight"] = ((FFN, HIDDEN), 0)
        found[f"layers.{layer}.mlp.down.weight"] = ((HIDDEN, FFN), 1)
        for name in ("attention_norm", "mlp_norm"):
            found[f"layers.{layer}.{name}.weight"] = ((HIDDEN,), None)
    if stage == PIPELINE - 1:
        found |= {"norm.weight": ((HIDDEN,), None), "head.weight": ((VOCAB, HIDDEN), 0)}
    return found


def blocks_of(layout: Layout, rank: int, folder: str) -> tuple[dict[str, BlockFacts], int]:
    """Blocks in a rank's shard file with made-up hashes, and their bytes."""
    at, blocks, total = layout.coordinate(rank), {}, 0
    for name, (shape, dim) in tensors_of_stage(at.pp).items():
        if dim is None and at.tp:
            continue
        offsets, box = [0] * len(shape), list(shape)
        if dim is not None:
            start, stop = even_slice(shape[dim], layout.tensor, at.tp)
            offsets[dim], box[dim] = start, stop - start
        start, stop = even_slice(box[0], layout.data, at.dp)
        offsets[0], box[0] = offsets[0] + start, stop - start

        values = box[0] * (box[1] if len(box) > 1 else 1)
        for state, width in FOLDERS[folder].items() if values else ():
            pieces = -(-values * width // PIECE_BYTES)
            blocks[name + state] = BlockFacts(
                offsets=offsets, shape=box, xxh3_128=[HASH[:32]] * pieces
            )
            total += values * width
    return blocks, total


def k2_facts() -> SaveFacts:
    """What a run says of a checkpoint after 360 chunks."""
    order = [{"name": f"chunk_{n:03d}", "sha256": HASH} for n in range(CHUNKS)]
    return SaveFacts(
        step=CHUNKS * 941,
        adam_steps=CHUNKS * 941,
        consumed_tokens=10**12,
        chunks=DataPosition.model_validate({"consumed": CHUNKS, "order": order}),
        config={},
        data=DataFacts(),
        identity=RunIdentity.model_validate(
            {
                "model": {},
                "batch": {"global_sequences": 2040},
                "run": {},
                "data": {"sequence_length": 2048, "tokenizer_sha256": HASH, "order": order},
                "optimizer": {},
                "lr": {},
                "precision": "bf16",
            }
        ),
    )


def tables() -> list[Any]:
    """Whole tensors by folder, one entry a pipeline stage, as a save gathers them."""
    return [
        {
            folder: {
                name + state: {
                    "shape": list(shape),
                    "dtype": "bfloat16" if width == 2 else "float32",
                }
                for name, (shape, _) in tensors_of_stage(stage).items()
                for state, width in ends.items()
            }
            for folder, ends in FOLDERS.items()
        }
        for stage in range(PIPELINE)
    ]


class PauseMeter:
    """Longest pause of a thread that wakes every millisecond.

    Time in which it was ready to run, but no core was free, does not count where Linux tells it.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "PauseMeter":
        self._thread.start()
        time.sleep(0.005)
        self.longest = 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        last = time.perf_counter() - _waited_seconds()
        while not self._ended.is_set():
            time.sleep(0.001)
            now = time.perf_counter() - _waited_seconds()
            self.longest, last = max(self.longest, now - last), now


def _waited_seconds() -> float:
    """Seconds for which this thread has waited for a core; 0 where that is not known."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


class World:
    """A checkpoint of a world, without its shard files; `rank` is one in its middle."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self.layout = Layout.for_world(world_size, TENSOR, PIPELINE)
        self.rank, self.path = world_size // 2, folder / f"ckpt_{world_size:05d}"
        (self.path / FACTS).mkdir(parents=True)
        self.facts, self.tables = k2_facts(), tables()
        self.digests = {name: HASH[:32] for part in self.tables for name in part["optimizer"]}
        rows = torch.zeros(world_size, len(FOLDERS), 9, dtype=torch.int64)
        rows[:, :, 0] = 10**9
        self.files = GatheredFiles(rows)

    def blocks(self) -> int:
        """Number of blocks in all shard files."""
        total, copies = 0, sum(map(len, FOLDERS.values()))
        for stage in range(PIPELINE):
            for shape, dim in tensors_of_stage(stage).values():
                rows = shape[0] // TENSOR if dim == 0 else shape[0]
                # With short tensors the last data-parallel ranks have no rows.
                parts = -(-rows // -(-rows // self.layout.data))
                total += copies * parts * (1 if dim is None else TENSOR)
        return total

    def write_side_files(self, rank: int) -> None:
        """Describe a rank's shard files, as it does in a save."""
        written: dict[str, FileFacts] = {}
        for folder in FOLDERS:
            blocks, size = blocks_of(self.layout, rank, folder)
            name = shard_name(folder, rank)
            pieces = PieceFacts(header_sha256=HASH, piece_bytes=PIECE_BYTES, tensors=blocks)
            written[name] = write_pieces(
                self.path, name, FileFacts(bytes=size, sha256=HASH), pieces
            )
        self.files.rows[rank] = pack_files(written, rank)

    def write_manifest(self) -> None:
        """Write the manifest of what was gathered, as rank 0 does in a save."""
        content = manifest_content(
            self.path, self.path.name, self.facts, self.files, self.tables, self.digests
        )
        CheckpointManifest.model_validate(content)
        write_synced(self.path / MANIFEST, manifest_text(content))

    def read(self, all_files: bool) -> None:
        """Read what a rank of the same layout reads at a start; rank 0 reads the table of all."""
        found = read_manifest(self.path, fresh=True)
        files = FileTable(self.path, found, fresh=True)
        for folder in FOLDERS:
            share = files.share(folder, self.rank, self.layout.world_size)
            for name, facts in share.items():
                read_pieces(self.path, found, name, facts, fresh=True)
            if all_files:
                assert len(files.names(folder)) == self.layout.world_size

    def neighbours(self) -> list[int]:
        """Ranks whose files a rank looks at that loads with one data-parallel rank more."""
        other = Layout.for_world(self.layout.world_size + TENSOR * PIPELINE, TENSOR, PIPELINE)
        return likely_files(other, self.rank, self.layout)

    def read_elsewhere(self) -> None:
        """Read what a rank with these `neighbours` reads at a start."""
        found = read_manifest(self.path, fresh=True)
        files = FileTable(self.path, found, fresh=True)
        for rank in self.neighbours():
            share = files.share("optimizer", rank, self.layout.world_size)
            for name, facts in share.items():
                read_pieces(self.path, found, name, facts, fresh=True)


def reads_of(work: Callable[[], object]) -> tuple[int, int]:
    """Number and bytes of the manifests and side files that `work` reads."""
    sizes: list[int] = []
    real = manifest.read_plain_file

    def noting(path: Path) -> bytes:
        text = real(path)
        sizes.append(len(text))
        return text

    manifest.read_plain_file = side_files.read_plain_file = noting  # type: ignore[assignment]
    try:
        work()
    finally:
        manifest.read_plain_file = side_files.read_plain_file = real
    return len(sizes), sum(sizes)


def measured(what: str, work: Callable[[], object]) -> list[str]:
    """Row of the table: time the work beside a thread that notes its longest pause."""
    with PauseMeter() as meter:
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
    return [what, "", "", f"{seconds:.3f}", f"{1000 * meter.longest:.1f}"]


def written(what: str, path: Path, work: Callable[[], object]) -> list[str]:
    """Row of what writes files in `path`."""
    before = set(path.rglob("*.json"))
    row = measured(what, work)
    new = set(path.rglob("*.json")) - before
    return [what, f"{len(new)}", bytes_text(sum(file.stat().st_size for file in new)), *row[3:]]


def was_read(what: str, work: Callable[[], object]) -> list[str]:
    """Row of what reads files."""
    files, size = reads_of(work)
    return [what, f"{files}", bytes_text(size), *measured(what, work)[3:]]


def manifest_report(folder: Path, worlds: Sequence[int]) -> list[str]:
    """Table of every role's work on each world."""
    lines: list[str] = []
    for world_size in worlds:
        world = World(folder, world_size)
        for rank in world.neighbours():
            if rank != world.rank:
                world.write_side_files(rank)

        side = partial(world.write_side_files, world.rank)
        rows = [
            measured("machine alone", lambda: time.sleep(0.5)),
            written("save: side files of a rank", world.path, side),
            written("save: manifest on rank 0", world.path, world.write_manifest),
            was_read("start: a rank", partial(world.read, all_files=False)),
            was_read("start: rank 0", partial(world.read, all_files=True)),
            was_read("start: a rank, one data-parallel rank more", world.read_elsewhere),
        ]
        blocks = world.blocks()
        lines.append(f"{world_size} ranks, {world.layout.data} data-parallel: {blocks:,} blocks")
        lines += table(["work", "files", "bytes", "seconds", "longest pause (ms)"], rows)
    return lines
