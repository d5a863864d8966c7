"""Load a checkpoint of any parallel layout into this one.

- One pass from format 3 on: values go straight into the optimizer's flat shards, and every piece is
  hashed where it lies. All ranks then agree whether every byte is what was saved. Until then no
  value is used, and a refusal means the next candidate.
- Weights are derived from the master weights, as after a step, so `model/` is not read.
- Where a rank's blocks are those that were saved, their hashes prove their place, too. On another
  layout the loaded state is compared with the digests of the saved one: a hash of pieces cannot see
  a value that went to the wrong place.
- Formats 1 and 2 have no hashes of pieces: all ranks share the hashing of the files before.
- Besides the state, memory never holds more than one block.

Alternatives considered:
- Hashing all files before the first value is read: twice the time, and the second read unchecked.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor

from k2train.checkpoint.blocks import MASTER, local_boxes
from k2train.checkpoint.host_digest import host_digest_sums
from k2train.checkpoint.likely_files import likely_files, saved_layout
from k2train.checkpoint.manifest import (
    CheckpointManifest,
    PieceFacts,
    TensorFacts,
    is_thinned,
    read_manifest,
)
from k2train.checkpoint.piece_check import Damage
from k2train.checkpoint.reshard_read import Read, Target, execute_reads, plan_reads
from k2train.checkpoint.shards import DTYPES, THREADS
from k2train.checkpoint.side_files import FileTable, read_pieces
from k2train.checkpoint.verify import (
    check_folders,
    check_headers,
    folders_of,
    has_bad_block,
    no_progress,
    verify_files,
)
from k2train.errors import CheckpointError, UnavailableError
from k2train.parallel.agreement import Agreement, Problem
from k2train.parallel.device_digest import StateDigest
from k2train.parallel.grid import ProcessGrid
from k2train.parallel.messages import TEXTS
from k2train.parallel.shard_layout import ShardLayout
from k2train.retry import is_passing
from k2train.text import counted

AGREE, LOAD = "agree on a checkpoint", "load a checkpoint"
"""Names of the collectives in which other ranks wait while one hashes or reads.

Without a name, the watchdog would take the waiting ranks for stuck.
"""


class RefusedCheckpointError(CheckpointError):
    """A load found that a checkpoint is not whole; an older one may be."""


class ChosenCheckpoint(NamedTuple):
    """Result of the collective search for a valid checkpoint."""

    taken: Path | None
    """First checkpoint that every rank verified."""
    refused: list[str]
    """Problems of the checkpoints before it."""

    def __str__(self) -> str:
        searched = len(self.refused) + (self.taken is not None)
        taken = self.taken.name if self.taken else "none"
        text = f"searched {counted(searched, 'checkpoint')}, took {taken}"
        return text + (
            f", refused {len(self.refused)}: {'; '.join(self.refused)}" if self.refused else ""
        )


_SHAPES = TypeAdapter(dict[str, list[int]])
Check = Callable[[Path, CheckpointManifest], None]


def agree_on_checkpoint(
    candidates: Sequence[Path],
    grid: ProcessGrid,
    check: Check = lambda path, manifest: None,
    progress: Callable[[], None] = no_progress,
    to_load: bool = False,
) -> ChosenCheckpoint:
    """Find the first of `candidates` that every rank verifies, and the problems of those before it.

    - Rank 0's list counts. Each rank hashes its share of the files.
    - `check` may refuse a manifest with a CheckpointError.
    - `progress` is called while files are hashed.
    - `to_load` leaves the content of files to `load_states`, which checks it from format 3 on.

    Collective. Raises UnavailableError on every rank when one of them cannot read its share for
    now.
    """
    agreement = Agreement(grid)
    refused: list[str] = []
    for text in agreement.from_first([str(path) for path in candidates], TEXTS, AGREE):
        path = Path(text)
        mine = _problem(path, partial(_verify, path, grid, check, progress, to_load))
        problem = _first_problem(mine, agreement, AGREE)
        if problem is None:
            return ChosenCheckpoint(path, refused)
        refused.append(problem)

    return ChosenCheckpoint(None, refused)


def _verify(
    path: Path, grid: ProcessGrid, check: Check, progress: Callable[[], None], to_load: bool
) -> None:
    """Verify this rank's share of the files. Raises CheckpointError and errors of reading."""
    manifest = read_manifest(path)
    check(path, manifest)
    table = FileTable(path, manifest)
    share = table.shares(folders_of(path), grid.rank, grid.layout.world_size)
    # The list of all files is long for a large world: one rank compares it with the folders.
    if grid.rank == 0:
        check_folders(path, manifest, table)

    if to_load and manifest.format > 2:
        check_headers(path, manifest, share, progress=progress)
    else:
        verify_files(path, manifest, share, progress=progress)


