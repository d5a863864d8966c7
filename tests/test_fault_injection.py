"""Fault injection: parsing, which visit fires, what an action does, and that every point exists."""

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2train import fault_injection
from k2train.errors import RunError
from k2train.fault_injection import POINTS, VALUES, Fault, parse

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    fault_injection.arm("", 0)


def test_parse() -> None:
    """Catches a condition that is dropped, and faults that run into each other."""
    found = parse(
        " save.hashed@rank=1@nth=2:kill ; gradient@step=4:nan=head.weight;step.read:error=ENOSPC;"
    )
    assert found == [
        Fault("save.hashed", "kill", rank=1, nth=2),
        Fault("gradient", "nan", "head.weight", step=4),
        Fault("step.read", "error", "ENOSPC"),
    ]
    assert parse("") == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("save.hash:kill", "save.hash:kill"),
        ("save.hashed", "'save.hashed'"),
        ("save.hashed:explode", "explode"),
        ("save.hashed@rank=x:kill", "rank=x"),
        ("save.hashed@node=1:kill", "node=1"),
        ("save.hashed@step:kill", "'step'"),
        ("gradient@step=3:flip", "nan, inf, huge"),
        ("moment@step=3:nan", "those of moment are flip"),
    ],
)
def test_parse_refuses(text: str, named: str) -> None:
    """Catches a mistyped fault that arms nothing: the experiment would then prove nothing."""
    with pytest.raises(RunError, match=re.escape(named)) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_faults_need_a_permission() -> None:
    """Catches a variable that was left behind and strikes a run that knows nothing of it."""
    text = " gradient@step=3:nan;end:sleep=1"
    for allow in ((), ("lr.peak", "space")):
        with pytest.raises(RunError, match=r"K2TRAIN_FAULTS is set \('gradient@step=3:") as caught:
            fault_injection.require_permission(text, allow)
        assert "run.allow=[faults]" in str(caught.value) and "\n" not in str(caught.value)

    fault_injection.require_permission(text, ("faults",))
    for nothing in ("", " ; "):
        fault_injection.require_permission(nothing, ())

    fault_injection.arm(text, 0)
    assert fault_injection.armed_faults() == ["gradient@step=3:nan", "end:sleep=1"]


def test_a_fault_strikes_once_at_its_visit() -> None:
    """Catches a fault that strikes at each visit, on another rank, or at another step."""
    fault_injection.arm("step.read@rank=1@step=3@nth=2:error=EIO", 1)
    fault_injection.set_step(2)
    fault_injection.point("step.read")
    fault_injection.set_step(3)
    fault_injection.point("step.read")
    fault_injection.point("step.done")
    with pytest.raises(OSError, match=r"step\.read") as caught:
        fault_injection.point("step.read")
    assert caught.value.errno == errno.EIO
    fault_injection.point("step.read")

    fault_injection.arm("step.read@rank=1:error=EIO", 0)
    fault_injection.point("step.read")


def test_a_value_fault_is_found_once() -> None:
    fault_injection.arm("gradient@rank=0@step=4:nan=norm.weight", 0)
    fault_injection.set_step(3)
    assert fault_injection.find("gradient") is None
    fault_injection.set_step(4)
    assert fault_injection.find("loss") is None
    found = fault_injection.find("gradient")
    assert found is not None and (found.action, found.argument) == ("nan", "norm.weight")
    assert fault_injection.find("gradient") is None


def test_two_faults_of_one_place() -> None:
    """Catches a first fault that, once struck, hides the second."""
    fault_injection.arm("step.read@step=1:error=EIO;step.read@step=2:error=ENOSPC", 0)
    codes = []
    for step in (1, 2):
        fault_injection.set_step(step)
        with pytest.raises(OSError) as caught:
            fault_injection.point("step.read")
        codes.append(caught.value.errno)
    assert codes == [errno.EIO, errno.ENOSPC]


@pytest.mark.parametrize(
    ("action", "code"),
    [
        ("kill", -signal.SIGKILL),
        ("term", -signal.SIGTERM),
        ("abort", -signal.SIGABRT),
        ("exit=7", 7),
        ("sleep=0.01", 0),
    ],
)
def test_what_a_strike_does(action: str, code: int) -> None:
    """Catches an action that is accepted and does nothing."""
    program = (
        f"from k2train import fault_injection; fault_injection.arm('end:{action}', 0); "
        "fault_injection.point('end')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == code


def test_every_point_is_a_place_in_the_code() -> None:
    """Catches a name in the table that nothing calls any more, and a place that the table does not
    know.
    """
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "k2train").rglob("*.py")
        if path.name != "fault_injection.py"
    )
    called = set(
        re.findall(r"fault_injection\.(?:point|find)(?:\(|,)\s*f?[\"']([\w.{}]+)[\"']", source)
    )
    plain, made = (
        {name for name in called if "{" not in name},
        [name for name in called if "{" in name],
    )
    assert plain - {*POINTS, *VALUES} == set()

    def is_called(name: str) -> bool:
        looped = f'"{name}"' in source
        return (
            name in plain or looped or any(name.startswith(text.partition("{")[0]) for text in made)
        )

    assert [name for name in (*POINTS, *VALUES) if not is_called(name)] == []


def test_off_it_costs_next_to_nothing() -> None:
    """Catches a point that searches a list, or reads the environment, in a run in which nothing is
    armed.
    """
    program = (
        "import timeit; from k2train import fault_injection; fault_injection.arm('', 0); "
        "print(min(timeit.repeat(lambda: fault_injection.point('step.read'), number=10000, "
        "repeat=5)) / 10000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

    assert float(done.stdout) < 5e-6
