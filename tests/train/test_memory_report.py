"""Memory report: the lines of the plan and of a starting run show the numbers of the plan."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k2train.config.load import Config, load_config, num_microbatches
from k2train.plan.activations import RECOMPUTE, layer_bytes
from k2train.plan.layout import Layout
from k2train.plan.schedule import build_programs
from k2train.text import bytes_text
from k2train.train.memory_report import (
    activations_text,
    memory_line,
    memory_of,
    memory_table,
    spec_of,
)

K2 = Path(__file__).resolve().parents[2] / "configs/k2_65b/stage1.yaml"


def planned(*overrides: str) -> tuple[Config, Layout, Any]:
    config = load_config(str(K2), overrides)
    p = config.parallel
    return (
        config,
        Layout(8, 4, 15),
        build_programs(p.schedule, p.pipeline, num_microbatches(config, 480)),
    )


def test_every_policy_and_every_rank_is_told() -> None:
    """Catches a table of another layout's numbers, a policy left out, and sizes that are not the
    plan's.
    """
    config, layout, programs = planned()
    lines = memory_table(config, layout, programs)
    assert lines[1].endswith("257.26 MiB (recompute none; selective 182.26 MiB, full 16.00 MiB)")
    assert lines[-5].split() == ["pp", *RECOMPUTE]
    for pp in range(4):
        found = [
            memory_of(config, replace(spec_of(config), recompute=policy), layout, programs[pp], pp)
            for policy in RECOMPUTE
        ]
        cells = [f"{bytes_text(m.activations_bytes)} / {bytes_text(m.total_bytes)}" for m in found]
        assert lines[pp - 4].split() == f"{pp} {' '.join(cells)}".split()
        assert lines[pp + 3].split()[-2:] == bytes_text(found[0].total_bytes).split()
    assert layer_bytes(spec_of(config), "none") / 2**20 == pytest.approx(257.26, abs=0.005)


def test_a_start_tells_this_rank() -> None:
    """Catches a line that names a policy not in use, or the numbers of another rank."""
    config, layout, programs = planned("kernels.recompute=full", "kernels.recompute_layers=5")
    work = spec_of(config)
    line = memory_line(config, work, layout, programs[1], 1)
    found = memory_of(config, work, layout, programs[1], 1)
    assert "16.00 MiB (recompute full in 5 layers of a stage; none 257.26 MiB" in line
    assert (
        f"{bytes_text(found.activations_bytes)} activations, {bytes_text(found.total_bytes)} in "
        "total" in line
    )
    assert "reference" not in line
    config, *_ = planned("kernels.loss=reference")
    assert memory_line(config, work, layout, programs[1], 1).endswith(
        "more with the configured reference kernels"
    )


@pytest.mark.parametrize(
    ("overrides", "device", "regather", "attention"),
    [
        ([], "cuda", True, "flash"),
        ([], "cpu", False, "flash"),
        (["parallel.gathered=keep"], "cuda", False, "flash"),
        (["parallel.gathered=again", "kernels.attention=plain"], "cpu", True, "plain"),
    ],
)
def test_what_is_left_to_the_device(
    overrides: list[str], device: str, regather: bool, attention: str
) -> None:
    """Catches a plan for a choice that the engine does not make."""
    work = spec_of(planned(*overrides)[0], device)
    assert (work.regather, work.attention) == (regather, attention)
    assert spec_of(planned(*overrides)[0], device, "plain").attention == "plain"


def test_the_policies_in_words() -> None:
    """Catches a unit that is a thousand times off."""
    assert activations_text(spec_of(planned()[0])).startswith(
        "257.26 MiB (recompute none; selective"
    )
