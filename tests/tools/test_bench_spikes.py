"""The public rules as their projects describe them, and the tables of the bench.

Would catch a rule of others that was made weaker than it is, and a table that fails.
"""

import json
import math
import random
import sys
from collections.abc import Callable

import pytest

from spike_search import generators
from spike_search.public_rules import RULES, Window
from tests.support.command_line import load_tool


def flags(name: str, series: list[tuple[float, float]]) -> list[int]:
    rule = RULES[name]()
    return [step for step, row in enumerate(series) if rule.flags(*row)]


def quiet(steps: int) -> list[tuple[float, float]]:
    noise = random.Random(5)
    return [
        (3.0 + noise.uniform(-0.02, 0.02), 1.0 + noise.uniform(-0.1, 0.1)) for _ in range(steps)
    ]


def jump(
    steps: int, at: int, loss: float, norm: float = 1.0, length: int = 1
) -> list[tuple[float, float]]:
    found = quiet(steps)
    for step in range(at, at + length):
        found[step] = (loss, norm)
    return found


@pytest.mark.parametrize(
    ("name", "series", "expected"),
    (
        ("OLMo-core skip step", jump(400, 200, math.nan), [*range(200, 329)]),
        ("OLMo-core skip step", jump(400, 63, 9.0), []),
        ("OLMo-core skip step", jump(400, 64, 9.0), [64]),
        ("OLMo 2 score", jump(1200, 999, 9.0), []),
        ("OLMo 2 score", jump(1200, 1000, 9.0), [1000]),
        ("llm.c", jump(200, 100, 9.0), [100]),
        ("KillLossSpike", jump(300, 200, 6.5, length=4), []),
        ("KillLossSpike", jump(300, 200, 6.5, length=6), [204, 205]),
        ("ZClip", jump(300, 200, 3.0, norm=9.0), [200]),
        ("Megatron 10x max", jump(300, 200, 29.0), []),
        ("Megatron 10x max", jump(300, 200, 31.0), [200]),
    ),
)
def test_a_rule_flags_what_its_description_says(
    name: str, series: list[tuple[float, float]], expected: list[int]
) -> None:
    assert [step for step in flags(name, series) if name != "ZClip" or step == 200] == expected


def test_the_window_is_that_of_plain_sums() -> None:
    window, values = Window(16), [random.Random(n).gauss(0, 1) for n in range(50)]
    for number, value in enumerate(values, 1):
        window.add(value)
        last = values[max(0, number - 16) : number]
        mean = math.fsum(last) / len(last)
        variance = math.fsum((x - mean) ** 2 for x in last) / len(last)
        assert window.mean == pytest.approx(mean)
        assert number == 1 or window.sd == pytest.approx(math.sqrt(variance))


@pytest.mark.parametrize("draw", (generators.gaussian, generators.heavy))
def test_both_noises_have_the_same_quartiles(draw: Callable[[random.Random], float]) -> None:
    source = random.Random(2)
    values = sorted(draw(source) for _ in range(20_000))
    assert values[15_000] == pytest.approx(0.6745, abs=0.03)


def test_the_bench_prints_its_tables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = load_tool("bench_spikes")
    monkeypatch.setattr(tool, "FIRST", tool.ONSET - 1000)
    monkeypatch.setattr(tool, "LENGTH", 2000)
    assert tool.main(["--seeds", "1", "--clean", "2000"]) == 0
    out = capsys.readouterr().out
    lines = [line for line in reversed(out.splitlines()) if line.startswith("| ")]
    # The first table has the verdicts; the last one has the same names.
    rows = {line.split(" | ")[0]: line for line in lines}
    assert "**malignant** +99 (1 of 1)" in rows["| plateau of 0.3 nat"]
    assert "+0, 129" in out and "**benign**" in rows["| BLOOM's spike, benign"]


def test_trainings_are_told_channel_by_channel(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a channel under another's name, and a training that failed without a word."""
    tool = load_tool("bench_spikes")
    rows = [[3.0 + 0.02 * (step % 3), 1.0, 5.0 if step < 150 else 20.0] for step in range(1, 200)]
    run = {"name": "restart without moments", "onset": 150, "steps": rows}
    program = f"print({json.dumps(run)!r})"
    monkeypatch.setattr(tool, "command_of", lambda *given: [sys.executable, "-c", program])
    assert tool.main(["--train"]) == 0
    assert "| restart without moments | silent | silent | +0 | restart +0, benign +19 |" in (
        capsys.readouterr().out
    )
    monkeypatch.setattr(tool, "command_of", lambda *given: [sys.executable, "-c", "exit(3)"])
    assert tool.main(["--train"]) == 1 and "exit code 3" in capsys.readouterr().err
