"""A digest of named global tensors that does not depend on how they are cut: any rank sums its own blocks, and sums add up.

A digest has two lanes. A lane is the sum over all elements, modulo 2^64, of

    bits(element) * A[lane][row] * B[lane][index in the row]

with bits as a signed whole number and A and B odd, from splitmix64. An element whose bits change by d < 2^32 in size, d not
0, moves a lane by d times an odd number, and that is not 0 modulo 2^64: one changed element is always seen, whichever its bits
(the sign of a zero and the payload of a NaN too). Several changed elements, and values that changed places, cancel in both
lanes only by accident: a chance of about 2^-64 where two differ in their highest bit alone, and less in lower ones.

Accidental damage only: whoever knows A and B can make two tensors of one digest. What stands against a forger is the
sha256 of files in a checkpoint's manifest. Refused: a hash over bytes in order, which only a rank that sees a whole tensor
in one order can make, and a tree of hashes over fixed blocks, which must be cut alike in every layout.

The state's root is one sha256 over all digests with their tensors' names, the step and the number of updates applied.
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
"""Elements at a time: their 64-bit values stay in the cache of one core."""


def multipliers(axis: str, count: int, start: int = 0) -> npt.NDArray[np.int64]:
    """The odd factors of `rows` or `columns` from index `start` on, [2, count], two's complement."""
    index = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    z = np.array(_SEEDS[axis], dtype=np.uint64)[:, None] + index * np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)


def block_sums(
    values: npt.NDArray[np.generic], offsets: Sequence[int], shape: Sequence[int]
) -> tuple[int, int]:
    """What a block adds to the digest of its tensor: `values` lie at `offsets` in the global `shape`.

    Elements of 4 bytes (fp32) or 2 (bf16 as whole numbers). Sums of blocks that cover a tensor once add up modulo 2^64.
    Raises ValueError when the block does not fit into the shape or its elements are of another size.
    """
    if values.ndim != len(shape) or any(
        o < 0 or o + n > s for o, n, s in zip(offsets, values.shape, shape, strict=True)
    ):
        raise ValueError(
            f"a block {values.shape} at {tuple(offsets)} does not lie in {tuple(shape)}"
        )
    if values.dtype.itemsize not in _BITS:
        raise ValueError(f"elements of {values.dtype.itemsize} bytes have no digest; 2 and 4 have")
    if values.size == 0:
        return 0, 0
    rows = values.shape[0] if values.ndim else 1
    bits = np.ascontiguousarray(values).view(_BITS[values.dtype.itemsize]).reshape(rows, -1)
    a = multipliers("rows", rows, offsets[0] if values.ndim else 0)
    b = multipliers("columns", prod(shape[1:]))[
        :, _columns(values.shape[1:], offsets[1:], shape[1:])
    ]
    sums = np.zeros((LANES, rows), dtype=np.int64)
    width = bits.shape[1]
    across, down = min(width, _BLOCK), max(1, _BLOCK // width)
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
    """Index in the global row of each element of a block's row, flat."""
    index = np.zeros(1, dtype=np.int64)
    for size, offset, whole in zip(block, offsets, shape, strict=True):
        index = (index[:, None] * whole + np.arange(offset, offset + size)).reshape(-1)
    return index


def digest_text(sums: Sequence[int]) -> str:
    """32 hexadecimal digits of two lanes, each taken modulo 2^64 (negative numbers as two's complement)."""
    first, second = sums
    return f"{first & MASK:016x}{second & MASK:016x}"


def state_root(digests: Mapping[str, str], step: int, adam_steps: int) -> str:
    """sha256 in hexadecimal over {NAME.state: digest}, the step and the updates applied, in the order of the names."""
    lines = [
        f"step {step}",
        f"adam_steps {adam_steps}",
        *(f"{name} {digests[name]}" for name in sorted(digests)),
    ]
    return sha256("\n".join(lines).encode()).hexdigest()


def short_digests(digests: Mapping[str, str]) -> dict[str, str]:
    """{TENSOR: 16 hexadecimal digits of all its states} from {TENSOR.state: digest}: enough to name what differs."""
    lines: dict[str, list[str]] = {}
    for name in sorted(digests):
        tensor, _, state = name.rpartition(".")
        lines.setdefault(tensor, []).append(f"{state} {digests[name]}")
    return {
        tensor: sha256("\n".join(held).encode()).hexdigest()[:16] for tensor, held in lines.items()
    }
