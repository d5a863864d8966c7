"""Worker of a contender, the part that needs torch: process group, contender and commands."""

import importlib
import os
import re
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cpu.contenders import find
from benchmarks.cpu.contract import Built, UnavailableError
from benchmarks.cpu.measure import peak_step_bytes
from benchmarks.cpu.work import Work
from k2train.processes import peak_resident_bytes

LIBRARIES = {
    "mkl": r"(?:oneAPI )?Math Kernel Library Version ([\w.]+)",
    "onednn": r"(?:MKL-DNN|oneDNN) v([\w.]+)",
}
"""How `torch.__config__.show()` names them; oneDNN by its former name."""


def build(spec: Mapping[str, Any]) -> Built:
    """Build the contender of this rank with its process group; `spec` as `worker.main` takes it."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["cores"]])
    torch.set_num_threads(spec["threads"])
    module, options = spec["module"], spec["options"]
    if module is None:
        known = find(spec["name"])
        if known is None:
            raise UnavailableError(f"no contender named {spec['name']} at that commit")
        module, options = known.module, known.options

    contender = importlib.import_module(module)
    store = f"file://{spec['store']}"
    dist.init_process_group("gloo", init_method=store, rank=spec["rank"], world_size=spec["world"])
    built = contender.build(
        Work(**spec["work"]), spec["precision"], options, spec["rank"], spec["world"]
    )
    assert isinstance(built, Built), f"{module}.build gave {built!r}"
    return built


def runtime_facts() -> dict[str, Any]:
    """Instruction sets that torch's own kernels use, and versions of its product libraries.

    Versions are from torch's account of its build; null for a library that it was built without.
    """
    built_with = torch.__config__.show()
    versions = {name: re.search(pattern, built_with) for name, pattern in LIBRARIES.items()}
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        **{name: found and found[1] for name, found in versions.items()},
    }


def obey(built: Built, line: str) -> dict[str, Any]:
    """Execute one command line and return the facts to answer."""
    command, _, count = line.strip().partition(" ")
    if command == "measure":
        return {"peak_step_bytes": peak_step_bytes(built.step)}
    assert command == "run", f"unknown command {line!r}"
    began = time.monotonic()
    losses = [built.step() for _ in range(int(count))]
    ended = time.monotonic()

    return {
        "began": began,
        "ended": ended,
        "losses": losses,
        "peak_resident_bytes": peak_resident_bytes(),
    }
