"""Gradient accumulation: the accumulators' arithmetic, and deferred weight gradients."""

from typing import Any

import pytest
import torch
from torch import nn

from k2train.parallel import grad_accumulation
from k2train.parallel.grad_accumulation import (
    IN_PLACE,
    ROUNDED,
    GradAccumulator,
    WeightGradStore,
    accumulator_of,
    add_product,
    attach,
    gradient_sums,
)
from k2train.parallel.grid import SINGLE, Axis
from k2train.parallel.shard import first_rows
from k2train.parallel.tensor_parallel import ColumnLinear, RowLinear
from k2train.parallel.vocab_embedding import VocabEmbedding


def test_products_and_rows_add_up_in_fp32() -> None:
    """Catches a sum that replaces, one at the wrong rows, and one that is rounded to the factors'
    dtype.
    """
    total = torch.full((5, 3), 1024.0)
    accumulator = GradAccumulator(total)
    dy, x = torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16)
    for _ in range(3):
        accumulator.add_product(dy, x, first_row=1)
    accumulator.add(torch.full((1, 3), 0.5), first_row=4)
    assert total[:, 0].tolist() == [1024.0, 1030.0, 1030.0, 1024.0, 1024.5]
    accumulator.add_product(dy.float(), x.float(), first_row=3)
    assert total[:, 2].tolist() == [1024.0, 1030.0, 1030.0, 1026.0, 1026.5]


HALF = torch.bfloat16
CUDA = torch.device("cuda", 0)


