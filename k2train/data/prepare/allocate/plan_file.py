"""Plan files: the samples each chunk takes, and where their documents are.

Next to `plan.json` there are three plain files for each pass of a subset, over its documents in the
order of its runs:

    0_000.masks    uint8 [documents]: 0 left out, 1 training, 2 held out
    0_000.marks    uint64: a run's tokens before its documents 0, 256, 512, ...
    0_000.buckets  int64 [4, buckets + 1]: training tokens, held-out tokens, training documents,
                   held-out documents before each bucket; a bucket is the documents whose keys have
                   the same leading bits

- Alternatives considered: one file per run; a large preparation has tens of thousands of runs.
"""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from k2train.data.prepare.allocate.mixture import Samples
from k2train.errors import DataError
from k2train.retry import read_retried

TRAINING, HELD_OUT_TEXT = 1, 2
"""Values of a mask; 0 is left out."""
MARK_DOCUMENTS = 256
KEY_BITS = 64
PLAN_NAME = "plan.json"

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RunEntry:
    """A run: its file, its size, and its offsets in the masks and marks of its pass."""

    path: str
    documents: int
    tokens: int
    first: int
    mark: int


@dataclass(frozen=True)
class PassPlan:
    """One pass of a subset.

    `files` is the name of its three files without the suffix; keys are divided by their first
    `bits`.
    """

    folder: Path
    files: str
    bits: int
    runs: tuple[RunEntry, ...]

    def path(self, kind: str) -> Path:
        """Path of one of the three files."""
        return self.folder / f"{self.files}.{kind}"

    @cached_property
    def buckets(self) -> Longs:
        """The buckets file, int64 `[4, buckets + 1]`."""
        return np.frombuffer(read_retried(self.path("buckets")), dtype=np.int64).reshape(4, -1)

    def tokens_before(self, mask: int) -> Longs:
        """Tokens with this mask before each bucket; the last entry is the total."""
        return self.buckets[mask - 1]

    def documents_before(self, mask: int) -> Longs:
        """Documents with this mask before each bucket; the last entry is the total."""
        return self.buckets[mask + 1]

    def bucket_range(self, mask: int, start: int, stop: int) -> tuple[int, int]:
        """Buckets that hold the tokens `start:stop` of the pass: first, and one past the last."""
        before = self.tokens_before(mask)
        first = int(np.searchsorted(before, start, side="right")) - 1
        return first, int(np.searchsorted(before, stop, side="left"))

    @property
    def entry(self) -> dict[str, Any]:
        """The pass as stored in `plan.json`."""
        return {
            "files": self.files,
            "bits": self.bits,
            "runs": [list(asdict(run).values()) for run in self.runs],
        }


@dataclass(frozen=True)
class SubsetPlan:
    """The passes of a subset, and the number of training tokens in one of them."""

    name: str
    training_tokens: int
    passes: tuple[PassPlan, ...]

    def parts(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Split the tokens `start:stop` of the stream into (pass, start in it, stop in it)."""
        size = self.training_tokens
        if start == stop:
            return []
        passes = range(start // size, (stop - 1) // size + 1)
        return [(p, max(start - p * size, 0), min(stop - p * size, size)) for p in passes]


@dataclass(frozen=True)
class Plan:
    """The plan as the chunk tasks read it.

    `chunks[name][subset]` are ranges of samples, of the held-out stream for the chunk `held_out`.
    `sources` are the keys of all sources, ascending. `block_rows` is the rows of a provenance row
    group.
    """

    sources: tuple[str, ...]
    vocab_size: int
    sequence_length: int
    block_rows: int
    subsets: tuple[SubsetPlan, ...]
    chunks: dict[str, dict[str, Samples]]

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        """Read the plan of a work folder. Raises DataError when there is none yet."""
        folder = folder / "plan"
        try:
            content = json.loads((folder / PLAN_NAME).read_text("utf-8"))
        except OSError as error:
            raise DataError(
                f"{folder / PLAN_NAME}: no plan ({error.strerror}); start the preparation again"
            ) from None

        subsets = []
        for entry in content["subsets"]:
            passes = [
                PassPlan(
                    folder,
                    item["files"],
                    item["bits"],
                    tuple(RunEntry(*run) for run in item["runs"]),
                )
                for item in entry["passes"]
            ]

            subsets.append(SubsetPlan(entry["name"], entry["training_tokens"], tuple(passes)))

        chunks = {
            name: {
                subset: tuple(range(*samples) for samples in ranges)
                for subset, ranges in parts.items()
            }
            for name, parts in content["chunks"].items()
        }
        facts = {key: content[key] for key in ("vocab_size", "sequence_length", "block_rows")}
        return cls(tuple(content["sources"]), **facts, subsets=tuple(subsets), chunks=chunks)
