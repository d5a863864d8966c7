"""Flags of documents by their text: duplicates over all subsets, and texts of earlier data folders.

- One byte per document and pass, in a file per pass. `deduplicate` decides it, here is which runs
  are compared, and in which order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from k2train.data.manifest import read_manifest
from k2train.data.prepare.allocate.deduplicate import TextRuns, flag_texts
from k2train.data.prepare.allocate.plan_file import RunEntry
from k2train.data.prepare.recipe import Recipe
from k2train.data.prepare.workspace import Workspace
from k2train.data.text_record import TextRecord, check_texts, open_texts
from k2train.errors import DataError
from k2train.retry import read_retried


def seen_texts(recipe: Recipe, verify: bool = False) -> dict[str, TextRecord]:
    """The texts of the folders that `seen` names, by the hash of their record, ascending.

    So neither the order nor a folder that is named twice matters. With `verify` the records are
    hashed whole. Raises DataError that begins with `seen:` for a folder without a record, or with a
    damaged one.
    """
    found = {}
    for path in recipe.seen:
        try:
            manifest = read_manifest(path)
            record, facts = open_texts(manifest), manifest.facts.texts
            if verify:
                check_texts(manifest)
        except DataError as error:
            # Of a run's config a missing manifest is another key.
            raise DataError(f"seen: {str(error).removeprefix('data.manifest: ')}") from None
        if record is None or facts is None:
            raise DataError(
                f"seen: {manifest.path} has no record of its texts: it was made by an older "
                "version, or imported; prepare it again, or leave it out of seen"
            )
        found[facts.sha256] = record
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Flags:
    """Flags of a subset's documents in one pass: in `path`, from byte `first` on.

    Without a path no document is flagged.
    """

    path: Path | None = None
    first: int = 0

    def of(self, entry: RunEntry) -> npt.NDArray[np.uint8]:
        """uint8 `[documents]`: the flags of a run."""
        if self.path is None:
            return np.zeros(entry.documents, dtype=np.uint8)
        content = read_retried(self.path, self.first + entry.first, entry.documents)
        return np.frombuffer(content, dtype=np.uint8)


def text_flags(
    workspace: Workspace,
    scratch: Path,
    runs: Mapping[str, Sequence[Sequence[RunEntry]]],
    seen: Sequence[TextRecord] = (),
) -> dict[tuple[str, int], Flags]:
    """Write the flags of each subset and pass: duplicates over all subsets, and `seen` texts."""
    subsets = workspace.recipe.subsets
    flags = {(name, number): Flags() for name in subsets for number in range(len(runs[name]))}
    compared = [name for name, subset in subsets.items() if subset.drop_duplicates or seen]
    ranks = _source_ranks(workspace, compared)

    for number in range(max((len(runs[name]) for name in compared), default=0)):
        groups: dict[str, TextRuns] = {}
        first = 0
        for name in compared:
            # Every pass holds all documents, so a subset with fewer is compared by its last one.
            entries = runs[name][min(number, len(runs[name]) - 1)]
            groups[name] = TextRuns(entries, first, subsets[name].drop_duplicates)
            first += sum(entry.documents for entry in entries)

        path = flag_texts(scratch, workspace.folder, list(groups.values()), ranks, seen)
        path = path.rename(scratch / f"{number}_flags")
        for name, group in groups.items():
            if number < len(runs[name]):
                flags[name, number] = Flags(path, group.first)

    return flags


def _source_ranks(workspace: Workspace, compared: Sequence[str]) -> dict[str, int]:
    """Order of the sources, which decides which of equal texts is the first.

    By the first subset of the recipe that reads a source, then by its key.
    """
    position = {name: index for index, name in enumerate(compared)}
    first: dict[str, int] = {}
    for task in workspace.tasks:
        indexes = [position[name] for name in task.subsets if name in position]
        for source in task.sources if indexes else ():
            first[source.key] = min(first.get(source.key, len(position)), *indexes)
    ordered = sorted(first, key=lambda key: (first[key], key))
    return {key: rank for rank, key in enumerate(ordered)}
