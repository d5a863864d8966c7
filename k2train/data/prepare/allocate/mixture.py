"""Mixture arithmetic: samples per subset, their chunk, and their order within the chunk.

- Every subset is spread evenly. Chunks differ by at most one of its samples, and by at most one row
  in total.
- Permutations sort raw Philox words, whose stream NumPy guarantees for ever. It does not for
  `Generator.permutation`.
- Alternatives considered: drawing each row's subset at random; chunks, and so the checkpoints made
  of them, would differ in their mix.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from k2train.errors import DataError


def keyed_permutation(n: int, seed: int, purpose: str) -> npt.NDArray[np.int64]:
    """A permutation of `range(n)` decided by (seed, purpose) only."""
    digest = hashlib.sha256(f"k2train permutation\0{seed}\0{purpose}".encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "big")).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def row_positions(rows: int, seed: int, chunk: str) -> npt.NDArray[np.uint32]:
    """`[rows]`: the row in the chunk of each sample, samples counted subset after subset.

    Rows are shuffled by (seed, chunk's name). Uses 16 bytes per row while computing.
    """
    order = keyed_permutation(rows, seed, f"rows of {chunk}")
    positions = np.empty(rows, dtype=np.uint32)
    positions[order] = np.arange(rows, dtype=np.uint32)
    return positions


def apportion(total: int, weights: Mapping[str, int]) -> dict[str, int]:
    """Split `total` in proportion to `weights` by largest remainder.

    A part never exceeds its weight when total <= sum.
    """
    weight_sum = sum(weights.values())
    if weight_sum == 0:
        return dict.fromkeys(weights, 0)
    shares = {name: divmod(total * weight, weight_sum) for name, weight in weights.items()}
    parts = {name: whole for name, (whole, _) in shares.items()}
    # The largest remainders get one more each; names break ties.
    by_remainder = sorted(shares, key=lambda name: (-shares[name][1], name))
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


def allocate(available: Mapping[str, int], wanted: int | None, fill: str | None) -> dict[str, int]:
    """Samples to take from each subset.

    All of them when `wanted` is None. Otherwise all of the other subsets and the rest from `fill`.
    Without `fill`, or when the others alone are too many, in proportion. Raises DataError when
    there are too few.
    """
    if wanted is None:
        return dict(available)
    if wanted > (total := sum(available.values())):
        raise DataError(
            f"chunks x rows_per_chunk needs {wanted} samples, the subsets hold {total} "
            "without what is held out: lower one of them, widen the shares, or raise a repeat"
        )

    others = {name: count for name, count in available.items() if name != fill}
    rest = wanted - sum(others.values())
    if fill is None or rest < 0:
        return apportion(wanted, available)

    return {name: rest if name == fill else count for name, count in available.items()}


def spread(counts: Mapping[str, int], chunks: int) -> list[dict[str, range]]:
    """For each chunk, the range of samples it takes of each subset.

    Raises DataError for a subset with fewer samples than chunks.
    """
    plan: list[dict[str, range]] = [{} for _ in range(chunks)]
    first_extra = 0
    for name, count in counts.items():
        if count < chunks:
            raise DataError(
                f"subset {name} gives {count} samples, fewer than the "
                f"{chunks} chunks: lower chunks, or widen its share"
            )

        start = 0
        for chunk in range(chunks):
            # Odd samples start after the chunks that got those of the previous subset, so that the
            # totals stay even too.
            size = count // chunks + ((chunk - first_extra) % chunks < count % chunks)
            plan[chunk][name] = range(start, start + size)
            start += size

        first_extra = (first_extra + count) % chunks

    return plan