def _problem(path: Path, read: Callable[[], None]) -> Problem:
    """Read from checkpoint `path`; return what went wrong, "" for nothing."""
    try:
        read()
    except CheckpointError as error:
        return str(error)
    except Damage as error:
        return f"{path}: {error}"
    except OSError as error:
        if is_passing(error):
            return UnavailableError(f"{path} cannot be read ({error.strerror})")
        return f"{path} cannot be read ({error.strerror or error})"
    except UnavailableError as error:
        return f"{error} (others of the run can be read)" if has_bad_block(error, path) else error
    except (EOFError, ValueError) as error:
        return f"{path} cannot be read ({error})"
    except Exception as error:
        # The other ranks must learn of any error, or they would wait for this rank.
        return f"{path} cannot be read ({error!r})"
    return ""


def _first_problem(mine: Problem, agreement: Agreement, what: str) -> str | None:
    # A checkpoint that nobody could look at is not a damaged one.
    first = agreement.first(mine, what)
    return None if first is None else f"rank {first[0]}: {first[1]}"


@torch.no_grad()
def load_states(
    path: Path,
    layout: ShardLayout,
    flat_shards: dict[str, Tensor],
    grid: ProcessGrid,
    dtype: torch.dtype,
    progress: Callable[[], None] = no_progress,
) -> bool:
    """Fill the optimizer's flat shards [elements] from checkpoint `path`. Collective.

    - Returns whether the checkpoint had moments.
    - From a thinned or a merged checkpoint only `master` is filled, and the moments are zeroed.
    - `dtype` is that of the model's weights; weights of a thinned checkpoint are rounded to it
      first.
    - `progress` is called while files are read.

    Raises on every rank: RefusedCheckpointError when the checkpoint is not whole, CheckpointError
    when its tensors belong to another model or the loaded state is not the saved one, and
    UnavailableError when a file cannot be read for now.
    """
    agreement = Agreement(grid)
    seen: list[tuple[CheckpointManifest, bool]] = []
    # One rank's error must stop all of them, before the first exchange that needs the manifest.
    _refuse_first(_problem(path, partial(_look, path, seen)), agreement)

    manifest, thinned = seen[0]
    moments = not thinned and manifest.merged is None
    # A thinned checkpoint has weights only: they become the master weights.
    folder = "model" if thinned else "optimizer"
    states = list(flat_shards) if moments else [MASTER]
    targets, shapes = _targets(layout, flat_shards, states, thinned)
    _check_tensors(path, folder, manifest, shapes, grid)
    reads: list[Read] = []
    stored = 0

    def read() -> None:
        nonlocal stored
        stored = _stored_bytes(path, folder, manifest, grid)
        likely = likely_files(
            grid.layout, grid.rank, saved_layout(manifest.layout, manifest.total_files)
        )
        reads.extend(plan_reads(path, folder, manifest, targets, likely, progress))
        execute_reads(reads, round_to=dtype if thinned else None, progress=progress)

    _refuse_first(_problem(path, read), agreement)
    # A device's memory is filled by a copy, which no hash of a piece has seen.
    on_host = all(flat_shard.device.type == "cpu" for flat_shard in flat_shards.values())
    placed = manifest.format > 2 and on_host and all(read.whole for read in reads)
    told = agreement.sum(torch.tensor([stored, int(not placed)]), LOAD).tolist()
    _check_stored(path, folder, manifest, told[0])
    if not thinned and told[1]:
        loaded = {state: flat_shards[state] for state in states}
        _check_state(path, manifest, layout, loaded, grid)
    for state, flat_shard in flat_shards.items():
        # Without saved moments the optimizer starts anew.
        if state not in states:
            flat_shard.zero_()

    return moments


