"""Load a checkpoint of any parallel layout into this one.

- All ranks share the hashing of the files and agree on the result before a value is changed.
- Values go straight into the optimizer's flat shards, whole rows in one read. Besides the state,
  memory never holds more than one block.
- Weights are derived from the master weights, as after a step.
- The loaded state is then compared with the digests of the saved one. A hash of files cannot see a
  value that went to the wrong place.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from k2train.checkpoint.blocks import MASTER, local_boxes
from k2train.checkpoint.host_digest import host_digest_sums
from k2train.checkpoint.manifest import (
    CheckpointManifest,
    is_thinned,
    read_manifest,
)
from k2train.checkpoint.reshard_read import Read, Target, execute_reads, plan_reads
from k2train.checkpoint.shards import THREADS
from k2train.checkpoint.verify import expected_files, has_bad_block, no_progress, verify_files
from k2train.errors import CheckpointError, UnavailableError
from k2train.parallel.agreement import Agreement, Problem
from k2train.parallel.device_digest import StateDigest
from k2train.parallel.grid import ProcessGrid
from k2train.parallel.shard_layout import ShardLayout
from k2train.retry import is_passing

AGREE, LOAD = "agree on a checkpoint", "load a checkpoint"
"""Names of the collectives in which other ranks wait while one hashes or reads.

Without a name, the watchdog would take the waiting ranks for stuck.
"""


class ChosenCheckpoint(NamedTuple):
    """Result of the collective search for a valid checkpoint."""

    taken: Path | None
    """First checkpoint that every rank verified."""
    refused: list[str]
    """Problems of the checkpoints before it."""

    def __str__(self) -> str:
        searched = len(self.refused) + (self.taken is not None)
        text = f"searched {searched} checkpoints, took {self.taken.name if self.taken else 'none'}"
        return text + (
            f", refused {len(self.refused)}: {'; '.join(self.refused)}" if self.refused else ""
        )


Check = Callable[[Path, CheckpointManifest], None]


def agree_on_checkpoint(
    candidates: Sequence[Path],
    grid: ProcessGrid,
    check: Check = lambda path, manifest: None,
    progress: Callable[[], None] = no_progress,
) -> ChosenCheckpoint:
    """Find the first of `candidates` that every rank verifies, and the problems of those before it.

    Rank 0's list counts. Each rank hashes its share of the files. `check` may refuse a manifest
    with a CheckpointError. `progress` is called while files are hashed. Collective.
    Raises UnavailableError on every rank when one of them cannot read its share for now.
    """
    agreement = Agreement(grid)
    refused: list[str] = []
    for text in agreement.from_first([str(path) for path in candidates], AGREE):
        path = Path(text)
        problem = _first_problem(_problem(path, grid, check, progress), agreement, AGREE)
        if problem is None:
            return ChosenCheckpoint(path, refused)
        refused.append(problem)

    return ChosenCheckpoint(None, refused)


def _problem(path: Path, grid: ProcessGrid, check: Check, progress: Callable[[], None]) -> Problem:
    try:
        manifest = read_manifest(path)
        check(path, manifest)
        names = expected_files(path, manifest)
        share = names[grid.rank :: grid.layout.world_size]
        verify_files(path, manifest, share, progress=progress)
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        if is_passing(error):
            return UnavailableError(f"{path} cannot be read ({error.strerror})")
        return f"{path} cannot be read ({error.strerror or error})"
    except UnavailableError as error:
        return f"{error} (others of the run can be read)" if has_bad_block(error, path) else error
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

    - Returns whether the checkpoint had optimizer states.
    - From a thinned checkpoint only `master` is filled, and the moments are zeroed.
    - `dtype` is that of the model's weights; weights of a thinned checkpoint are rounded to it
      first.
    - `progress` is called while files are read.

    Raises CheckpointError on every rank when the tensors belong to another model, when they cannot
    be read, or when the loaded state is not the saved one; UnavailableError when a file cannot be
    read for now.
    """
    manifest = read_manifest(path)
    thinned = is_thinned(path)
    # A thinned checkpoint has weights only: they become the master weights.
    folder, states = ("model", [MASTER]) if thinned else ("optimizer", list(flat_shards))
    named = {
        f"{name}.{state}" if not thinned else name: (name, state)
        for name in _names(layout)
        for state in states
    }
    shapes = {slot.param_slice.name: list(slot.param_slice.global_shape) for slot in layout.slots}
    _check_tensors(
        path, folder, manifest, {key: shapes[name] for key, (name, _) in named.items()}, grid
    )
    found = {box.name: box for box in local_boxes(layout)}
    targets = [
        Target(
            key,
            found[name].offsets,
            found[name].shape,
            layout.local(flat_shards[state], found[name].slot),
        )
        for key, (name, state) in named.items()
    ]

    read = partial(execute_reads, round_to=dtype if thinned else None, progress=progress)
    problem = _read(path, folder, manifest, targets, read)
    # One rank's error must stop all of them, before any value is used.
    if (first := _first_problem(problem, Agreement(grid), LOAD)) is not None:
        raise CheckpointError(first)

    if thinned:
        # Without saved moments the optimizer starts anew.
        for state, flat_shard in flat_shards.items():
            if state != MASTER:
                flat_shard.zero_()
    else:
        _check_state(path, manifest, layout, flat_shards, grid)

    return not thinned


def _read(
    path: Path,
    folder: str,
    manifest: CheckpointManifest,
    targets: Sequence[Target],
    read: Callable[[Sequence[Read]], None],
) -> Problem:
    """Read the targets; return what went wrong, "" for nothing."""
    try:
        read(plan_reads(path, folder, manifest, targets))
    except CheckpointError as error:
        return str(error)
    except UnavailableError as error:
        return error
    except (OSError, EOFError, ValueError) as error:
        return f"{path} cannot be read ({error})"
    return ""


def _names(layout: ShardLayout) -> list[str]:
    return [slot.param_slice.name for slot in layout.slots]


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
    parts = Agreement(grid).all(wanted, LOAD)
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
