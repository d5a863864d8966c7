"""Hash of the token ids that a training step was fed, the same number on every parallel layout.

- A row's hash is XXH3-64 of its ids as little-endian uint32; the seed is the row's index in the
  global batch. The step's hash is the sum of its rows' hashes modulo 2**64, in hexadecimal.
- Where loss masks say which tokens are learned, a row's ids are followed by its labels, with
  `NOT_LEARNED` where there is none.
- Ranks therefore hash their own rows only, and any order of adding gives the same number. The seed
  makes an exchange of two rows another number.
- It is taken from the ids that the model gets, not from a file, and stands in the metrics of the
  step. Whoever has the data can compute it again: `xxhash` and NumPy are enough.
- Ranks exchange it in the sums of the step, which are fp64: as four limbs of 16 bits, whose sums
  are exact for any world.
- Every rank that reads takes part. One that was fed other ids than its replica is found.

Alternatives considered:
- A hash over the bytes of the whole batch: it needs all rows on one rank, or an order of ranks.
- SHA-256: thirty times slower, and the record is protected by its own checks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

NOT_LEARNED = -100
"""Label of a token that is not learned, as the loss has it too."""
LIMBS, LIMB_BITS = 4, 16
MASK = 2**64 - 1
FLAGS = 2 * LIMBS + 1
"""Numbers that `flags_of` adds to the exchange of a step."""


class FedIds(NamedTuple):
    """What the ranks were fed in a step, by its summed flags."""

    fingerprint: str
    """16 hexadecimal digits."""
    alike: bool
    """Whether the readers of the same rows were fed the same ids."""


def sum_of_rows(ids: NDArray[Any], first: int) -> int:
    """Sum of the hashes of rows `[n, sequence_length]`, modulo 2**64.

    `first` is the index of the first one in the global batch.
    """
    rows = np.ascontiguousarray(ids, dtype="<u4")
    return sum(xxhash.xxh3_64_intdigest(row, first + i) for i, row in enumerate(rows)) & MASK


def with_labels(ids: NDArray[Any], learned: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Rows `[n, 2 sequence_length]` that are hashed of masked rows: ids, then labels."""
    wide = ids.astype(np.int64)
    return np.concatenate((wide, np.where(learned, wide, NOT_LEARNED)), axis=1)


def text_of(total: int) -> str:
    """Hash of a step as the metrics hold it."""
    return f"{total & MASK:016x}"


def fingerprint_of_step(ids: NDArray[Any]) -> str:
    """Hash of all rows `[global_sequences, sequence_length]` of a step, in their order."""
    return text_of(sum_of_rows(ids, 0))


def flags_of(total: int | None, counts: bool) -> list[float]:
    """Return a rank's part in the exchange of a step.

    `total` is the sum over the rows that it read, None for a rank that reads none. `counts` is
    true on one rank of those that read the same rows.
    """
    if total is None:
        return [0.0] * FLAGS
    limbs = [float(total >> LIMB_BITS * i & (1 << LIMB_BITS) - 1) for i in range(LIMBS)]
    return [*(limbs if counts else [0.0] * LIMBS), *limbs, 1.0]


def agreed_ids(flags: Sequence[float], ranks: int) -> FedIds:
    """Return what the ranks were fed, by the sums of their `flags_of` over `ranks` shares of a
    batch.
    """
    counted, everyone = _joined(flags[:LIMBS]), _joined(flags[LIMBS : 2 * LIMBS])
    readers, rest = divmod(int(flags[2 * LIMBS]), ranks)
    # Each share has the same number of readers, and each of them must add the same number.
    return FedIds(text_of(counted), not rest and everyone == counted * readers & MASK)


def _joined(limbs: Sequence[float]) -> int:
    return sum(int(limb) << LIMB_BITS * i for i, limb in enumerate(limbs)) & MASK
