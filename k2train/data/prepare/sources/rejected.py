"""Rejected documents: counted, listed with file, line and reason, and limited in number.

- A few broken lines in a corpus of a billion are normal and must not stop a cluster. A hundredth of
  them indicates a wrong key or a damaged download, and must stop it.
- Alternatives considered: skipping silently; nobody would know what the model did not see.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path

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


def check_rejected(workspace: Workspace) -> None:
    """Raises DataError when too large a share of a subset's documents was rejected.

    Called when all documents were read. The list of all rejections is then left in the work folder.
    """
    limit = workspace.recipe.max_rejected_share
    read, rejected = (
        dict.fromkeys(workspace.recipe.subsets, 0),
        dict.fromkeys(workspace.recipe.subsets, 0),
    )
    for number in range(len(workspace.tasks)):
        for name, counts in read_json(workspace.encode_record(number))["subsets"].items():
            read[name] += counts["documents_read"]
            rejected[name] += counts["rejected"]

    exceeding = [name for name, count in rejected.items() if count > limit * (count + read[name])]
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
            _message(name, rejected[name], read[name], limit, examples[name], path)
            for name in exceeding
        )
    )


def _first_of_each(workspace: Workspace, names: Collection[str]) -> dict[str, str]:
    """The first rejection of each subset: `file:line: reason`."""
    found: dict[str, str] = {}
    for line in rejected_lines(workspace):
        entry = json.loads(line)
        for name in entry["subsets"]:
            found.setdefault(name, f"{entry['file']}:{entry['line']}: {entry['why']}")
        if found.keys() >= set(names):
            break
    return found


def _message(
    name: str, rejected: int, accepted: int, limit: float, example: str, path: Path
) -> str:
    remedy = f"fix the files, or raise max_rejected_share (all are listed in {path})"
    if accepted == 0:
        remedy = f"check kind, text_key and id_key of subsets.{name} (all are listed in {path})"
    return (
        f"subsets.{name}: {rejected} of {rejected + accepted} documents are "
        f"broken, a share of {rejected / (rejected + accepted):.4f}, above "
        f"max_rejected_share ({limit}), the first at {example}; {remedy}"
    )
