"""A measured cluster as a file: the same numbers, and where each of them is from."""

from pathlib import Path

import pytest

from k2train.calibrate.cluster_text import cluster_text
from k2train.config.yaml_source import read_source
from k2train.plan.hardware import GIB, Cluster, Device, Link
from k2train.plan.measured import Line, Measured, RankSpeed
from k2train.planner.cluster_file import load_cluster, numbers_of, source_of
from k2train.planner.measured_section import KERNELS

SPEED = RankSpeed(
    1, 1, {"fp32": dict.fromkeys(KERNELS, Line(1e-6, 1e-12, 1e-12))}, 1.0, *[1e-6] * 5, 1e-12
)
MEASURED = Measured("2030-01-02", "a processor", "2.9", 2, 0.01, 0.02, (SPEED,), {})
DEVICE = Device("X", "cpu", {"bf16": 1e11, "fp32": 2e11}, 4 * GIB, 1e10, 30.0)
CLUSTER = Cluster("mine", DEVICE, (Link("ranks", 0, 1e9, 1e-5),), MEASURED)


def test_every_number_says_that_it_was_measured(tmp_path: Path) -> None:
    """Catches a measured file whose numbers look like a data sheet's, and given watts as measured.

    The reader refuses a source that names no number.
    """
    path = tmp_path / "mine.yaml"
    path.write_text(cluster_text(CLUSTER), encoding="utf-8")
    read = load_cluster(str(path))
    assert read.device.memory_bytes == pytest.approx(DEVICE.memory_bytes)
    assert read.device.peak_flops == pytest.approx(DEVICE.peak_flops)

    tree = read_source(str(path)).tree
    found = {key: source_of(key, tree["sources"]) for key in numbers_of(tree)}
    assert found.pop("device.watts") == "given, not measured"
    assert set(found.values()) == {"measured on 2030-01-02"} and len(found) == 6
