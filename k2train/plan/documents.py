"""Attention within documents: how each kernel stops at document borders, and lengths after padding.

    packed    documents of like length are padded to one, and attended as sequences of a batch
    varlen    documents one after another and the positions where they begin, for kernels that
              take them
    masked    every pair of positions of a row, hidden by a mask where they share no document

- Packed and varlen keep memory linear in the length of a row. Only masked holds s^2 of anything.
- A document is padded to a length that follows from its own. So what it computes does not depend on
  the documents beside it.

Alternatives considered:
- Padding to the longest of a batch: the shape of a product, and with it bits, would depend on other
  rows.
- No padding: a call for every document, hundreds of them where documents are short.
"""

from typing import Literal

Method = Literal["packed", "varlen", "masked"]

PACKED_ANYWHERE = ("plain", "by_length")
PACKED_ON_CPU = ("sdpa", "flash")
VARLEN_ON_GPU = ("flash", "flash_attn_2", "flash_attn_3", "flash_attn_4")
MASKED = ("sdpa", "reference")
"""Names of `kernels.attention` by method."""
PADDING_PARTS = 8
"""A padded length is a multiple of an eighth of the power of two at or below the length."""
PLAIN_UP_TO = {"fp32": 256, "bf16": 1024}
"""Positions up to which `kernels.attention: by_length` computes a document by `plain`.

In fp32 at 512 one processor was faster with either kernel, and the other one keeps less.
`k2train.model.kernels.attention` has the measurements.
"""


def method_of(attention: str, device_type: str) -> Method | None:
    """Return how a kernel stops at document borders on a device type; None if it cannot."""
    if attention in PACKED_ANYWHERE or (device_type == "cpu" and attention in PACKED_ON_CPU):
        return "packed"
    if device_type == "cuda" and attention in VARLEN_ON_GPU:
        return "varlen"
    return "masked" if attention in MASKED else None


def padded_length(length: int, sequence_length: int) -> int:
    """Return the length that a document is padded to: less than an eighth more, exact up to 16.

    Never more than a row has.
    """
    step = max(1, (1 << (length.bit_length() - 1)) // PADDING_PARTS)
    return min(-(-length // step) * step, sequence_length)