def _refuse_first(mine: Problem, agreement: Agreement) -> None:
    """Raise RefusedCheckpointError on every rank when one of them has a problem."""
    if (first := _first_problem(mine, agreement, LOAD)) is not None:
        raise RefusedCheckpointError(first)


def _look(path: Path, seen: list[tuple[CheckpointManifest, bool]]) -> None:
    seen.append((read_manifest(path), is_thinned(path)))


def _targets(
    layout: ShardLayout, flat_shards: dict[str, Tensor], states: Sequence[str], thinned: bool
) -> tuple[list[Target], dict[str, list[int]]]:
    """Boxes that this rank reads, and the global shapes of their tensors by the files' names."""
    targets: list[Target] = []
    shapes: dict[str, list[int]] = {}
    for box in local_boxes(layout):
        for state in states:
            key = box.name if thinned else f"{box.name}.{state}"
            shapes[key] = list(box.slot.param_slice.global_shape)
            values = layout.local(flat_shards[state], box.slot)
            targets.append(Target(key, box.offsets, box.shape, values))
    return targets, shapes


def _stored_bytes(path: Path, folder: str, manifest: CheckpointManifest, grid: ProcessGrid) -> int:
    """Bytes of values in this rank's share of the files; 0 before format 3.

    Raises CheckpointError, UnavailableError.
    """
    if manifest.format < 3:
        return 0
    tensors, stored = manifest.tensors.get(folder, {}), 0
    share = FileTable(path, manifest).share(folder, grid.rank, grid.layout.world_size)
    for name, facts in share.items():
        pieces = read_pieces(path, manifest, name, facts)
        assert isinstance(pieces, PieceFacts), "format 3 describes every file"
        for key, block in pieces.tensors.items():
            stored += prod(block["shape"]) * _bytes_per_value(tensors, key)
    return stored


def _check_stored(path: Path, folder: str, manifest: CheckpointManifest, stored: int) -> None:
    """Raise RefusedCheckpointError when all files together hold more values than the tensors have.

    Every rank found its values in the few files that it read; others might hold them, too.
    """
    tensors = manifest.tensors.get(folder, {})
    expected = sum(
        prod(facts["shape"]) * _bytes_per_value(tensors, key) for key, facts in tensors.items()
    )
    if manifest.format > 2 and stored != expected:
        raise RefusedCheckpointError(
            f"{path}: the files of {folder} hold {stored} bytes of values, its tensors have "
            f"{expected}"
        )


def _bytes_per_value(tensors: Mapping[str, TensorFacts], name: str) -> int:
    # Values of an unknown tensor count, too, so that the sums differ.
    facts = tensors.get(name)
    return 1 if facts is None else DTYPES.get(facts.get("dtype", ""), ("", 1))[1]


def _check_state(
    path: Path,
    manifest: CheckpointManifest,
    layout: ShardLayout,
    flat_shards: dict[str, Tensor],
    grid: ProcessGrid,
) -> None:
    """Compare the digests of the loaded flat shards with the saved ones. Format 1 has none."""
    if manifest.state is None:
        return

    digest = StateDigest(layout, sorted(manifest.tensors["model"]), list(flat_shards), grid.tp)
    digest_sums = Agreement(grid).sum(host_digest_sums(digest, flat_shards, threads=THREADS), LOAD)
    known = manifest.state.digests
    wrong = [key for key, value in digest.digests(digest_sums).items() if known.get(key) != value]
    if wrong:
        raise CheckpointError(
            f"{path}: {wrong[0]} as loaded is not what was saved (digest {known.get(wrong[0])}, "
            f"{len(wrong)} of {len(known)} tensors differ), although its files are intact; it was "
            "damaged in memory, load it again"
        )


def _check_tensors(
    path: Path,
    folder: str,
    manifest: CheckpointManifest,
    wanted: dict[str, list[int]],
    grid: ProcessGrid,
) -> None:
    """Compare names and shapes over all ranks. Every rank raises the same error."""
    # Each rank holds its own pipeline stage; together they must be the whole model.
    parts = Agreement(grid).distinct(wanted, _SHAPES, LOAD)
    expected = {name: shape for part in parts for name, shape in part.items()}
    found = manifest.shapes(folder)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not in this model" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, this model's is {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]

    if problems:
        raise CheckpointError(
            f"{path}: {'; '.join(problems[:3])}"
            + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
        )
