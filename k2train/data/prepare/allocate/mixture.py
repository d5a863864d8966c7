"""How many samples each subset gives, to which chunk they go, and in which order they lie there: arithmetic on counts.

Every subset is spread evenly, so that no two chunks differ by more than one of its samples, and no two chunks by more
than one row in all. Drawing each row's subset at random was refused: chunks, and so the checkpoints made of them,
would differ in their mix. Permutations sort raw Philox words, whose stream NumPy guarantees for ever, which it does not
for `Generator.permutation`.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from k2train.errors import DataError


def keyed_permutation(n: int, seed: int, purpose: str) -> npt.NDArray[np.int64]:
    """A permutation of `range(n)` decided by (seed, purpose) and nothing else."""
    digest = hashlib.sha256(f"k2train permutation\0{seed}\0{purpose}".encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "big")).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def row_positions(rows: int, seed: int, chunk: str) -> npt.NDArray[np.uint32]:
    """`[rows]`: the row of the chunk at which each of its samples lies, these being counted subset after subset.

    The rows are shuffled by (seed, chunk's name); while this is made it holds 16 bytes a row.
    """
    order = keyed_permutation(rows, seed, f"rows of {chunk}")
    positions = np.empty(rows, dtype=np.uint32)
    positions[order] = np.arange(rows, dtype=np.uint32)
    return positions


def apportion(total: int, weights: Mapping[str, int]) -> dict[str, int]:
    """`total` split in proportion to `weights` by largest remainder; never more than its weight when total <= sum."""
    weight_sum = sum(weights.values())
    if weight_sum == 0:
        return dict.fromkeys(weights, 0)
    shares = {name: divmod(total * weight, weight_sum) for name, weight in weights.items()}
    parts = {name: whole for name, (whole, _) in shares.items()}
    by_remainder = sorted(shares, key=lambda name: (-shares[name][1], name))
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


def allocate(available: Mapping[str, int], wanted: int | None, fill: str | None) -> dict[str, int]:
    """Samples to take from each subset: all (None), or `wanted`: all of the others and the rest from `fill`.

    Without `fill`, and where the others alone are too many, in proportion. Raises DataError when there are too few.
    """
    if wanted is None:
        return dict(available)
    if wanted > (total := sum(available.values())):
        raise DataError(
            f"chunks x rows_per_chunk needs {wanted} samples, the subsets hold {total} without what is held out: lower "
            f"one of them, widen the shares, or raise a repeat"
        )
    others = {name: count for name, count in available.items() if name != fill}
    rest = wanted - sum(others.values())
    if fill is None or rest < 0:
        return apportion(wanted, available)
    return {name: rest if name == fill else count for name, count in available.items()}


def spread(counts: Mapping[str, int], chunks: int) -> list[dict[str, range]]:
    """For each chunk, the samples it takes of each subset. Raises DataError for a subset with fewer than chunks."""
    plan: list[dict[str, range]] = [{} for _ in range(chunks)]
    first_extra = 0
    for name, count in counts.items():
        if count < chunks:
            raise DataError(
                f"subset {name} gives {count} samples, fewer than the {chunks} chunks: lower chunks, or widen its share"
            )
        start = 0
        for chunk in range(chunks):
            # Whoever got the odd samples of the subset before is passed over, so that whole chunks stay even too.
            size = count // chunks + ((chunk - first_extra) % chunks < count % chunks)
            plan[chunk][name] = range(start, start + size)
            start += size
        first_extra = (first_extra + count) % chunks
    return plan
