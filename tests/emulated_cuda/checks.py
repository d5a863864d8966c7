"""What the emulation must and must not do, checked inside an emulated process (`of_...`)."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import _disable_current_modes

from tests.emulated_cuda.mode import JOURNAL, waits

CUDA = torch.device("cuda", 0)


def error_of(function: Callable[[], Any]) -> str:
    """The first line of what `function` raises; "" when it raises nothing."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def of_mixed_devices() -> dict[str, str]:
    """What an operation on host and device tensors says; scalars in host memory are allowed."""
    x, y = torch.ones(3, device=CUDA), torch.ones(3)
    return {
        "added": error_of(lambda: x + y),
        "written": error_of(lambda: x.add_(y)),
        "out": error_of(lambda: torch.add(x, x, out=y)),
        "multiplied": error_of(lambda: torch.ones(3, 3, device=CUDA) @ y),
        "joined": error_of(lambda: torch.cat((x, y))),
        "scalar": error_of(lambda: x + torch.tensor(2.0)),
    }


def of_waits() -> dict[str, list[str]]:
    """Kinds of waits that each action causes."""
    x, pinned = torch.ones(3, device=CUDA), torch.ones(3).pin_memory()
    actions: dict[str, Callable[[], object]] = {
        "item": x[0].item,
        "tolist": x.tolist,
        "truth": lambda: bool(x[0] > 0),
        "equal": lambda: torch.equal(x, x),
        "nonzero": x.nonzero,
        "mask": lambda: x[x > 0],
        "cpu": x.cpu,
        "upload": lambda: torch.ones(3).to(CUDA),
        "late upload": lambda: torch.ones(3).to(CUDA, non_blocking=True),
        "tensor": lambda: torch.tensor([1.0], device=CUDA),
        "blocking copy": lambda: pinned.copy_(x),
        "synchronize": torch.cuda.synchronize,
        "stream": torch.cuda.current_stream().synchronize,
        "pinned download": lambda: pinned.copy_(x, non_blocking=True),
        "pinned upload": lambda: x.copy_(pinned, non_blocking=True),
        "computing": lambda: (x * 2 + 1).sum(),
        "filling": lambda: x.fill_(1.0),
    }
    found = {}
    for name, action in actions.items():
        with waits() as seen:
            action()
        found[name] = sorted(f"{what.split(' at ')[0]} {n}" for what, n in seen.items())
    return found


def of_memory() -> dict[str, Any]:
    """Values and bookkeeping of device memory."""
    x = torch.arange(12, dtype=torch.float32, device=CUDA).view(3, 4)
    view = x.t()[1:, ::2]
    view.mul_(10)
    out = torch.empty(3, 4, device=CUDA)
    returned = torch.add(x, 1, out=out)
    before = torch.cuda.memory_allocated()
    big = torch.empty(1 << 20, dtype=torch.float32, device=CUDA)
    return {
        "x": x.tolist(),
        "out": out.tolist(),
        "same": returned is out,
        "strides": (x.t() + 0).stride(),
        "bytes": torch.cuda.memory_allocated() - before,
        "fresh": bool(big.isnan().all()),
        "full": error_of(lambda: torch.empty(90 << 30, dtype=torch.uint8, device=CUDA)),
        "pinned": (torch.ones(3).pin_memory().is_pinned(), torch.ones(3).is_pinned()),
        "capability": torch.cuda.get_device_capability(),
        "devices": (
            str(torch.ones(2, device="cuda:1").device),
            torch.cuda.device_count(),
        ),
    }


def of_launches() -> dict[str, str]:
    """What comes of an operation that gets around the emulation, and of one without a kernel."""
    x, whole = (
        torch.ones(3, device=CUDA),
        torch.ones(3, 3, dtype=torch.int64, device=CUDA),
    )

    def around() -> None:
        with _disable_current_modes():
            x.add_(1)

    return {"around": error_of(around), "integers": error_of(lambda: whole @ whole)}


def of_threads() -> list[str]:
    """Devices and values of a gradient, which is computed in a thread of the autograd engine."""
    x = torch.ones(3, device=CUDA, requires_grad=True)
    before = JOURNAL.operations["aten::mul"]
    (x * x * 3).sum().backward()
    assert x.grad is not None, "a gradient has arrived"
    return [
        str(x.grad.device),
        str(x.grad.tolist()),
        str(JOURNAL.operations["aten::mul"] > before),
    ]


def of_exchanges() -> dict[str, Any]:
    """What a collective's tensors hold before and after it is waited for, in a world of one."""
    x, out = torch.ones(2, device=CUDA), torch.ones(2, device=CUDA)
    reduced = dist.all_reduce(x, async_op=True)
    early = x.tolist()
    reduced.wait()
    gathered = dist.all_gather_into_tensor(out, x, async_op=True)
    x.add_(1)
    whole = torch.ones(2, dtype=torch.int64, device=CUDA)
    dist.broadcast(whole, 0)
    return {
        "early": early,
        "changed": error_of(gathered.wait),
        "late": (x - 1).tolist(),
        "whole": whole.tolist(),
    }


