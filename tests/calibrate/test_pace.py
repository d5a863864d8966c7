"""The machine's pace: processes that time the calibration's kernels whenever they are asked."""

from dataclasses import replace
from pathlib import Path

import pytest

from k2train.calibrate import pace as pace_module
from k2train.calibrate.pace import SAMPLES, pace_of
from k2train.errors import UnavailableError
from tests.support.measured import measured_machine

ANSWERS = """
import sys
for number, _ in enumerate(sys.stdin, 1):
    print({seconds} * (100 if number == 1 or number % {period} == 2 else 1), flush=True)
"""
"""The first answer is that of a process that starts, and the first of each question wakes it."""


def answering(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let every process that follows the pace be this script."""
    start = pace_module.processes.start

    def instead(arguments: list[str], *rest: object, **given: bool) -> object:
        return start(["-c", script], *rest, **given)

    monkeypatch.setattr(pace_module.processes, "start", instead)


def test_pace_is_the_kernels_now_for_then(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a pace upside down, the round counted that wakes the processes, a question to one
    while another still starts, and the reference of another number of ranks."""
    answering(monkeypatch, ANSWERS.format(seconds=0.3, period=SAMPLES + 1))
    machine = measured_machine()
    first, second = machine.speeds
    speeds = (replace(first, reference_seconds=0.2), replace(second, reference_seconds=0.4))
    with pace_of(replace(machine, speeds=speeds), tmp_path, "cpu") as pace:
        for _ in range(2):
            assert pace.sample(1) == pytest.approx(1.5)
            # Four ranks take turns on two cores: the reference is that of two.
            assert pace.sample(2) == pace.sample(4) == pytest.approx(0.75)
        assert [len(one.started) for one in pace.followers.values()] == [1, 2]
        processes = [process for one in pace.followers.values() for process in one.started]
    assert all(process.returncode is not None for process in processes)


def test_without_a_reference_nothing_is_scaled(tmp_path: Path) -> None:
    """Catches an older cluster file that divides by 0, or starts processes for nothing."""
    with pace_of(measured_machine(), tmp_path, "cpu") as pace:
        assert pace.sample(2) == 1.0
        assert not pace.followers


def test_a_process_that_ends_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a check that waits for ever, or calls a broken process a fast machine."""
    answering(monkeypatch, "import sys; sys.exit('no such kernel')")
    machine = measured_machine()
    speeds = (replace(machine.speeds[0], reference_seconds=0.2),)
    with (
        pytest.raises(UnavailableError, match="follows the machine's pace ended: no such kernel"),
        pace_of(replace(machine, speeds=speeds), tmp_path, "cpu"),
    ):
        pass


def test_the_real_process_answers(tmp_path: Path) -> None:
    """Catches a worker that does not know the question: one round of tiny kernels, twice."""
    machine = measured_machine()
    speeds = (replace(machine.speeds[0], reference_seconds=1.0),)
    with pace_of(replace(machine, speeds=speeds), tmp_path, "cpu", tiny=True) as pace:
        assert 0 < pace.sample(1) < 100
