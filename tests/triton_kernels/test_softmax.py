"""The Triton softmax of a strip of logits, alone and inside the fused loss."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from k2train.launch.environment import Launch
from tests.parallel.test_fused_cross_entropy import FUSED, SEQUENCE, fused_job, whole_head
from tests.support.gloo_pool import GlooPool

INFINITE = float("inf")


def softmax_job(launch: Launch) -> None:
    """Values in float64, several columns at a time, rows of a wider tensor."""
    from tests.support.triton_interpreter import ready

    ready()
    from k2train.triton_kernels import softmax

    softmax.LARGEST_BLOCK = 64
    generator = torch.Generator().manual_seed(1)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2.0**-8)):
        for rows, width in ((5, 1), (3, 64), (4, 65), (2, 200), (0, 7)):
            wide = (30 * torch.randn(rows, width + 3, generator=generator)).to(dtype)
            before, index = wide.clone(), torch.randint(0, width, (rows, 1), generator=generator)
            stats, label = softmax.softmax_(wide[:, :width], index)

            logits = before[:, :width].double()
            expected = logits.softmax(-1)
            assert torch.equal(wide[:, width:], before[:, width:]), "written beyond the strip"
            assert torch.allclose(wide[:, :width].double(), expected, rtol=tolerance, atol=1e-30)
            assert torch.equal(stats[0].double(), logits.amax(-1))
            loss = stats[1] + (stats[0] - stats[2])
            assert torch.allclose(
                loss.double(), logits.logsumexp(-1) - logits.gather(1, index)[:, 0], atol=2e-5
            )
            # In fp32, also of bf16 logits.
            assert torch.allclose(label.double(), expected.gather(1, index)[:, 0], rtol=1e-5)
            assert stats.shape == (3, rows) and label.dtype == stats.dtype == torch.float32

    # Columns of probability 0, also a whole block of them; then what is not finite.
    for value, finite in ((-INFINITE, True), (INFINITE, False), (float("nan"), False)):
        x = torch.randn(1, 150, generator=generator)
        x[0, 0 if finite else 70] = value
        x[0, : 64 if finite else 0] = value
        expected, index = x.softmax(-1), torch.tensor([[100]])
        stats, label = softmax.softmax_(x, index)
        assert torch.allclose(x, expected, equal_nan=True, atol=1e-7)
        assert (stats.isfinite().all() and label.isfinite().all()).item() is finite

    stats, label = softmax.softmax_(torch.zeros(2, 0), torch.zeros(2, 1, dtype=torch.long))
    assert (stats[0] == -INFINITE).all() and not stats[1:].any() and not label.any()


def test_softmax_in_place(interpreter: GlooPool) -> None:
    """Catches a maximum of one block taken for the row's, a label's logit of another column or read
    after it was overwritten, columns of the neighbour, and a NaN that a maximum hides.
    """
    interpreter.run(1, softmax_job)


def loss_job(launch: Launch, vocab: int, sequence: bool) -> dict[Any, dict[str, Any]]:
    from tests.support.triton_interpreter import ready

    ready()
    from k2train.parallel import fused_cross_entropy
    from k2train.triton_kernels import softmax

    softmax.LARGEST_BLOCK = 64
    kept, calls = fused_cross_entropy._softmax_, []

    def counted(logits: torch.Tensor, index: torch.Tensor) -> Any:
        calls.append(logits.shape)
        return softmax.softmax_(logits, index)

    fused_cross_entropy._softmax_ = counted
    try:
        found = fused_job(launch, vocab, sequence)
    finally:
        fused_cross_entropy._softmax_ = kept
    assert calls, "the loss did not use the kernel"
    return found


@pytest.mark.parametrize(("tp", "sequence", "vocab"), ((1, False, 251), (2, True, 251)))
def test_the_loss_with_it(interpreter: GlooPool, tp: int, sequence: bool, vocab: int) -> None:
    """Catches statistics that ranks cannot combine, and a gradient made from something else."""
    parts = interpreter.run(tp, loss_job, vocab, sequence)
    for kind, strip in FUSED:
        loss, dx, dw = whole_head(vocab, kind)
        got = [part[kind, strip] for part in parts]
        found_dx = np.concatenate([p["dx"] for p in got]) if sequence else got[0]["dx"]
        found_dw = np.concatenate([p["dw"] for p in got])
        tolerance = 2e-2 if kind == "bf16" else 1e-5
        assert got[0]["loss"] == pytest.approx(loss, rel=1e-3 if kind == "bf16" else 1e-6)
        assert found_dx.shape[0] == SEQUENCE
        assert np.abs(found_dx - dx).max() <= tolerance * np.abs(dx).max(), (kind, strip)
        assert np.abs(found_dw - dw).max() <= tolerance * np.abs(dw).max(), (kind, strip)


def not_finite_job(launch: Launch) -> list[bool]:
    from tests.support.triton_interpreter import ready

    ready()
    from k2train.parallel.cross_entropy import VocabShard
    from k2train.parallel.fused_cross_entropy import fused_cross_entropy
    from k2train.parallel.grid import SINGLE
    from k2train.triton_kernels.softmax import softmax_

    found = []
    for value in (float("nan"), INFINITE, 1.0):
        hidden, weight = torch.ones(3, 1, 4), torch.nn.Parameter(torch.ones(7, 4))
        hidden[1, 0, 2] = value
        hidden.requires_grad_()
        labels, shard = torch.zeros(3, 1, dtype=torch.long), VocabShard(0, 7, 7, SINGLE["tp"])
        loss = fused_cross_entropy(hidden, weight, labels, shard, 1.0, 2, softmax=softmax_)
        loss.backward()
        plain = F.cross_entropy((hidden @ weight.t()).flatten(0, 1), labels.flatten())
        assert bool(plain.isfinite()) == bool(loss.isfinite())
        assert hidden.grad is not None and weight.grad is not None
        found += [bool(t.isfinite().all()) for t in (loss, hidden.grad, weight.grad)]
    return found


def test_what_is_not_finite_stays_so(interpreter: GlooPool) -> None:
    """Catches a step that is applied although a logit was not a number."""
    assert interpreter.run(1, not_finite_job) == [[False] * 6 + [True] * 3]
