"""Formulas of a layer's parts, written out for a compiler: values and gradients, without one."""

import ast
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from k2train.model.kernels import elementwise, formulas, select
from k2train.model.kernels.elementwise import (
    cut_tables,
    reference_norm,
    reference_split,
    reference_swiglu,
)
from k2train.model.kernels.formulas import (
    COMPILED_VERSION,
    FUSED,
    Formulas,
    compiled_formulas,
)

EPS, HEADS, KV_HEADS = 1e-3, 4, 2


def itself(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


WRITTEN = compiled_formulas(itself)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def tables(s: int, d: int) -> tuple[Tensor, Tensor]:
    """Tables of more positions than are used; both halves of a head turn alike."""
    angles = randn(s + 3, 1, 1, d // 2).repeat(1, 1, 1, 2)
    return angles.cos(), angles.sin()


def gradients(function: Callable[..., Any], inputs: list[Tensor], dy: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    made = function(*leaves)
    return list(torch.autograd.grad(made, leaves, dy))


@pytest.mark.parametrize("formulas", (WRITTEN, FUSED), ids=("written", "fused"))
def test_written_formulas_have_the_gradients_of_autograd(formulas: Formulas) -> None:
    """Catches a wrong formula of either direction, and a residual or its gradient left out."""
    torch.manual_seed(3)
    x, residual, weight, dy, dsum = randn(6, 8), randn(6, 8), randn(8), randn(6, 8), randn(6, 8)
    y, scale = formulas.norm(x, weight, EPS)
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(y, reference_norm(x, weight, EPS))
    total, added, scale = formulas.add_norm(x.clone(), residual, weight, EPS)
    close((total, added), (x + residual, reference_norm(x + residual, weight, EPS)))

    def stream(total: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return reference_norm(total, weight, EPS), total * 1.0

    expected = gradients(stream, [total, weight], [dy, dsum])
    close(list(formulas.norm_backward(dy, total, scale, weight, dsum)), expected)

    gate_up, dactive = randn(6, 10), randn(6, 5)
    close(formulas.swiglu(gate_up), reference_swiglu(gate_up))
    [expected_swiglu] = gradients(reference_swiglu, [gate_up], [dactive])
    close(formulas.swiglu_backward(dactive, gate_up), expected_swiglu)


@pytest.mark.parametrize("formulas", (WRITTEN, FUSED), ids=("written", "fused"))
def test_written_split_rotates_and_turns_back(formulas: Formulas) -> None:
    """Catches heads in another order, a turn in the wrong direction, and tables not cut."""
    torch.manual_seed(4)
    s, b, d = 5, 2, 6
    packed, (cos, sin) = randn(s, b, (HEADS + 2 * KV_HEADS) * d), tables(s, d)
    made = formulas.split(packed, *cut_tables(cos, sin, s), HEADS, KV_HEADS)
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(made, reference_split(packed, cos, sin, HEADS, KV_HEADS))

    dq, dk, dv = (randn(*x.shape) for x in made)
    [expected] = gradients(
        lambda packed: reference_split(packed, cos, sin, HEADS, KV_HEADS), [packed], [dq, dk, dv]
    )
    cut_cos, cut_sin = cut_tables(cos, sin, s)
    close(formulas.split_backward(dq, dk, dv, cut_cos, cut_sin), expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_written_formulas_keep_the_dtypes_of_the_fused(dtype: torch.dtype) -> None:
    """Catches a bf16 run whose compiled layers keep wide tensors, or round the norm's scale."""
    x, weight, gate_up = (t.to(dtype) for t in (randn(6, 8), randn(8), randn(6, 10)))
    cos, sin = (t.float() for t in cut_tables(*tables(5, 6), 5))
    packed = randn(5, 2, 48).to(dtype)

    def dtypes(formulas: Formulas) -> list[torch.dtype]:
        _, scale = formulas.norm(x, weight, EPS)
        heads = formulas.split(packed, cos, sin, HEADS, KV_HEADS)
        made = (
            *formulas.add_norm(x.clone(), x, weight, EPS),
            *formulas.norm_backward(x, x, scale, weight, x),
            *heads,
            formulas.split_backward(*heads, cos, sin),
            formulas.swiglu(gate_up),
            formulas.swiglu_backward(gate_up[:, :5], gate_up),
        )
        return [t.dtype for t in made]

    assert dtypes(WRITTEN) == dtypes(FUSED)


def test_compile_on_compiles_every_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `kernels.compile: on` whose layers run eagerly, or in part, without a word."""
    monkeypatch.setattr(select.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(select, "compiled_once", lambda function: ("compiled", function.__name__))
    chosen: Any = select.choose_kernels(compile="on").formulas
    found = {field.name: getattr(chosen, field.name) for field in fields(chosen)}
    assert found == {name: ("compiled", f"written_{name}") for name in found}
    assert select.choose_kernels(compile="off").formulas is FUSED
    assert select.choose_kernels(compile="on", norm="torch").formulas is None
    gpu = select.DeviceTraits(torch.device("cuda"), torch.bfloat16)
    for compiled in (True, False):
        assert select.choose_formulas("fused", "fused", compiled, gpu) is None


def compiled_code() -> str:
    """Source of every function that is compiled or called by one, without its docstring."""
    names = ("written_", "reference_", "wide_dtype", "_turned", "_heads", "_to_attention")
    found = []
    for module in (formulas, elementwise):
        for part in ast.parse(inspect.getsource(module)).body:
            if isinstance(part, ast.FunctionDef) and part.name.startswith(names):
                told = ast.get_docstring(part) is not None
                part.body = part.body[told:]
                found.append(ast.unparse(part))
    return "\n".join(found)


def test_other_compiled_code_has_another_version() -> None:
    """Catches formulas that round otherwise under the same kernels line: a resume would then
    demand the bits of the code before.

    Raise `COMPILED_VERSION` when a formula changes, and put the new hash here.
    """
    digest = hashlib.sha256(compiled_code().encode()).hexdigest()[:16]
    assert (COMPILED_VERSION, digest) == (2, "24859efdfa477f42")


def test_the_record_says_which_code_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a version that nothing records, and one in the line of a run that compiles nothing:
    its bits would be compared within rounding only."""
    monkeypatch.setattr(select.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(select, "compiled_once", itself)
    assert f"compiled code {COMPILED_VERSION}" in str(select.choose_kernels(compile="on"))
    assert "compiled code" not in str(select.choose_kernels(compile="off"))
