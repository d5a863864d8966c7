"""State digests: checksums of global tensors that do not depend on how the tensors are sharded.

A digest has two lanes. A lane is the sum over all elements, modulo 2^64, of

    bits(element) * A[lane][row] * B[lane][index in the row]

with bits as a signed integer, and A and B odd numbers from splitmix64.

- Every rank sums its own blocks; the sums add up to the digest of the tensor in any layout.
- One changed element is always detected. A change of its bits by d, 0 < |d| < 2^32, moves a lane by
  d times an odd number, which is not 0 modulo 2^64 (the sign of a zero and the payload of a NaN
  count too).
- Several changed or exchanged elements cancel in both lanes only by accident. The chance is about
  2^-64 where two differ in their highest bit alone, and smaller in lower bits.
- Accidental damage only: with A and B known, two tensors with one digest can be constructed.
  Forgery is detected by the SHA-256 of files in a checkpoint's manifest.
- The state root is one SHA-256 over all digests with the tensors' names, the step and the number of
  updates applied.

Alternatives considered:
- A hash over bytes in order: only a rank with a whole tensor in one order can compute it.
- A tree of hashes over fixed blocks: the blocks must be cut alike in every layout.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from math import prod

import numpy as np
import numpy.typing as npt

LANES = 2
MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_SEEDS = {"rows": (0x6B327261, 0x726F6F74), "columns": (0x73746174, 0x65646967)}
_BITS = {2: np.int16, 4: np.int32}
_BLOCK = 2**14
"""Elements per block: their 64-bit values stay in the cache of one core."""


def multipliers(axis: str, count: int, start: int = 0) -> npt.NDArray[np.int64]:
    """Odd multipliers of the axis `rows` or `columns` from index `start`, int64 `[2, count]`."""
    index = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    z = np.array(_SEEDS[axis], dtype=np.uint64)[:, None] + index * np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)


def block_sums(
    values: npt.NDArray[np.generic], offsets: Sequence[int], shape: Sequence[int]
) -> tuple[int, int]:
    """Digest contribution of one block: `values` at `offsets` in a tensor of the global `shape`.

    Elements have 4 bytes (fp32) or 2 (bf16 as integers). The sums of blocks that cover a tensor
    exactly once add up to its digest modulo 2^64.
    Raises ValueError when the block does not fit into the shape or its elements have another size.
    """
    if values.ndim != len(shape) or any(
        o < 0 or o + n > s for o, n, s in zip(offsets, values.shape, shape, strict=True)
    ):
        raise ValueError(
            f"a block {values.shape} at {tuple(offsets)} is not inside the shape {tuple(shape)}"
        )
    if values.dtype.itemsize not in _BITS:
        raise ValueError(f"elements have {values.dtype.itemsize} bytes; only 2 and 4 have a digest")
    if values.size == 0:
        return 0, 0

    rows = values.shape[0] if values.ndim else 1
    bits = np.ascontiguousarray(values).view(_BITS[values.dtype.itemsize]).reshape(rows, -1)
    # Scalars and vectors count as one column per row.
    a = multipliers("rows", rows, offsets[0] if values.ndim else 0)
    b = multipliers("columns", prod(shape[1:]))[
        :, _columns(values.shape[1:], offsets[1:], shape[1:])
    ]

    sums = np.zeros((LANES, rows), dtype=np.int64)
    # Blocks of whole rows where rows are short, parts of one row where they are long.
    width = bits.shape[1]
    across, down = min(width, _BLOCK), max(1, _BLOCK // width)

    # Sum over columns per row first: the row multiplier is common to them.
    for row in range(0, rows, down):
        for column in range(0, width, across):
            wide = bits[row : row + down, column : column + across].astype(np.int64)
            for lane in range(LANES):
                sums[lane, row : row + down] += np.einsum(
                    "ij,j->i", wide, b[lane, column : column + across]
                )

    first, second = ((sums * a).sum(axis=1)).view(np.uint64)
    return int(first), int(second)


def _columns(
    block: Sequence[int], offsets: Sequence[int], shape: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Index in its global row of each element of one row of the block, flattened."""
    index = np.zeros(1, dtype=np.int64)
    for size, offset, whole in zip(block, offsets, shape, strict=True):
        index = (index[:, None] * whole + np.arange(offset, offset + size)).reshape(-1)
    return index


def digest_text(sums: Sequence[int]) -> str:
    """32 hexadecimal digits of two lanes, each modulo 2^64 (negative sums as two's complement)."""
    first, second = sums
    return f"{first & MASK:016x}{second & MASK:016x}"


def state_root(digests: Mapping[str, str], step: int, adam_steps: int) -> str:
    """State root: SHA-256 in hexadecimal over step, updates applied and {NAME.state: digest}.

    Names are sorted, so the order of the mapping does not matter.
    """
    lines = [
        f"step {step}",
        f"adam_steps {adam_steps}",
        *(f"{name} {digests[name]}" for name in sorted(digests)),
    ]
    return sha256("\n".join(lines).encode()).hexdigest()


def short_digests(digests: Mapping[str, str]) -> dict[str, str]:
    """Short digests per tensor, to name the tensors that differ.

    From {TENSOR.state: digest} to {TENSOR: 16 hexadecimal digits over all its states}.
    """
    lines: dict[str, list[str]] = {}
    for name in sorted(digests):
        tensor, _, state = name.rpartition(".")
        lines.setdefault(tensor, []).append(f"{state} {digests[name]}")

    return {
        tensor: sha256("\n".join(held).encode()).hexdigest()[:16] for tensor, held in lines.items()
    }
