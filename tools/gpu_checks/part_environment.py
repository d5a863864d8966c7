"""GPU check part `environment`: a first kernel, and the facts of device and software."""

import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import process_start_seconds
from benchmarks.gpu.part_device import facts
from gpu_checks.numerics import DifferentError

STARTED = time.monotonic() - process_start_seconds()
"""Seconds from the start of this process until torch was imported."""


def run(bench: Bench) -> None:
    """Compute on the device, then write what it is."""
    bench.attempt("first kernel", lambda: first_kernel(bench))
    bench.attempt("facts", lambda: facts(bench))
    bench.attempt("bf16 product", lambda: exact_product(bench))


def first_kernel(bench: Bench) -> Mapping[str, Any]:
    """Seconds until torch was imported, and of the first kernel with the context it makes."""
    began = time.monotonic()
    total = float(torch.ones(4097, device=bench.device).sum())
    if total != 4097:
        raise DifferentError(f"the sum of 4097 ones is {total:g}")
    return {"import_seconds": STARTED, "first_seconds": time.monotonic() - began}


def exact_product(bench: Bench) -> Mapping[str, Any]:
    """A product of small whole numbers in bf16, whose every sum is exact in fp32."""
    generator = torch.Generator().manual_seed(5)
    a, b = (
        torch.randint(-3, 4, (256, 256), generator=generator).to(torch.bfloat16) for _ in range(2)
    )
    found = (a.to(bench.device) @ b.to(bench.device).t()).float().cpu()
    wanted = (a.long() @ b.long().t()).float().to(torch.bfloat16).float()
    wrong = int((found != wanted).sum())
    if wrong:
        raise DifferentError(f"{wrong} of {wanted.numel()} values of an exact product are wrong")
    return {"values": wanted.numel()}
