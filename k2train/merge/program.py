"""The merge tool behind its command line: open, write, record."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from k2train.checkpoint.run_facts import MergedParent
from k2train.merge.merge import Merge
from k2train.merge.parents import Parent, open_parents
from k2train.merge.record import check_place, commit_recorded
from k2train.merge.verify import FOLDER
from k2train.merge.weights import Weights


@dataclass(frozen=True)
class Merged:
    """A merged checkpoint."""

    path: Path
    parents: tuple[MergedParent, ...]
    tensors: int
    num_bytes: int
    root: str
    ledger: Path | None
    """The ledger that has the merge; None outside a run."""


def default_name(parents: Sequence[Parent], kind: str) -> str:
    """Name a merge by its kind, its number of checkpoints, and the first and last of them."""
    first, last = parents[0].path.name, parents[-1].path.name
    return f"{kind}{len(parents)}_{first}" + (f"_{last}" if len(parents) > 1 else "")


def merge_checkpoints(
    run: Path,
    paths: Sequence[Path],
    weights: Weights,
    to: Path | None = None,
    show: Callable[[str], None] = lambda text: None,
) -> Merged:
    """Merge the checkpoints at `paths` into `to`, or into RUN/merged/NAME.

    `show` is given the progress. Raises UserError, and UnavailableError when the disk refuses;
    nothing is left then.
    """
    parents = open_parents(paths, weights)
    path = to or run / FOLDER / default_name(parents, weights.kind)
    check_place(run, path)

    total, done = len(parents[0].source.shapes), 0

    def progress(name: str) -> None:
        nonlocal done
        done += 1
        show(f"tensor {done} of {total}: {name}")

    merge = Merge(parents, path, weights.kind, progress)
    try:
        content = merge.write()
        ledger = commit_recorded(merge, run, content)
    finally:
        merge.discard()
        show("")
    return Merged(
        path,
        tuple(parent.facts for parent in parents),
        total,
        sum(facts.bytes for facts in content["files"].values()),
        content["state"]["root"],
        ledger,
    )
