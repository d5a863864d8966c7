"""A measured machine of round numbers, and its cluster."""

from k2train.plan.hardware import Cluster, Device, Link
from k2train.plan.measured import Line, Measured, RankSpeed
from k2train.planner.measured_section import COLLECTIVES, KERNELS

DEVICE = Device("CPU", "cpu", {"fp32": 1e11, "bf16": 1e11}, 8e9, 1e10, 100.0)


def speed(ranks: int, slower: float = 1.0) -> RankSpeed:
    """10 us a start, 10 ps a FLOP, 100 ps a byte."""
    line = Line(1e-5 * slower, 1e-11 * slower, 1e-10 * slower)
    kernels = {"fp32": dict.fromkeys(KERNELS, line)}
    return RankSpeed(ranks, 1, kernels, 0.8, 1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 1e-9)


def measured_machine(cores: int | None = 2, spread: float = 0.05) -> Measured:
    """Two ranks are 1.5 times as slow as one; 50 us and 1 GB/s between them."""
    link = Line(5e-5, 0.0, 1e-9)
    return Measured(
        when="2026-01-01 00:00 UTC",
        processor="a processor, 2 cores",
        torch="2.0",
        cores=cores,
        spread=spread,
        error=0.1,
        speeds=(speed(1), speed(2, 1.5)),
        collectives={kind: {2: link, 4: link} for kind in COLLECTIVES},
    )


def measured_cluster(cores: int | None = 2, spread: float = 0.05) -> Cluster:
    """The machine with one link."""
    links = (Link("measured", 0, 1e9, 5e-5),)
    return Cluster("measured-cpu", DEVICE, links, measured_machine(cores, spread))
