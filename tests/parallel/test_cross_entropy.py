"""Vocabulary-parallel cross entropy of given logits, against F.cross_entropy."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from k2train.errors import DataError
from k2train.launch.environment import Launch
from k2train.parallel.cross_entropy import IGNORE, vocab_parallel_cross_entropy
from k2train.parallel.grid import Axis
from k2train.parallel.shard import even_slice
from tests.support.gloo_pool import GlooPool

SEQUENCE, ROWS = 8, 3
KINDS = ("plain", "large", "spread", "bf16")


def logits_of(kind: str, vocab: int) -> torch.Tensor:
    x = torch.randn(SEQUENCE, ROWS, vocab, generator=torch.Generator().manual_seed(3))
    if kind == "large":
        return x * 50 + 1e4
    if kind == "spread":
        # The largest of a row is far above all that other ranks hold.
        return x + 1e4 * (torch.arange(vocab) == vocab // 2)
    return x.bfloat16() if kind == "bf16" else x


def labels_of(vocab: int) -> torch.Tensor:
    labels = torch.randint(0, vocab, (SEQUENCE, ROWS), generator=torch.Generator().manual_seed(4))
    labels[0, 0], labels[1, 0], labels[2, 0] = 0, vocab - 1, vocab // 2
    labels[-1] = IGNORE
    return labels


def mixing() -> torch.Tensor:
    return torch.linspace(0.5, 2, SEQUENCE * ROWS).view(SEQUENCE, ROWS)


def loss_job(launch: Launch, vocab: int) -> dict[str, Any]:
    tp = Axis("tp", launch.world_size, launch.rank, dist.group.WORLD)
    start, stop = even_slice(vocab, tp.size, tp.rank)
    found: dict[str, Any] = {"box": (start, stop)}

    for kind in KINDS:
        whole = logits_of(kind, vocab)
        mine = whole[..., start:stop].clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(mine, labels_of(vocab), start, vocab, tp)
        (loss * mixing()).sum().backward()
        assert torch.equal(mine.detach(), whole[..., start:stop]), "the logits were written over"
        assert mine.grad.dtype == mine.dtype and loss.dtype == torch.float32
        found[kind] = (loss.detach().numpy(), mine.grad.float().numpy())

    errors = []
    for bad in (vocab, vocab + 1, -1, -99, 2**31):
        labels = labels_of(vocab)
        labels[4, 1] = bad
        try:
            vocab_parallel_cross_entropy(
                logits_of("plain", vocab)[..., start:stop], labels, start, vocab, tp
            )
            errors.append("taken")
        except DataError as error:
            errors.append(str(error))

    found["errors"] = errors
    return found


@pytest.mark.parametrize(("tp", "vocab"), ((1, 251), (2, 251), (4, 251), (4, 256), (4, 5), (2, 3)))
def test_loss_and_gradient_equal_cross_entropy(pool: GlooPool, tp: int, vocab: int) -> None:
    """Catches a sum or maximum that stays local, an overflow at large logits, padding that takes
    probability.
    """
    parts = pool.run(tp, loss_job, vocab)
    labels = labels_of(vocab)
    for kind in KINDS:
        x = logits_of(kind, vocab).double().requires_grad_()
        loss = F.cross_entropy(x.permute(0, 2, 1), labels, ignore_index=IGNORE, reduction="none")
        (loss * mixing()).sum().backward()
        gradient = np.concatenate([part[kind][1] for part in parts], axis=-1)
        tolerance = 1e-2 if kind == "bf16" else 1e-5

        for part in parts:
            assert np.allclose(part[kind][0], loss.detach().numpy(), rtol=1e-5, atol=1e-5), kind
            assert np.array_equal(part[kind][0], parts[0][kind][0]), "ranks disagree on the loss"
            assert not part[kind][0][-1].any(), "a position without a label has a loss"

        assert np.allclose(gradient, x.grad.numpy(), rtol=tolerance, atol=tolerance), kind
        assert not gradient[-1].any(), "a position without a label has a gradient"
        # Softmax minus one-hot: each row sums to zero only when the probabilities of real ids sum
        # to one.
        assert np.abs(gradient.sum(-1)).max() < (0.05 if kind == "bf16" else 1e-5), kind


@pytest.mark.parametrize(("tp", "vocab"), ((1, 251), (4, 251), (4, 5)))
def test_labels_outside_the_vocabulary_are_refused(pool: GlooPool, tp: int, vocab: int) -> None:
    """Catches a label that is nobody's: its logit would count as zero and the loss could fall in
    silence.
    """
    for part in pool.run(tp, loss_job, vocab):
        for bad, text in zip((vocab, vocab + 1, -1, -99, 2**31), part["errors"], strict=True):
            assert text.startswith(
                f"label id {bad} at row 1, position 4 of a micro-batch is outside the vocabulary"
            )
