"""Machine code of every Triton kernel, for devices that are not here: compiled, and looked at.

- The launches are those of the functions that a run calls, at the sizes of K2's layers. They are
  recorded instead of started, and compiled for a device by its compute capability.
- ptxas, which comes with Triton, makes the machine code. So a kernel that a device's compiler
  refuses fails here.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from k2train.launch.environment import Launch
from tests.support.gloo_pool import GlooPool
from tests.support.lanes import lanes

KERNELS = {
    *("norm._forward_kernel", "norm._backward_kernel"),
    *("rotary._split_kernel", "rotary._join_kernel"),
    *("swiglu._forward_kernel", "swiglu._backward_kernel"),
    *("softmax._softmax_kernel", "adamw._adamw_kernel"),
}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
MULTIPLY_ADDS = {"softmax._softmax_kernel": "log and exp", "adamw._adamw_kernel": "by name"}
"""Kernels that may hold fused multiply-adds, and where they come from."""


def launch_all(dtype: torch.dtype) -> None:
    """Call every function of a run with every choice that makes another kernel."""
    from k2train.triton_kernels import adamw, norm, rotary, softmax, swiglu

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, requires_grad=True)

    x, weight = empty(2, 1, 8192), empty(8192)
    norm.norm(x, weight, 1e-5).sum().backward()
    total, y = norm.add_norm(x, empty(2, 1, 8192), weight, 1e-5)
    (total.sum() + y.sum()).backward()

    table = torch.empty(2, 1, 1, 128)
    q, k, v = rotary.split(empty(2, 1, 24 * 128), table, table, 8, 8)
    (q.sum() + k.sum() + v.sum()).backward()
    swiglu.swiglu(empty(2, 1, 2 * 2752)).sum().backward()
    softmax.softmax_(empty(2, 32032).detach(), torch.zeros(2, 1, dtype=torch.int64))

    state = [torch.zeros(4096) for _ in range(4)]
    one, numbers = torch.ones(()), (1, 0.1, (0.9, 0.95), 1e-8, 0.1)
    adamw.adamw_(
        *state, *numbers, one, one, None if dtype == torch.float32 else state[0].bfloat16()
    )


def compile_job(launch: Launch, capability: int, cache: str) -> dict[str, list[str]]:
    """Compile all launches of both precisions; PTX by kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    assert not triton.knobs.runtime.interpret
    triton.knobs.cache.dir = cache
    launches: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False))
        named |= {name: kwargs.pop(name) for name in self.arg_names if name in kwargs}
        launches.append((self, named, kwargs))

    kept, JITFunction.run = JITFunction.run, record
    try:
        for dtype in (torch.bfloat16, torch.float32):
            launch_all(dtype)
    finally:
        JITFunction.run = kept

    found: dict[str, list[str]] = {}
    for kernel, named, options in launches:
        fixed = {p.name: named[p.name] for p in kernel.params if p.is_constexpr}
        types = {name: type_of(value) for name, value in named.items()}
        types |= dict.fromkeys(fixed, "constexpr")
        made = triton.compile(
            ASTSource(kernel, types, fixed),
            target=GPUTarget("cuda", capability, 32),
            options=options,
        )
        assert made.asm["cubin"], "ptxas made no machine code"
        name = f"{kernel.fn.__module__.rsplit('.', 1)[1]}.{kernel.fn.__name__}"
        # Addresses count from the program's number: in 32 bits they end at 2^31 values.
        (program,) = re.findall(r"(%\S+) = tt\.get_program_id x", made.asm["ttir"])
        assert f"arith.extsi {program} : i32 to i64" in made.asm["ttir"], f"{name}: too short"
        found.setdefault(name, []).append(made.asm["ptx"])
    return found


def type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


@pytest.mark.parametrize(
    *lanes("capability", (80, 90, 100), quick=lambda capability: capability == 90)
)
def test_every_kernel_compiles(pool: GlooPool, tmp_path: Path, capability: int) -> None:
    """Catches a kernel that only the interpreter runs, atomics, which add in another order in every
    run, operations that the compiler fuses or rounds otherwise than the tests saw, and addresses
    that are too short for a large micro-batch.
    """
    pytest.importorskip("triton")
    (found,) = pool.run(1, compile_job, capability, str(tmp_path))
    assert set(found) == KERNELS
    for name, versions in found.items():
        for ptx in versions:
            assert f".target sm_{capability}" in ptx
            assert not re.search(r"\b(atom|red)\.\w*\.?(global|shared)", ptx), name
            # Those of bf16 only convert, where a device has no instruction of its own.
            fused = set(re.findall(r"\bfma\.[\w.]*f32\b", ptx))
            assert name in MULTIPLY_ADDS or not fused, name
        assert any(re.search(r"cvt\.rn\.bf16", ptx) for ptx in versions), "bf16 is not rounded"

    for name in ("adamw._adamw_kernel", "rotary._split_kernel", "rotary._join_kernel"):
        for ptx in found[name]:
            rounded = set(re.findall(r"\b(?:add|sub|mul|fma)[\w.]*f32", ptx))
            assert rounded <= {f"{op}.rn.f32" for op in ("add", "sub", "mul", "fma")}, name
    for ptx in found["adamw._adamw_kernel"]:
        divisions = set(re.findall(r"\b(?:div|sqrt|rcp|rsqrt)\.[\w.]+", ptx))
        assert divisions == {"div.rn.f32", "sqrt.rn.f32"}, "not rounded as IEEE says"
