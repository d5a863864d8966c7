"""The Triton update by AdamW: every bit by its definition, and torch's kernels to a rounding."""

import numpy as np
import pytest
import torch
from torch import Tensor

from k2train.launch.environment import Launch
from k2train.optim.adamw import Hyperparameters, ShardedAdamW
from k2train.parallel.grad_buffer import GradientBuffer
from k2train.parallel.grid import SINGLE
from tests.optim.test_adamw import Toy, adamw_job, start_of, torch_adamw
from tests.support.gloo_pool import GlooPool

BETAS, EPS = (0.9, 0.95), 1e-8
F32 = np.float32


def drawn(elements: int) -> list[Tensor]:
    """Weights, gradient, moments; gradients of very different sizes."""
    g = torch.Generator().manual_seed(elements)
    p, gradient, m, v = (torch.randn(elements, generator=g) for _ in range(4))
    scales = 10.0 ** -torch.randint(0, 12, (elements,), generator=g).float()
    return [p, gradient * scales, 0.1 * m * scales, 0.01 * v.square() * scales]


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c of fp32 numbers, rounded once: the product is exact in float64."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(F32)


def by_definition(
    values: list[Tensor], step: int, lr: float, decay: float, divisor: float
) -> list[np.ndarray]:
    """One rounding an operation, two fused multiply-adds; everything else is IEEE fp32."""
    p, g, m, v = (t.numpy() for t in values)
    b1, b2 = BETAS
    g = g / F32(divisor)
    m = fma(np.full_like(m, 1 - b1), g - m, m)
    v = fma(F32(1 - b2) * g, g, v * F32(b2))
    below = np.sqrt(v) / F32((1 - b2**step) ** 0.5) + F32(EPS)
    return [p * F32(1 - lr * decay) + F32(-lr / (1 - b1**step)) * m / below, m, v]


def bits_job(launch: Launch) -> None:
    from tests.support.triton_interpreter import ready

    ready()
    from k2train.optim.adamw import _fused, _reference, _Rule
    from k2train.triton_kernels import adamw

    adamw.BLOCK = 64
    for elements, step, lr, decay in ((0, 1, 0.1, 0.0), (1, 1, 3e-4, 0.1), (1000, 7, 0.01, 0.0)):
        values, divisor = drawn(elements), torch.tensor(3.0)
        expected = by_definition(values, step, lr, decay, 3.0)
        copy = torch.zeros(elements, dtype=torch.bfloat16)
        p, g, m, v = (t.clone() for t in values)
        for skip in (torch.tensor(1.0), torch.tensor(0.0)):
            adamw.adamw_(p, g, m, v, step, lr, BETAS, EPS, decay, divisor, skip, copy)
            assert torch.equal(copy, p.bfloat16()), "the copy is not the rounded weights"
            if skip.item():
                kept = zip((p, g, m, v), values, strict=True)
                assert all(torch.equal(a, b) for a, b in kept), "a skipped step changed something"
        for found, right in zip((p, m, v), expected, strict=True):
            assert np.array_equal(found.numpy(), right), (elements, step)

        # torch's operators, which fuse other operations: a unit in the last place of the operands.
        for update in (_fused, _reference):
            others = [t.clone() for t in values]
            update(*others, _Rule(step, lr, BETAS, EPS, decay, divisor, torch.tensor(0.0)))
            pairs = zip((p, m, v), (others[0], others[2], others[3]), (0, 2, 3), strict=True)
            for found, other, n in pairs:
                scale = torch.maximum(values[n].abs(), found.abs())
                assert ((found - other).abs() <= 2.0**-22 * scale).all(), update.__name__

    # Without divisor, skip and copy; a gradient that is no number is refused by `skip` alone.
    plain, same = drawn(100), drawn(100)
    adamw.adamw_(*plain, 1, 0.1, BETAS, EPS, 0.1, None, None)
    adamw.adamw_(*same, 1, 0.1, BETAS, EPS, 0.1, torch.tensor(1.0), torch.tensor(0.0))
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
    same[1].fill_(float("nan"))
    kept = [t.clone() for t in same]
    nan = torch.tensor(float("nan"))
    adamw.adamw_(*same, 2, 0.1, BETAS, EPS, 0.1, nan, torch.tensor(1.0))
    assert all(torch.equal(same[n], kept[n]) for n in (0, 2, 3))
    adamw.adamw_(*same, 2, 0.1, BETAS, EPS, 0.1, None, torch.tensor(0.0))
    assert not same[0].isfinite().any()


def test_every_bit_of_an_update(interpreter: GlooPool) -> None:
    """Catches a bias correction one step off, decay not scaled by the rate, an operation rounded
    twice or not at all, a skipped step that multiplies by 0, a last block left out.
    """
    interpreter.run(1, bits_job)


def sharded_job(launch: Launch) -> dict[str, np.ndarray]:
    from tests.support.triton_interpreter import ready

    ready()
    return adamw_job(launch, "triton", False)


@pytest.mark.parametrize("dp", (1, 2))
def test_equals_torchs_adamw_on_any_number_of_ranks(interpreter: GlooPool, dp: int) -> None:
    """Catches a kernel that updates a bucket twice, or that sends weights before their update."""
    expected = torch_adamw()
    for rank, part in enumerate(interpreter.run(dp, sharded_job)):
        for name, value in expected.items():
            error = np.abs(part[name] - value).max()
            assert error <= 2e-6 * np.abs(value).max(), f"{name} on rank {rank}: {error}"


def copied_job(launch: Launch) -> None:
    from tests.support.triton_interpreter import ready

    ready()
    toy = Toy().bfloat16()
    layout = GradientBuffer([toy], SINGLE["dp"], SINGLE["tp"], torch.device("cpu")).shard_layout
    h = Hyperparameters(BETAS, EPS, 0.1)
    optimizer = ShardedAdamW(layout, torch.device("cpu"), h, "triton")
    for slot in layout.slots:
        optimizer.set_master(slot.param_slice, start_of(slot.param_slice.name))

    for skip in (1.0, 0.0):
        before = optimizer.master.clone()
        gradient = torch.linspace(-1.0, 1.0, layout.elements)
        optimizer.step(gradient, 0.1, torch.tensor(2.0), torch.tensor(skip))
        assert torch.equal(before, optimizer.master) == bool(skip)
        for slot in layout.slots:
            held = slot.param_slice.of(slot.parameter.data)
            assert torch.equal(held, optimizer.view("master", slot).bfloat16()), slot.param_slice


def test_the_layers_get_the_rounded_weights(interpreter: GlooPool) -> None:
    """Catches parameters of a bf16 run that keep their old values, or those of another bucket."""
    interpreter.run(1, copied_job)
