"""The Triton SwiGLU against the formula written out in float64."""

import torch

from k2train.launch.environment import Launch
from k2train.model.kernels.elementwise import reference_swiglu
from tests.support.gloo_pool import GlooPool

# Relative to each value: fp32 exponentials, or half a unit in the last place of bf16.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8}


def swiglu_job(launch: Launch) -> None:
    from tests.support.triton_interpreter import ready

    ready()
    from k2train.triton_kernels import swiglu

    swiglu.BLOCK = 16
    generator = torch.Generator().manual_seed(1)
    for dtype, tolerance in TOLERANCE.items():
        for shape in ((5, 2, 14), (1, 1, 2), (3, 3, 2 * 37), (0, 2, 6)):
            x = (4 * torch.randn(shape, generator=generator)).to(dtype)
            dy = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator).to(dtype)
            mine, plain = x.clone().requires_grad_(), x.double().requires_grad_()
            strided = mine.transpose(0, 1).contiguous().transpose(0, 1)
            found, expected = swiglu.swiglu(strided), reference_swiglu(plain)
            found.backward(dy.transpose(0, 1).contiguous().transpose(0, 1))
            expected.backward(dy.double())
            for a, e in ((found.detach(), expected.detach()), (mine.grad, plain.grad)):
                assert a.shape == e.shape and a.dtype == dtype
                # Near its root the derivative of silu has no relative precision.
                error = (a.double() - e).abs() / (e.abs() + 1e-3)
                assert not error.numel() or error.max() <= tolerance, float(error.max())

    # Large values saturate as torch's do, and what is not finite stays so.
    gates = torch.tensor([-200.0, 200.0, float("inf"), float("-inf"), float("nan"), 0.0])
    x = torch.cat((gates, torch.full((6,), 2.0))).view(1, -1).requires_grad_()
    y, expected = swiglu.swiglu(x), reference_swiglu(x.detach())
    assert torch.allclose(y.detach(), expected, equal_nan=True)
    y.sum().backward()
    assert x.grad[0, :2].isfinite().all() and not x.grad[0, 4].isfinite()


def test_swiglu(interpreter: GlooPool) -> None:
    """Catches gate and up exchanged, a gradient of one of them, a block left out at the end of a
    row, and an exponential that overflows to NaN.
    """
    interpreter.run(1, swiglu_job)
