"""AdamW in one Triton pass: master weights, moments, and the rounded copy of the weights.

- Reads p, g, m, v and writes p, m, v and, where the weights have a copy of their own, the bf16
  copy: 30 bytes a parameter. torch's fused kernel and a copy need 34.
- Whether the step is skipped, and what the gradient is divided by, are read from the device.
- Every operation is rounded as IEEE 754 says, and only the two named multiply-adds are fused. So
  the update has the same bits on every device: those of torch's fused kernel on a CPU with FMA.

Formula: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2, in the order of operations of
`k2train.optim.adamw`.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Parameters of one program."""


@triton.jit
def _adamw_kernel(
    p,
    g,
    m,
    v,
    copy,
    divisor,
    skip,
    elements,
    keep,
    beta1_rest,
    beta2,
    beta2_rest,
    correction2,
    eps,
    step_size,
    HAS_COPY: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    applied = True
    if HAS_SKIP:
        applied = not (tl.load(skip) > 0.0)

    weight = tl.load(p + at, mask=inside, other=0.0)
    if applied:
        gradient = tl.load(g + at, mask=inside, other=0.0)
        if HAS_DIVISOR:
            gradient = tl.div_rn(gradient, tl.load(divisor) + tl.zeros_like(gradient))

        mean = tl.load(m + at, mask=inside, other=0.0)
        mean = tl.fma(beta1_rest + tl.zeros_like(mean), gradient - mean, mean)
        square = tl.load(v + at, mask=inside, other=0.0)
        square = tl.fma(beta2_rest * gradient, gradient, square * beta2)
        below = tl.div_rn(tl.sqrt_rn(square), correction2 + tl.zeros_like(square)) + eps
        weight = weight * keep + tl.div_rn(step_size * mean, below)

        tl.store(p + at, weight, mask=inside)
        tl.store(m + at, mean, mask=inside)
        tl.store(v + at, square, mask=inside)
    if HAS_COPY:
        tl.store(copy + at, weight.to(copy.dtype.element_ty), mask=inside)


def adamw_(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    divisor: Tensor | None,
    skip: Tensor | None,
    copy: Tensor | None = None,
) -> None:
    """Update flat fp32 weights `p` and moments `m`, `v` [n] in place by the gradient g / divisor.

    - `step` counts from 1; `decay` is 0 for tensors that do not decay.
    - Nothing changes where `skip` is 1. `divisor` and `skip` are fp32 scalars on the device.
    - `copy` [n] gets the weights, rounded to its dtype, whether or not the step is skipped.
    """
    elements, (beta1, beta2) = p.numel(), betas
    if not elements:
        return
    # Rounded to fp32 once, each: computed in double first.
    _adamw_kernel[(triton.cdiv(elements, BLOCK),)](
        p,
        g,
        m,
        v,
        p if copy is None else copy,
        p if divisor is None else divisor,
        p if skip is None else skip,
        elements,
        1.0 - lr * decay,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        (1.0 - beta2**step) ** 0.5,
        eps,
        -lr / (1.0 - beta1**step),
        HAS_COPY=copy is not None,
        HAS_DIVISOR=divisor is not None,
        HAS_SKIP=skip is not None,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
