"""Units of a micro-batch: their shapes, their order, and nothing lost between them."""

import torch
from torch import Tensor

from k2train.parallel.exact_units import Call, losses_in_units, run_in_units


class Seen:
    """A layer x -> 2 w x that keeps its inputs' shapes and the order of its gradients."""

    def __init__(self) -> None:
        self.weight = torch.ones((), requires_grad=True)
        self.shapes: list[tuple[int, ...]] = []
        self.backward: list[int] = []

    def calls(self, count: int) -> list[Call]:
        def of(unit: int) -> Call:
            def call(x: Tensor) -> Tensor:
                assert x.is_contiguous() and x.requires_grad == x.is_floating_point()
                self.shapes.append(tuple(x.shape))
                y = 2.0 * self.weight * (x if x.is_floating_point() else x.t().unsqueeze(-1))

                def came(dy: Tensor) -> None:
                    assert dy.is_contiguous()
                    self.backward.append(unit)

                y.register_hook(came)
                return y

            return call

        return [of(unit) for unit in range(count)]


def test_units_are_computed_in_order_forward_and_backward() -> None:
    """Catches units of another shape, a backward in autograd's order, and a gradient left out."""
    x = torch.arange(24.0).view(2, 4, 3).requires_grad_()
    seen = Seen()
    y = run_in_units(x, seen.calls(4))
    assert torch.equal(y, 2 * x)
    dy = torch.arange(24.0).view(2, 4, 3).flip(0)
    torch.autograd.backward(y, dy)
    assert seen.shapes == [(2, 1, 3)] * 4 and seen.backward == [0, 1, 2, 3]
    assert x.grad is not None and torch.equal(x.grad, 2 * dy)
    assert seen.weight.grad is not None and seen.weight.grad == (2 * x * dy).sum()


def test_token_ids_have_no_gradient_and_weights_do() -> None:
    """Catches a first stage whose weights get none, since its input has none."""
    ids = torch.arange(6).view(2, 3)
    seen = Seen()
    y = run_in_units(ids, seen.calls(2))
    assert torch.equal(y, 2.0 * ids.t().unsqueeze(-1)) and seen.shapes == [(1, 3)] * 2
    y.sum().backward()
    assert seen.weight.grad is not None and seen.weight.grad == 2 * 15


def test_losses_begin_their_backward_with_one() -> None:
    """A fused loss has made its gradient for an incoming 1; and no gradients without autograd."""
    hidden = torch.ones(2, 4, 3, requires_grad=True)
    came: list[float] = []

    def loss(x: Tensor) -> Tensor:
        total = x.sum()
        if total.requires_grad:
            total.register_hook(lambda grad: came.append(float(grad)))
        return total

    total = losses_in_units(hidden, [loss] * 2)
    assert total == 24
    total.backward()
    assert came == [1.0, 1.0]
    assert hidden.grad is not None and torch.equal(hidden.grad, torch.ones(2, 4, 3))
    with torch.no_grad():
        assert not run_in_units(hidden, [lambda x: x] * 2).requires_grad
