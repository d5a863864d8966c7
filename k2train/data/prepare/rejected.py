"""Documents that cannot be taken: counted, listed with file, line and reason, and only so many of them.

A broken line in a corpus of a billion is normal and must not stop a cluster; a thousandth of them broken is a wrong key or
a damaged download, and must. Skipping in silence was refused: nobody would know what the model did not see.
"""

from collections.abc import Iterator

from k2train.data.prepare.workplace import Workplace, read_json
from k2train.errors import DataError

REJECTED_NAME = "rejected.jsonl"


def rejected_lines(workplace: Workplace) -> Iterator[bytes]:
    """The lines of all encode tasks, in the order of their sources."""
    for number in range(len(workplace.tasks)):
        path = workplace.run_folder(number) / REJECTED_NAME
        if path.is_file():
            with path.open("rb") as stream:
                yield from stream


def check_rejected(workplace: Workplace) -> None:
    """Called when all documents were read. Raises DataError for a subset of which too large a share was rejected."""
    limit = workplace.recipe.max_rejected_share
    read, rejected = dict.fromkeys(workplace.recipe.subsets, 0), dict.fromkeys(workplace.recipe.subsets, 0)
    for number in range(len(workplace.tasks)):
        for name, counts in read_json(workplace.encode_record(number))["subsets"].items():
            read[name] += counts["documents_read"]
            rejected[name] += counts["rejected"]
    for name, count in rejected.items():
        if count > limit * (whole := count + read[name]):
            first = next(rejected_lines(workplace)).decode().strip()
            raise DataError(
                f"subsets.{name}: {count} of {whole} documents are broken, a share of {count / whole:.4f}, above "
                f"max_rejected_share ({limit}); the first of any subset: {first}; mend the files, or raise the share"
            )
