"""Attention module: heads, positions and output product, against a version built head by head."""

import pytest
import torch
from torch import Tensor

from k2train.model.architecture import Architecture
from k2train.model.attention import Attention
from k2train.model.kernels.select import DeviceTraits, Documents, choose_kernels
from k2train.model.layers import Rotary
from k2train.parallel.grid import SINGLE

HIDDEN, HEADS, KV_HEADS, LENGTH, BATCH = 24, 6, 2, 70, 3
"""Longer than a block of plain attention."""
WIDTH = HIDDEN // HEADS
CPU = torch.device("cpu")


def module(**choices: str) -> Attention:
    architecture = Architecture(1, HIDDEN, 4 * HIDDEN, HEADS, KV_HEADS, vocab_size=32)
    made = Attention(
        "layers.0.attention",
        architecture,
        SINGLE["tp"],
        choose_kernels(**choices, traits=DeviceTraits(CPU, block=True)),
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    return made


def head_by_head(made: Attention, x: Tensor, allowed: Tensor, theta: float) -> Tensor:
    """The same in float64, one head of one sequence at a time; allowed [b, s, s]."""
    qkv, output = (w.detach().double() for w in (made.qkv.weight, made.output.weight))
    q, k, v = qkv.split((HIDDEN, KV_HEADS * WIDTH, KV_HEADS * WIDTH))
    angles = torch.outer(
        torch.arange(LENGTH).double(), theta ** (-torch.arange(0, WIDTH, 2).double() / WIDTH)
    )

    def turned(y: Tensor) -> Tensor:
        a, b = y[:, : WIDTH // 2], y[:, WIDTH // 2 :]
        return torch.cat(
            (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=1
        )

    out = torch.empty(LENGTH, BATCH, HIDDEN, dtype=torch.float64)
    for row in range(BATCH):
        for head in range(HEADS):
            mine = slice(head * WIDTH, (head + 1) * WIDTH)
            group = head // (HEADS // KV_HEADS)
            theirs = slice(group * WIDTH, (group + 1) * WIDTH)
            query, key, value = (
                x[:, row] @ q[mine].t(),
                x[:, row] @ k[theirs].t(),
                x[:, row] @ v[theirs].t(),
            )
            scores = turned(query) @ turned(key).t() / WIDTH**0.5
            scores[~allowed[row]] = float("-inf")
            out[:, row, mine] = scores.softmax(dim=-1) @ value

    return out @ output.t()


CHOICES = [
    {"attention": attention, "elementwise": elementwise}
    for attention in ("sdpa", "plain", "by_length", "flash", "reference")
    for elementwise in ("fused", "reference")
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(choice.values()))
def test_every_choice_is_attention(choice: dict[str, str]) -> None:
    """Catches heads given to the wrong group, positions counted from elsewhere, a mask for the
    wrong row.
    """
    made, rotary = module(**choice), Rotary(WIDTH, LENGTH + 5, 100.0, CPU)
    x = torch.randn(LENGTH, BATCH, HIDDEN, generator=torch.Generator().manual_seed(4))
    documents = (
        torch.arange(LENGTH).div(17, rounding_mode="floor").expand(BATCH, LENGTH)
        + torch.arange(BATCH)[:, None]
    )
    documents = documents.clone()
    documents[1] = 0

    for given in (None, Documents(documents)):
        allowed = Documents(torch.zeros_like(documents) if given is None else documents).mask
        expected = head_by_head(made, x.double(), allowed[:, 0], 100.0)
        found = made(x, rotary, given).detach().double()
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_plain_needs_no_copy_on_the_way_out() -> None:
    """Catches an order of memory that is copied before the output product: both share what the
    kernel wrote.
    """
    made, rotary = module(attention="plain"), Rotary(WIDTH, LENGTH, 100.0, CPU)
    seen: list[int] = []
    kernel = made.kernel

    def watched(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        out = kernel(q, k, v, documents)
        seen.append(out.data_ptr())
        return out

    made.kernel = watched
    made.output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].data_ptr()))
    made(torch.randn(LENGTH, BATCH, HIDDEN), rotary)
    assert len(seen) == 2 and seen[0] == seen[1]