def of_events() -> tuple[float, str]:
    """Milliseconds between two events around a sleep of 20, and an event that never was."""
    one, two, never = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    one.record()
    time.sleep(0.02)
    two.record()
    return one.elapsed_time(two), error_of(lambda: one.elapsed_time(never))


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def of_attention() -> dict[str, list[float]]:
    """Largest differences of out, dq, dk and dv of each GPU kernel's twin from fp64 on the host."""
    found = {}
    for name, backend, dtype, groups, masked in (
        ("flash", SDPBackend.FLASH_ATTENTION, torch.bfloat16, 1, False),
        ("flash grouped", SDPBackend.FLASH_ATTENTION, torch.bfloat16, 2, False),
        ("cudnn", SDPBackend.CUDNN_ATTENTION, torch.bfloat16, 1, False),
        ("cudnn grouped", SDPBackend.CUDNN_ATTENTION, torch.bfloat16, 2, False),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION, torch.float32, 1, False),
        ("efficient masked", SDPBackend.EFFICIENT_ATTENTION, torch.float32, 1, True),
    ):
        draw = torch.Generator().manual_seed(3)
        shapes = [(2, 4, 16, 8)] + [(2, 4 // groups, 16, 8)] * 2 + [(2, 4, 16, 8)]
        host = [torch.randn(s, generator=draw).to(dtype).double() for s in shapes]
        mask = None
        if masked:
            blocks = torch.arange(16) // 5
            mask = ((blocks[:, None] == blocks[None, :]).tril()).expand(2, 1, 16, 16)

        results = []
        for device in (torch.device("cpu"), CUDA):
            kind = dtype if device == CUDA else torch.float64
            q, k, v, dy = (x.to(device, kind, copy=True) for x in host)
            for x in (q, k, v):
                x.requires_grad_()
            where = None if mask is None else mask.to(device)
            with sdpa_kernel(backend if device == CUDA else SDPBackend.MATH):
                out = _attention(q, k, v, where)
            out.backward(dy)
            results.append([x.detach().cpu().double() for x in (out, q.grad, k.grad, v.grad)])
        found[name] = [
            float((one - other).abs().max()) for one, other in zip(*results, strict=True)
        ]
    return found


BORDERS = (0, 3, 4, 16, 21, 32)
"""Documents of two rows of 16 tokens; none crosses the end of a row."""


def _on_device(dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(BORDERS, dtype=dtype, device=CUDA)


def of_documents() -> dict[str, list[float]]:
    """The same differences of torch's attention within documents, from a mask in fp64.

    `mistaken`: from attention that stops at the ends of rows only.
    """
    found = {}
    ids = torch.bucketize(torch.arange(32), torch.tensor(BORDERS[1:]), right=True)
    for name, kv_heads, blocks in (
        ("alone", 4, ids),
        ("grouped", 2, ids),
        ("mistaken", 4, torch.arange(32) // 16),
    ):
        draw = torch.Generator().manual_seed(3)
        shapes = [(32, n, 8) for n in (4, kv_heads, kv_heads, 4)]
        *inputs, dy = [torch.randn(shape, generator=draw).bfloat16() for shape in shapes]
        mask = (blocks[:, None] == blocks[None, :]).tril()

        host = [x.double().requires_grad_() for x in inputs]
        with sdpa_kernel(SDPBackend.MATH):
            wanted = _attention(*(x.transpose(0, 1)[None] for x in host), mask)[0].transpose(0, 1)
        wanted.backward(dy.double())

        here = [x.to(CUDA, copy=True).requires_grad_() for x in inputs]
        out = varlen_attn(
            *here, _on_device(), _on_device(), 12, 12, window_size=(-1, 0), enable_gqa=True
        )
        out.backward(dy.to(CUDA))
        pairs = zip((out, *(x.grad for x in here)), (wanted, *(x.grad for x in host)), strict=True)
        found[name] = [
            float((mine.detach().cpu().double() - theirs.detach()).abs().max())
            for mine, theirs in pairs
        ]
    return found


def of_refused_documents() -> dict[str, str]:
    """What comes of documents that the GPU's kernel does not take, or computes in part."""

    def attend(borders: Tensor, longest: int = 12, width: int = 8) -> str:
        x = torch.ones(32, 2, width, dtype=torch.bfloat16, device=CUDA)
        return error_of(
            lambda: varlen_attn(x, x, x, borders, borders, longest, longest, window_size=(-1, 0))
        )

    return {
        "right": attend(_on_device()),
        "short": attend(_on_device(), 11),
        "wide": attend(_on_device(torch.int64)),
        "few": attend(_on_device()[:-1]),
        "host": attend(torch.tensor(BORDERS, dtype=torch.int32)),
        "narrow": attend(_on_device(), width=12),
    }


def of_kernels() -> dict[str, float]:
    """Largest differences of the other twins from the host's own operations."""
    draw = torch.Generator().manual_seed(5)
    x, w, dy = (torch.randn(s, generator=draw) for s in ((6, 8), (8,), (6, 8)))

    def norm(device: torch.device) -> list[Tensor]:
        a, b = (t.to(device, copy=True).requires_grad_() for t in (x, w))
        y = F.rms_norm(a, (8,), b, 1e-5)
        y.backward(dy.to(device))
        return [t.detach().cpu() for t in (y, a.grad, b.grad)]

    pairs = zip(norm(torch.device("cpu")), norm(CUDA), strict=True)
    found = {"rms norm": max(float((one - other).abs().max()) for one, other in pairs)}

    total = torch.randn(6, 6, generator=draw)
    factor = x.bfloat16()
    wanted = total + factor.float() @ factor.float().t()
    on = total.to(CUDA, copy=True)
    torch.addmm(on, factor.to(CUDA), factor.to(CUDA).t(), out_dtype=torch.float32, out=on)
    found["product into fp32"] = float((on.cpu() - wanted).abs().max())
    return found
