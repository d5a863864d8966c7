"""Batches: what the ranks tell each other where a chunk is opened."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from k2train.data.array_file import FileIdentity
from k2train.data.chunk import ChunkIdentity
from k2train.errors import UnavailableError
from k2train.parallel.messages import decode, encode
from k2train.train.batches import (
    BatchSource,
    DamagedChunkError,
    UnavailableChunkError,
    _marks,
)

FILE = ChunkIdentity(FileIdentity(7, 100, 1, 1))
TOUCHED = ChunkIdentity(FileIdentity(7, 100, 1, 2))
OTHER = ChunkIdentity(FileIdentity(8, 100, 1, 1))
LOADER: Any = SimpleNamespace(identity=lambda name: FILE)


@dataclass
class Told:
    """An agreement whose ranks say these things."""

    first_says: Any = None
    ranks: Any = ()

    def first(self, problem: Any, what: str) -> Any:
        if isinstance(self.first_says, Exception):
            raise self.first_says
        return self.first_says

    def to_first(self, row: torch.Tensor) -> torch.Tensor:
        assert row.shape == (4,) and row.dtype == torch.int64
        return torch.stack([_marks(*told) for told in self.ranks])

    def from_first(self, value: Any, form: TypeAdapter[Any], what: str) -> Any:
        # As it arrives: through the form that was agreed on.
        return decode(encode(value, form), form)


def source(told: Told) -> BatchSource:
    made = BatchSource.__new__(BatchSource)
    made._agreement = told  # type: ignore[assignment]
    return made


@pytest.mark.parametrize(
    ("ranks", "alike"),
    [
        ([("n1", FILE), ("n1", FILE)], True),
        ([("n1", FILE), ("n1", TOUCHED)], True),
        ([("n1", FILE), ("n1", OTHER)], False),
        ([("n1", FILE), ("n2", OTHER), ("n2", OTHER)], True),
        ([("n1", FILE), ("n2", OTHER), ("n2", FILE)], False),
        ([("", FILE), ("", OTHER)], True),
        ([("n1", FILE), ("n1", None)], True),
    ],
)
def test_ranks_of_one_machine_open_one_file(ranks: list[Any], alike: bool) -> None:
    """Catches a chunk exchanged between two opens, and machines with copies of their own."""
    made = source(Told(ranks=ranks))
    if alike:
        made._agree(None, LOADER, "chunk_001")
    else:
        with pytest.raises(
            UnavailableChunkError, match=r"chunk_001: rank [12] opened another file"
        ):
            made._agree(None, LOADER, "chunk_001")


def test_what_one_rank_found_is_everyones() -> None:
    """Catches a rank that leaves alone, or with another exit code than the others."""
    with pytest.raises(DamagedChunkError, match="bad row"):
        source(Told((1, "bad row")))._agree(None, LOADER, "chunk_001")
    with pytest.raises(UnavailableChunkError, match="rank 1: stale"):
        source(Told(UnavailableError("rank 1: stale")))._agree(None, LOADER, "chunk_001")
