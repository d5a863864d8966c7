"""Section `measured`: written and read again, and one line for what is missing."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from k2train.calibrate.cluster_text import cluster_text
from k2train.errors import ConfigError
from k2train.plan.cost import ModelShape
from k2train.plan.measured import Line
from k2train.plan.step_time import step_time
from k2train.plan.workload import Workload
from k2train.planner.cluster_file import load_cluster
from k2train.planner.measured_section import KERNELS
from tests.support.measured import measured_cluster

WORK = Workload(ModelShape(2, 64, 96, 2, 2, 256), 64, 2, 8, 2, 2, data=1, precision="fp32")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Catches a unit that differs between writing and reading, and a field that is lost."""
    path = tmp_path / "machine.yaml"
    for cores in (2, None):
        written = measured_cluster(cores)
        text = cluster_text(written)
        path.write_text(text, encoding="utf-8")
        read = load_cluster(str(path))
        assert read.measured is not None and written.measured is not None
        assert [one.threads for one in read.measured.speeds] == [1, 1]
        # Whatever differs: the written numbers have a few digits.
        assert cluster_text(read) == text
        assert read.device.memory_bytes == pytest.approx(written.device.memory_bytes, rel=1e-3)
        assert read.links[0].latency_seconds == pytest.approx(5e-5)
        assert step_time(WORK, read).seconds == pytest.approx(step_time(WORK, written).seconds)


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    """Catches a kernel that is missing when a layer is first timed, and an unknown key."""
    text, path = cluster_text(measured_cluster()), tmp_path / "machine.yaml"

    def refused(changed: str) -> str:
        path.write_text(changed, encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_cluster(str(path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    no_loss = "\n".join(line for line in text.splitlines() if " loss:" not in line)
    assert "1 ranks, fp32: loss missing" in refused(no_loss)
    assert "must grow" in refused(text.replace("- ranks: 2", "- ranks: 1"))
    assert "unknown key; nearest is spread" in refused(
        text.replace("  spread:", "  spreads: 1\n  spread:")
    )
    assert "all-redce: no such kind; there are all-reduce" in refused(
        text.replace("    all-reduce:", "    all-redce:")
    )
    earlier = text.replace("layer_host_", "layer_")
    assert refused(earlier).endswith(
        "measure the machine again: tools/calibrate.py --out FILE.yaml"
    )
    assert "measured.spread: must be at most 10" in refused(
        text.replace("spread: 0.050", "spread: 1e9")
    )
    free = re.sub(r"swiglu forward: {[^}]*}", "swiglu forward: {start_us: 0}", text)
    assert "1 ranks, fp32: swiglu forward takes no time" in refused(free)
    no_link = text.replace("  measured: {devices: 0", "  measured: {devices: 2")
    assert "a link between nodes is missing" in refused(no_link)


def test_rates_of_a_fast_device_keep_their_digits(tmp_path: Path) -> None:
    """Catches rates cut to thousandths of a picosecond, which a GPU's are: 2,211 TFLOP/s."""
    written = measured_cluster(None)
    assert written.measured is not None
    line = Line(2.3456e-6, 1 / 2.211e15, 1 / 7.654e12)
    kernels = {"fp32": dict.fromkeys(KERNELS, line)}
    speeds = tuple(replace(one, kernels=kernels) for one in written.measured.speeds)
    measured = replace(written.measured, speeds=speeds, processor='an "odd" \\ name')
    path = tmp_path / "machine.yaml"
    path.write_text(cluster_text(replace(written, measured=measured)), encoding="utf-8")
    read = load_cluster(str(path)).measured
    assert read is not None and read.processor == measured.processor
    found = read.speeds[0].kernels["fp32"]["loss"]
    assert found.seconds_per_flop == pytest.approx(line.seconds_per_flop, rel=1e-4)
    assert found.seconds_per_byte == pytest.approx(line.seconds_per_byte, rel=1e-4)
    assert found.start_seconds == pytest.approx(line.start_seconds, rel=1e-4)


def test_a_slow_link_and_a_weak_device_are_read_again(tmp_path: Path) -> None:
    """Catches a file that its own reader refuses, because a small number was written as zero."""
    cluster = measured_cluster()
    link = replace(cluster.links[0], bytes_per_second=3e5)
    slow = replace(cluster, links=(link,), device=replace(cluster.device, watts=0.02))
    path = tmp_path / "machine.yaml"
    path.write_text(cluster_text(slow), encoding="utf-8")
    read = load_cluster(str(path))
    assert (read.device.watts, read.links[0].bytes_per_second) == pytest.approx((0.02, 3e5))
