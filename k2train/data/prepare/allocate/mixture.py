"""Mixture arithmetic: samples per subset, their chunk, and their order within the chunk.

- Every subset is spread evenly. Chunks differ by at most one of its samples, and by at most one row
  in total.
- Samples are dealt to the chunks in turn, as cards are, so that a document longer than a chunk's
  part of its subset does not fill a chunk. Large subsets are dealt in blocks: a chunk then reads
  stretches of the sorted runs instead of single samples.
- Permutations sort raw Philox words, whose stream NumPy guarantees for ever. It does not for
  `Generator.permutation`.
- Alternatives considered: drawing each row's subset at random; chunks, and so the checkpoints made
  of them, would differ in their mix. One stretch of the stream for each chunk; the samples of a
  document are neighbours in it.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from k2train.errors import DataError

BLOCKS = 2**11
"""Blocks in which a subset is dealt: a chunk of a large subset reads so many stretches at most."""
MAX_BLOCK_TOKENS = 2**26
"""A block of this size is as large as a batch of the merge of very many runs."""

Samples = tuple[range, ...]
"""Samples of a subset that a chunk takes, ascending, as ranges that do not touch."""


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


def block_samples(samples: int, chunks: int, sequence_length: int) -> int:
    """Samples of a subset that are dealt to a chunk at a time: 1 for less than 2 `BLOCKS` of them.

    Decided by the subset's size only, never by how it was encoded.
    """
    largest = MAX_BLOCK_TOKENS // sequence_length
    return max(1, min(samples // BLOCKS, largest, samples // chunks))


def spread(
    counts: Mapping[str, int], chunks: int, sequence_length: int
) -> list[dict[str, Samples]]:
    """For each chunk, the samples it takes of each subset.

    Raises DataError for a subset with fewer samples than chunks.
    """
    plan: list[dict[str, Samples]] = [{} for _ in range(chunks)]
    first = 0
    for name, count in counts.items():
        if count < chunks:
            raise DataError(
                f"subset {name} gives {count} samples, fewer than the "
                f"{chunks} chunks: lower chunks, or widen its share"
            )

        block = block_samples(count, chunks, sequence_length)
        for turn, samples in enumerate(_deal(count, chunks, block)):
            # Who is first gets the odd samples, so the next subset begins after the chunks that
            # got one: the totals stay even too.
            plan[(first + turn) % chunks][name] = samples
        first = (first + count) % chunks

    return plan


def _deal(count: int, chunks: int, block: int) -> list[Samples]:
    """Deal `range(count)` in turn, in blocks, and the rest in smaller ones: the samples of each."""
    dealt: list[list[range]] = [[] for _ in range(chunks)]
    start = 0
    # Rounds of full blocks, then one in which everybody gets the same, and the first one more.
    for _ in range(count // (block * chunks)):
        for taken in dealt:
            taken.append(range(start, start + block))
            start += block

    rest = count - start
    for turn, taken in enumerate(dealt):
        size = rest // chunks + (turn < rest % chunks)
        if size:
            taken.append(range(start, start + size))
        start += size

    return [_joined(taken) for taken in dealt]


def _joined(ranges: list[range]) -> Samples:
    """The ranges with those that touch made one, as in a folder of a single chunk."""
    joined: list[range] = []
    for item in ranges:
        if joined and joined[-1].stop == item.start:
            joined[-1] = range(joined[-1].start, item.stop)
        else:
            joined.append(item)
    return tuple(joined)


def count_of(samples: Samples) -> int:
    """Number of samples."""
    return sum(map(len, samples))
