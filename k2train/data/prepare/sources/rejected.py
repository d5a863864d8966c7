"""Rejected documents: counted, listed with file, line and reason, and limited in number.

- A few broken lines in a corpus of a billion are normal and must not stop a cluster. A hundredth of
  them indicates a wrong key or a damaged download, and must stop it.
- Alternatives considered: skipping silently; nobody would know what the model did not see.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from k2train.data.prepare.workspace import Workspace, process_suffix, read_json
from k2train.errors import DataError
from k2train.files import AtomicFile
from k2train.retry import is_file_retried, open_retried

REJECTED_NAME = "rejected.jsonl"


def rejected_lines(workspace: Workspace) -> Iterator[bytes]:
    """Yield the rejected lines of all encode tasks, in the order of their sources."""
    for number in range(len(workspace.tasks)):
        path = workspace.run_folder(number) / REJECTED_NAME
        if is_file_retried(path):
            with open_retried(path) as stream:
                yield from stream


@dataclass(frozen=True)
class Broken:
    """How much of a subset is broken, counted in one unit."""

    unit: str
    broken: int
    whole: int

    @property
    def share(self) -> float:
        """Part that is broken, of 1."""
        return self.broken / self.whole if self.whole else 0.0


def check_rejected(workspace: Workspace) -> None:
    """Raises DataError when too large a share of a subset was rejected.

    The share is taken of documents, of bytes and of files: a damaged archive has few lines, and a
    thousand empty files few bytes. Called when all documents were read. The list of all rejections
    is then left in the work folder.
    """
    limit = workspace.recipe.max_rejected_share
    totals = {name: Counter[str]() for name in workspace.recipe.subsets}
    for number in range(len(workspace.tasks)):
        for name, counts in read_json(workspace.encode_record(number))["subsets"].items():
            totals[name].update({key: n for key, n in counts.items() if isinstance(n, int)})

    worst = {name: max(_units(total), key=lambda b: b.share) for name, total in totals.items()}
    exceeding = [name for name, found in worst.items() if found.share > limit]
    if not exceeding:
        return

    # The complete list helps to fix the files.
    path = workspace.folder / REJECTED_NAME
    with AtomicFile(path, process_suffix()) as stream:
        for line in rejected_lines(workspace):
            stream.write(line)

    examples = _first_of_each(workspace, exceeding)
    raise DataError(
        "\n".join(
            _message(
                name, worst[name], _remedy(workspace, name, totals[name]), limit, examples[name]
            )
            for name in exceeding
        )
    )


def _units(total: Mapping[str, int]) -> list[Broken]:
    """The broken part of a subset, in each unit; documents first, as `max` takes the first."""
    documents = total["rejected"] + total["documents_read"]
    size_bytes = total["rejected_bytes"] + total["read_bytes"]
    return [
        Broken("documents", total["rejected"], documents),
        Broken("bytes", total["rejected_bytes"], size_bytes),
        Broken("files", total["broken_files"], total["files"]),
    ]


def _first_of_each(workspace: Workspace, names: Collection[str]) -> dict[str, str]:
    """The first rejection of each subset: `file:line: reason`."""
    found: dict[str, str] = {}
    for line in rejected_lines(workspace):
        entry = json.loads(line)
        for name in entry["subsets"]:
            where = entry["file"] + ("" if entry["line"] is None else f":{entry['line']}")
            found.setdefault(name, f"{where}: {entry['why']}")
        if found.keys() >= set(names):
            break
    return found


def _remedy(workspace: Workspace, name: str, total: Mapping[str, int]) -> str:
    """Say what to change: the keys of a subset without any good document, else its files."""
    # Files of text have no keys.
    has_keys = workspace.recipe.subsets[name].kind in ("jsonl", "parquet")
    keys = "kind, text_key and id_key" if has_keys else "kind and paths"
    what = "fix the files, or raise max_rejected_share"
    if total["documents_read"] == 0:
        what = f"check {keys} of subsets.{name}"
    return f"{what} (all are listed in {workspace.folder / REJECTED_NAME})"


def _message(name: str, broken: Broken, remedy: str, limit: float, example: str) -> str:
    return (
        f"subsets.{name}: {broken.broken} of {broken.whole} {broken.unit} are "
        f"broken, a share of {broken.share:.4f}, above "
        f"max_rejected_share ({limit}), the first at {example}; {remedy}"
    )
