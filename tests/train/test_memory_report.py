"""Memory report: the lines of the plan and of a starting run show the numbers of the plan."""

from dataclasses import replace
from pathlib import Path

import pytest

from k2train.config.load import load_config
from k2train.plan.activations import RECOMPUTE, layer_bytes
from k2train.plan.layout import Layout
from k2train.plan.memory import rank_memory
from k2train.text import bytes_text
from k2train.train.memory_report import activations_text, memory_line, memory_table
from k2train.train.setup import Setup

K2 = Path(__file__).resolve().parents[2] / "configs/k2_65b/stage1.yaml"


def planned(*overrides: str) -> Setup:
    return Setup.of(load_config(str(K2), overrides), 480)


def test_every_policy_and_every_rank_is_told() -> None:
    """Catches a table of another layout's numbers, a policy left out, and sizes that are not the
    plan's.
    """
    setup = planned()
    lines = memory_table(setup)
    assert lines[1].endswith("257.26 MiB (recompute none; selective 182.26 MiB, full 16.00 MiB)")
    assert lines[-5].split() == ["pp", *RECOMPUTE]
    for pp in range(4):
        found = [
            rank_memory(
                replace(setup.work(), recompute=policy),
                Layout(8, 4, 15),
                setup.programs[pp],
                pp,
                True,
                setup.config.parallel.bucket_bytes,
            )
            for policy in RECOMPUTE
        ]
        cells = [f"{bytes_text(m.activations_bytes)} / {bytes_text(m.total_bytes)}" for m in found]
        assert lines[pp - 4].split() == f"{pp} {' '.join(cells)}".split()
        assert lines[pp + 3].split()[-2:] == bytes_text(found[0].total_bytes).split()
    assert layer_bytes(setup.work(), "none") / 2**20 == pytest.approx(257.26, abs=0.005)


def test_a_start_tells_this_rank() -> None:
    """Catches a line that names a policy not in use, or the numbers of another rank."""
    setup = planned("kernels.recompute=full", "kernels.recompute_layers=5")
    line = memory_line(setup, setup.work(), 1)
    found = setup.memory(setup.work(), 1)
    assert "16.00 MiB (recompute full in 5 layers of a stage; none 257.26 MiB" in line
    assert (
        f"{bytes_text(found.activations_bytes)} activations, {bytes_text(found.total_bytes)} in "
        "total" in line
    )
    assert "reference" not in line
    setup = planned("kernels.loss=reference")
    assert memory_line(setup, setup.work(), 1).endswith(
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
    work = planned(*overrides).work(device)
    assert (work.regather, work.attention) == (regather, attention)
    assert planned(*overrides).work(device, "plain").attention == "plain"


def test_the_policies_in_words() -> None:
    """Catches a unit that is a thousand times off."""
    assert activations_text(planned().work()).startswith("257.26 MiB (recompute none; selective")


def test_memory_that_ranks_share_is_told_where_they_share_it() -> None:
    """Catches a plan of a CPU run without the memory of its transfers, and one of an accelerator,
    of other ranks, or of a run by gloo with it.
    """
    demo = str(K2.parents[1] / "demo/stage1.yaml")

    def setup_of(*overrides: str) -> Setup:
        layout = ("parallel.tensor=2", "parallel.pipeline=2")
        return Setup.of(load_config(demo, (*layout, *overrides)), 4)

    setup = setup_of()
    assert memory_line(setup, setup.work("cpu"), 1).endswith(
        " in total, and up to 20.00 MiB shared with other ranks"
    )
    assert "shared" not in memory_line(setup, setup.work(), 1)
    told = "up to 20.00 MiB of a rank, 40.00 MiB in all (parallel.shared_memory)"
    assert memory_table(setup)[-1].endswith(told)
    off, alone = setup_of("parallel.shared_memory=off"), Setup.of(load_config(demo), 1)
    for other in (off, alone, planned()):
        assert "shared" not in memory_line(other, other.work("cpu"), 0)
        assert not any("share" in line for line in memory_table(other))
    overlapped = setup_of("parallel.overlap=on")
    assert overlapped.shared_bytes("cpu") == 16 * 2**20
