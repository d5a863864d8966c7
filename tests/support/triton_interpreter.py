"""Triton's interpreter for tests of kernels on a CPU, with the rounding of a device.

- Jobs of the fixture `interpreter` call `ready` first, before they import a kernel.
- The interpreter cuts fp32 off to bf16. A device rounds to the nearest, ties to even; the tests of
  the compiled code see that instruction. So the interpreter gets another conversion.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_converted = interpreter._convert_float


def _convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    if (source, target) != (tl.float32, tl.bfloat16):
        return _converted(data, source, target, rounding)
    wide = np.ascontiguousarray(data, dtype=np.float32)
    bits = wide.view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # What is no number stays so: its upper bits, and one that is set.
    kept = np.where(np.isnan(wide), bits >> 16 | 0x40, nearest)
    return kept.astype(np.uint16).reshape(np.shape(data))


def ready() -> None:
    """Round as a device does; raises AssertionError outside the interpreter."""
    assert isinstance(tl.sum, interpreter.InterpretedFunction), "Triton is not interpreted here"
    interpreter._convert_float = _convert
