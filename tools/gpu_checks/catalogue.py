"""Parts of the GPU check in order of worth, with what each proves and how long it takes.

- Correctness comes before speed: where the time ends early, what is left out are figures.
- The timing parts are those of `tools/bench.py gpu`, not copies.
- Standard library only.
"""

from dataclasses import dataclass

from benchmarks.gpu.runner import Part


@dataclass(frozen=True)
class CheckPart(Part):
    """A part and the claim that it proves, in words for the page."""

    proves: str = ""


def _check(name: str, seconds: float, least_seconds: float, proves: str) -> CheckPart:
    return CheckPart(name, f"gpu_checks.part_{name}", seconds, least_seconds, proves)


def _bench(name: str, seconds: float, least_seconds: float, proves: str) -> CheckPart:
    return CheckPart(name, f"benchmarks.gpu.part_{name}", seconds, least_seconds, proves)


CATALOGUE: dict[str, CheckPart] = {
    part.name: part
    for part in (
        _check("environment", 40, 10, "the device computes, and what it is"),
        _check(
            "parity",
            60,
            25,
            "losses and gradients are those of a CPU and of independent code, fp32 and bf16",
        ),
        _check(
            "determinism",
            75,
            30,
            "the same step gives the same bits, three times and in another process",
        ),
        _check("kernels", 50, 20, "every kernel equals the reference, forward and backward"),
        _check("recompute", 25, 15, "recomputing activations changes no bit"),
        _check("trainer", 75, 45, "a run that was stopped goes on bit for bit"),
        _check("checkpoint", 60, 40, "a checkpoint goes from CUDA to a CPU and back, and verifies"),
        _check("nccl", 20, 12, "NCCL reduces, gathers, scatters and sends every type in use"),
        _check("ranks", 50, 30, "four ranks compute on the device what one does"),
        _bench("device", 30, 18, "the rate of matrix products and copies that the rest is held to"),
        _bench("layers", 120, 40, "K2's layers near that rate; peak memory as planned"),
        _check("models", 180, 60, "whole models: MFU, and level with a fair peer"),
        _check("price", 30, 20, "what determinism costs"),
        _bench("host", 45, 25, "the host keeps the device busy; the kernels that take longest"),
    )
}
"""Name -> part."""
