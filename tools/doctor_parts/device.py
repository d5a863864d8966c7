"""The part of tools/doctor.py that needs torch: devices, their kernels, and a step of a tiny model.

    python tools/doctor_parts/device.py

- Prints a finding a line as JSON, and then ends: a torch that crashes takes nothing else with it.
"""

import importlib.metadata
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from command_line import Parser, command

from doctor_parts.finding import Finding
from k2train.errors import EXIT_DONE, UserError
from k2train.launch.environment import cores_of_process
from k2train.model.kernels.optional import INSTALL
from k2train.model.kernels.select import DeviceTraits, choose_kernels
from k2train.record.system_info import processor_name
from k2train.text import bytes_text
from k2train.train.single_process import SingleProcess

VOCABULARY = 256
TINY = {
    "run": {"name": "doctor", "seed": 1},
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_heads": 4,
        "num_kv_heads": 2,
        "vocab_size": VOCABULARY,
    },
    "data": {"manifest": "none", "sequence_length": 32},
    "batch": {"global_sequences": 4, "micro_sequences": 4},
    "lr": {"kind": "constant", "peak": 1e-3},
}
HEAD_DIM, LENGTH = 128, 2048
"""Of a usual model, for which the kernels are named."""


def device_findings() -> Iterator[Finding]:
    """Yield the devices with their memory, or the CPU."""
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else "; this torch has no CUDA"
        cores = cores_of_process()
        yield Finding("ok", "device", f"CPU, {processor_name()}, {cores} cores{built}")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        facts = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if facts.major >= 8 else "no bf16: set precision=fp32"
        text = f"{facts.name}, {bytes_text(free)} of {bytes_text(total)} free, {bf16}"
        yield Finding("ok" if facts.major >= 8 else "note", f"device {index}", text)


def kernel_findings(device: torch.device) -> Iterator[Finding]:
    """Yield the kernels that `auto` takes, and the optional packages that are there."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    traits = DeviceTraits(device, dtype, LENGTH, HEAD_DIM)
    names = choose_kernels(traits=traits).names()
    yield Finding("ok", "kernels", ", ".join(f"{key} {name}" for key, name in names.items()))
    if device.type != "cuda":
        return
    missing = [name for name in INSTALL if not _installed(INSTALL[name][0])]
    there = ", ".join(name for name in INSTALL if name not in missing) or "none"
    text = (
        f"{there}; not here: {', '.join(missing)} (scripts/install_gpu.sh of a clone)"
        if missing
        else there
    )
    yield Finding("note" if missing else "ok", "  optional", text)


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def step_finding(device: torch.device) -> Finding:
    """Return whether a step of a tiny model computes: a loss near ln(vocabulary), and gradients."""
    tokens = torch.randint(0, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(1))
    try:
        with SingleProcess(TINY, device=device) as model:
            found = model.gradients(tokens)
    except UserError as problem:
        return Finding("FAIL", "a step", str(problem))
    wanted = math.log(VOCABULARY)
    right = abs(found.loss - wanted) < 0.2 and math.isfinite(found.grad_norm) and found.grad_norm
    text = f"loss {found.loss:.3f} (ln {VOCABULARY} is {wanted:.3f}), on {device.type}"
    return Finding("ok" if right else "FAIL", "a step", text)


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    Parser(prog="device", description="Findings about devices, as JSON.").parse_args(arguments)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    findings = [Finding("ok", "torch", str(torch.__version__)), *device_findings()]
    findings += [*kernel_findings(device), step_finding(device)]
    for finding in findings:
        print(json.dumps(finding))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
