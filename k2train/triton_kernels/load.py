"""Loading of the Triton kernels: imported only where asked for, refused in one line elsewhere.

- Triton is an optional package. The modules beside this one import it, so nothing imports them but
  the functions here.
- The kernels run on a CUDA device. On a CPU they run in Triton's interpreter (`TRITON_INTERPRET=1`
  before the start), which the tests use: right, and thousands of times slower.
- No kernel adds with atomics. Sums over rows are sums of fixed blocks, added in a fixed order that
  does not depend on the device.
- Products and sums are rounded one by one (`enable_fp_fusion=False`). The kernels are bound by
  memory, so a fused multiply-add would gain nothing, and AdamW and rotary positions have the bits
  of the reference.

Alternatives considered:
- Liger-Kernel: rotary positions for another memory order of q and k, no sum of a residual in the
  norm's backward, no AdamW.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from k2train.errors import ConfigError

DETERMINISTIC = frozenset({"norm", "elementwise", "loss", "optimizer"})
"""Keys of `kernels` whose `triton` gives the same bits in every run: all that have one."""

Norm = Callable[[Tensor, Tensor, float], Tensor]
AddNorm = Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
Split = Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor]]
SwiGlu = Callable[[Tensor], Tensor]
Softmax = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def triton_version(chosen: Mapping[str, str], device_type: str) -> list[str]:
    """Return Triton's version for the record, if a kernel (key of `kernels` -> name) needs it.

    Raises ConfigError where it is missing or cannot run.
    """
    keys = [key for key, name in chosen.items() if name == "triton"]
    return [f"triton {version}" for version in {require_triton(key, device_type) for key in keys}]


def require_triton(key: str, device_type: str) -> str:
    """Return the version of Triton that computes `kernels.KEY: triton` on a device type.

    Raises ConfigError where the package is missing, or where it cannot run.
    """
    where = f"kernels.{key} (triton)"
    try:
        import triton
    except ImportError as error:
        raise ConfigError(
            f"{where} needs the package triton: pip install triton, or choose auto ({error})"
        ) from error

    if device_type != "cuda" and not triton.knobs.runtime.interpret:
        raise ConfigError(f"{where} needs a CUDA device, and this is {device_type}: choose auto")
    return str(triton.__version__)


def load_norm() -> tuple[Norm, AddNorm]:
    """Load the norm, and the norm of a residual sum."""
    from k2train.triton_kernels.norm import add_norm, norm

    return norm, add_norm


def load_split() -> Split:
    """Load the split of queries, keys and values with rotary positions."""
    from k2train.triton_kernels.rotary import split

    return split


def load_swiglu() -> SwiGlu:
    """Load the SwiGLU."""
    from k2train.triton_kernels.swiglu import swiglu

    return swiglu


def load_softmax() -> Softmax:
    """Load the softmax of a strip of logits, in place."""
    from k2train.triton_kernels.softmax import softmax_

    return softmax_


def load_adamw() -> Callable[..., None]:
    """Load the update by AdamW."""
    from k2train.triton_kernels.adamw import adamw_

    return adamw_