@pytest.fixture
def asked_device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a device that is not there answer with host memory; set what its product does."""
    ones, addmm = torch.ones, torch.addmm
    answers: list[Any] = []

    def product(into: Any, a: Any, b: Any, *, out_dtype: Any, out: Any) -> Any:
        assert out_dtype == torch.float32 and out is into
        answer = answers.pop()
        if isinstance(answer, Exception):
            raise answer
        return out.copy_(addmm(into, a.float(), b.float()) if answer is None else answer(a, b))

    monkeypatch.setattr(torch, "ones", lambda *size, device, **more: ones(*size, **more))
    monkeypatch.setattr(torch, "addmm", product)
    grad_accumulation._adds_into_fp32.cache_clear()
    yield answers
    grad_accumulation._adds_into_fp32.cache_clear()


@pytest.mark.parametrize(
    "answer",
    (
        NotImplementedError("Could not run 'aten::addmm.dtype_out' with arguments from 'CUDA'"),
        TypeError("addmm() got an unexpected keyword argument 'out_dtype'"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasGemmEx"),
        # Accepted, but rounded on the way.
        lambda a, b: 1 + (a @ b).float(),
    ),
)
def test_a_device_that_cannot_add_into_fp32_is_told(asked_device: Any, answer: Any) -> None:
    """Catches gradients rounded to bf16 under the name of exact ones."""
    asked_device.append(answer)
    assert gradient_sums(CUDA, HALF) == ROUNDED
    assert gradient_sums(CUDA, HALF) == ROUNDED and not asked_device, "asked once"


def test_a_device_that_adds_into_fp32_is_told(asked_device: Any) -> None:
    """Catches a device asked for what it need not do, and a temporary where none is needed."""
    asked_device.append(None)
    assert gradient_sums(CUDA, HALF) == IN_PLACE
    assert gradient_sums(CUDA, torch.float32) == IN_PLACE and not asked_device
    assert gradient_sums(torch.device("cpu"), HALF) == ROUNDED
    assert gradient_sums(torch.device("cpu"), torch.float32) == IN_PLACE


@pytest.mark.parametrize(
    "error",
    (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        TypeError("unsupported operand type(s) for *: 'Tensor' and 'NoneType'"),
    ),
)
def test_any_other_error_ends_the_start(asked_device: Any, error: Exception) -> None:
    """Catches a broken device that quietly computes with other numbers."""
    asked_device.append(error)
    with pytest.raises(type(error), match=str(error)[:20].replace("(", r"\(")):
        gradient_sums(CUDA, HALF)


def test_what_is_said_is_what_is_done() -> None:
    """Catches a line about one way of adding and a product that takes another: 257 is no bf16."""
    dy, x = torch.ones(256, 2, dtype=HALF), torch.ones(256, 3, dtype=HALF)
    x[0] = 2.0
    for factor in (HALF, torch.float32):
        total = torch.zeros(2, 3)
        add_product(total, dy.to(factor), x.to(factor))
        expected = 256 if gradient_sums(torch.device("cpu"), factor) == ROUNDED else 257
        assert total.unique().tolist() == [expected]


def test_arrivals_are_told() -> None:
    """Catches an accumulator that tells nobody, and one that needs somebody to tell."""
    arrived: list[int] = []
    GradAccumulator(torch.zeros(1)).complete()
    GradAccumulator(torch.zeros(1), lambda: arrived.append(1)).complete()
    assert arrived == [1]


def test_a_sink_belongs_to_its_parameter() -> None:
    """Catches an accumulator found on another parameter, and one that is invented."""
    one, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    attach(one, GradAccumulator(torch.zeros(2)))
    assert accumulator_of(one) is not None
    assert accumulator_of(other) is None


def test_work_is_done_at_once_or_kept() -> None:
    """Catches work that is kept and done as well, lost when the pass ends, or recorded by autograd
    when it comes late.
    """
    work, done = WeightGradStore(), []
    work.submit(lambda: done.append("at once"))
    assert not work.is_deferring

    with work.deferring() as kept:
        assert work.is_deferring
        work.submit(lambda: done.append("first"))
        work.submit(lambda: done.append(torch.is_grad_enabled()))

    assert done == ["at once"]
    work.submit(lambda: done.append("between"))
    for late in kept:
        late()
    assert done == ["at once", "between", "first", False]


def test_two_passes_do_not_share_a_list() -> None:
    """Catches work of one micro-batch that ends up in another's list; a pass that failed must not
    keep on keeping.
    """
    work = WeightGradStore()
    with work.deferring() as one:
        work.submit(lambda: None)
        with pytest.raises(AssertionError, match="inside another one"), work.deferring():
            pass
    assert len(one) == 1
    with pytest.raises(ZeroDivisionError), work.deferring():
        _ = 1 // 0
    assert not work.is_deferring


def test_an_embedding_adds_its_rows_in_order() -> None:
    """Catches another order of sums (another bit), and ids that other ranks hold, added to some row
    of this one.
    """
    embedding = VocabEmbedding("e", 10, 6, Axis("tp", 3, 1, None), 1.0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 10, (9, 7), generator=generator)
    dy = torch.randn(9, 7, 6, generator=generator)
    start = torch.randn(embedding.weight.shape, generator=generator)
    found, expected = start.clone(), start.clone()
    embedding.add_rows(found, ids, dy)

    for position in range(9):
        for row in range(7):
            here = int(ids[position, row]) - embedding.start
            if 0 <= here < embedding.stop - embedding.start:
                expected[here] += dy[position, row]

    assert torch.equal(found, expected)
    assert not torch.equal(found, start)


def test_an_embedding_waits_until_it_is_asked() -> None:
    """Catches an embedding that adds in the backward pass of a schedule that wants it later, or
    never.
    """
    embedding = VocabEmbedding("e", 10, 6, SINGLE["tp"], 1.0)
    torch.nn.init.normal_(embedding.weight)
    attach(embedding.weight, GradAccumulator(torch.zeros(10, 6)))
    with embedding.weight_grad_store.deferring() as kept:
        embedding(torch.tensor([[3, 3]])).sum().backward()
    assert not embedding.weight.accumulator.total.any(), "added before its time"
    for late in kept:
        late()
    assert embedding.weight.accumulator.total[3].tolist() == [2.0] * 6
    assert embedding.weight.grad is None


@pytest.mark.parametrize("with_sink", (True, False))
def test_sums_over_micro_batches(with_sink: bool) -> None:
    """Catches a layer whose gradient goes nowhere, to both places, or only once."""
    single = SINGLE["tp"]
    layers: list[Any] = [
        VocabEmbedding("e", 7, 4, single, 1.0),
        ColumnLinear(4, {"c": 6}, single, 1.0),
        RowLinear("r", 6, 4, single, 1.0),
    ]
    for layer in layers:
        torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
        if with_sink:
            attach(layer.weight, GradAccumulator(torch.zeros(layer.weight.shape)))

    weights = [layer.weight.detach().clone().requires_grad_() for layer in layers]
    for seed in (1, 2, 3):
        tokens = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(seed))
        x: Any = tokens
        for layer in layers:
            x = layer(x)
        x.square().sum().backward()
        (weights[0][tokens.t()] @ weights[1].t() @ weights[2].t()).square().sum().backward()

    for layer, weight in zip(layers, weights, strict=True):
        found = layer.weight.accumulator.total if with_sink else layer.weight.grad
        assert torch.allclose(found, weight.grad, rtol=1e-5, atol=1e-6)
        assert (layer.weight.grad is None) == with_sink


@pytest.mark.parametrize("rows", (4, 3))
def test_first_rows_are_a_view(rows: int) -> None:
    """Catches a copy, which an in-place sum would be lost in, and a row too many."""
    total = torch.zeros(4, 2)
    first_rows(total, rows).add_(1.0)
    assert total[:, 0].tolist() == [1.0] * rows + [0.0] * (4 - rows)
