"""Merge of the sorted runs: how a stretch is cut into batches."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from k2train.data.prepare.write.merge_runs import BATCH_DOCUMENTS, PassReader


@pytest.mark.parametrize(
    ("buckets", "documents", "sizes"),
    (
        # Tokens in batches of at most 100.
        ([10] * 10, 1, [100]),
        # A block of the dealing begins inside a bucket, so its buckets hold a little more.
        ([10] * 11, 1, [110]),
        ([10] * 12, 1, [100, 20]),
        ([10] * 21, 1, [100, 110]),
        ([300, 10], 1, [300, 10]),
        # The limit of documents holds, too.
        ([10] * 4, BATCH_DOCUMENTS // 2, [20, 20]),
    ),
)
def test_a_small_rest_joins_the_batch_before_it(
    buckets: list[int], documents: int, sizes: list[int]
) -> None:
    """Catches a bucket or two that cost one more opening of every run."""
    ends = np.cumsum([0, *buckets])
    counts = np.arange(len(ends)) * documents
    reader = PassReader.__new__(PassReader)
    reader.batch_tokens, reader.mask = 100, 1
    reader.plan = SimpleNamespace(  # type: ignore[assignment]
        tokens_before=lambda mask: ends, documents_before=lambda mask: counts
    )
    found = reader._boundaries(0, len(buckets))
    assert [int(ends[b] - ends[a]) for a, b in itertools.pairwise(found)] == sizes
