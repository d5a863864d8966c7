"""GPU benchmark part `device`: device facts, and the reference rates of matmul and copy.

- The matmul rate is the best sustained one over several large shapes on random data, in this call.
- A data sheet gives a clock that no power limit allows, and zeros run faster than random numbers.
"""

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sizes import Sizes, sizes
from benchmarks.gpu.timing import Timer
from k2train.plan.device_peak import peak_flops
from k2train.text import bytes_text

PACKAGES = (
    "transformers",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "transformer-engine",
    "apex",
    "numpy",
)
CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
REPEATS = 4
"""Products per sample: long enough to be sustained, short enough for ten samples per shape."""


def run(bench: Bench) -> None:
    """Measure the device's facts and rates, and write their rows."""
    work = sizes(bench.dry)
    bench.attempt("facts", lambda: facts(bench))
    timer = Timer(bench)
    for rows, inner, columns in work.products:
        what = f"[{rows} x {inner}] x [{inner} x {columns}]"
        bench.attempt(
            what, partial(product, bench, timer, work, rows, inner, columns), kind="product"
        )
    bench.attempt("copy on the device", lambda: copy(bench, timer, work), kind="copy")
    bench.attempt("clocks after", lambda: {"facts": clocks()})


def facts(bench: Bench) -> Mapping[str, Any]:
    """Names, versions and settings of the device."""
    found: dict[str, Any] = {
        "device": device_name(bench),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if bench.cuda:
        properties = torch.cuda.get_device_properties(bench.device)
        found |= {
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": bytes_text(properties.total_memory),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": asked("driver_version"),
            "bf16 by the data sheet": sheet(properties.name),
        }
        found |= clocks()

    found |= {name: version(name) for name in PACKAGES}
    return {
        "facts": found | {"commit": commit()},
        "data_sheet_flops": peak_flops(str(found["device"])),
    }


def sheet(name: str) -> str:
    """Data sheet rate of a device, as text."""
    peak = peak_flops(name)
    return "not known" if peak is None else f"{peak / 1e12:.0f} TFLOP/s"


def device_name(bench: Bench) -> str:
    """Name of the device."""
    return (
        torch.cuda.get_device_name(bench.device)
        if bench.cuda
        else f"CPU, {torch.get_num_threads()} threads"
    )


def version(package: str) -> str:
    """Version of a package, or why there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def asked(fields: str) -> str:
    """Query nvidia-smi, read-only; settings are never changed."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() or "no answer"


def clocks() -> dict[str, str]:
    """Clocks and power limit of the device."""
    return {CLOCKS.replace(",", ", "): asked(CLOCKS)}


def commit() -> str:
    """Commit of this checkout; "unknown" without git."""
    if shutil.which("git") is None:
        return "unknown"
    here = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(
        command, cwd=here, capture_output=True, text=True, timeout=20, check=False
    )
    return done.stdout.strip() or "unknown"


def product(
    bench: Bench, timer: Timer, work: Sizes, rows: int, inner: int, columns: int
) -> Mapping[str, Any]:
    """x W^T in the form of a linear layer, bf16."""
    x = torch.randn(rows, inner, device=bench.device, dtype=torch.bfloat16)
    weight = torch.randn(columns, inner, device=bench.device, dtype=torch.bfloat16)
    out = torch.empty(rows, columns, device=bench.device, dtype=torch.bfloat16)

    def several() -> None:
        for _ in range(REPEATS):
            torch.mm(x, weight.t(), out=out)

    took = timer.alone(several, work.rounds)
    flops = 2 * rows * inner * columns * REPEATS
    return {
        "flops_per_second": flops / took.median,
        "seconds": took.median / REPEATS,
        "spread": took.spread,
    }


def copy(bench: Bench, timer: Timer, work: Sizes) -> Mapping[str, Any]:
    """Bytes read and written per second."""
    source = torch.ones(work.copy_bytes, dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    took = timer.alone(lambda: target.copy_(source), work.rounds)
    return {"bytes_per_second": 2 * work.copy_bytes / took.median, "spread": took.spread}
