"""The Triton split of queries, keys and values against the one written out: bit for bit."""

import torch

from k2train.launch.environment import Launch
from k2train.model.kernels.elementwise import reference_split
from tests.support.gloo_pool import GlooPool

# s, b, key/value heads, query heads for each, half a head: grouped heads, odd sizes, several tiles.
SIZES = ((6, 3, 2, 3, 5), (1, 1, 1, 1, 1), (5, 2, 3, 1, 4), (3, 1, 1, 7, 32))


def split_job(launch: Launch) -> None:
    from tests.support.triton_interpreter import ready

    ready()
    from k2train.triton_kernels import rotary

    rotary.TILE = 64
    generator = torch.Generator().manual_seed(1)
    for s, b, kv, group, half in SIZES:
        angles = torch.randn(s + 2, 1, 1, half, generator=generator)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(s, b, (group + 2) * kv * 2 * half, generator=generator).to(dtype)
            mine, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
            # Given with other strides.
            strided = mine.transpose(0, 1).contiguous().transpose(0, 1)
            found = rotary.split(strided, cos, sin, group * kv, kv)
            expected = reference_split(plain, cos, sin, group * kv, kv)
            for a, e in zip(found, expected, strict=True):
                assert torch.equal(a, e), (s, b, kv, group, half, dtype)
                assert a.permute(2, 0, 1, 3).is_contiguous()
                assert a.untyped_storage().nbytes() == a.numel() * dtype.itemsize

            incoming = [torch.randn(e.shape, generator=generator).to(dtype) for e in expected]
            torch.autograd.backward(expected, incoming)
            # Gradients in the memory order of attention kernels, and as they were drawn.
            moved = [g.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for g in incoming]
            for given in (moved, incoming, [g.transpose(2, 3).contiguous().mT for g in incoming]):
                mine.grad = None
                torch.autograd.backward(found, given, retain_graph=True)
                assert torch.equal(mine.grad, plain.grad), (s, b, kv, group, half, dtype)

    empty = torch.zeros(0, 2, 24, requires_grad=True)
    parts = rotary.split(empty, torch.ones(3, 1, 1, 4), torch.ones(3, 1, 1, 4), 2, 2)
    assert [part.shape for part in parts] == [(2, 2, 0, 4)] * 3
    sum(part.sum() for part in parts).backward()
    assert empty.grad is not None and empty.grad.shape == (0, 2, 24)


def test_the_bits_of_the_reference(interpreter: GlooPool) -> None:
    """Catches heads mixed up, grouped heads, a rotation the wrong way in the backward, tiles left
    out, strides of a gradient ignored, long tables.
    """
    interpreter.run(1, split_job)
