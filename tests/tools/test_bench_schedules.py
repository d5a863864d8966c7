"""`tools/bench_schedules.py` on real, tiny processes: table, pictures, one line for an error."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from k2train.plan.schedule import SCHEDULES
from tests.support.command_line import load_tool

TINY = [
    "model.num_layers=4",
    "model.hidden_size=16",
    "model.ffn_hidden_size=24",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.vocab_size=64",
    "data.sequence_length=8",
    "batch.global_sequences=4",
    "batch.micro_sequences=1",
]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("bench_schedules")


def test_every_schedule_runs_and_is_drawn(
    tool: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a schedule left out, spans of the wrong rank or action, a loss that a schedule
    changes, a lost picture.
    """
    assert (
        tool.main(["--steps", "3", "--warmup", "1", "--svg", str(tmp_path / "pictures"), *TINY])
        == 0
    )
    printed = capfd.readouterr().out
    rows = {
        row.split("|")[1].strip(): row.split("|")
        for row in printed.splitlines()
        if re.match(r"\| [1giz]", row)
    }
    assert list(rows) == list(SCHEDULES)

    for kind, row in rows.items():
        assert all(0 <= float(bubble.strip(" %")) < 100 for bubble in row[3:6]), kind
        assert float(row[6].replace(",", "")) > 0
        for name in ("planned", "measured"):
            picture = (tmp_path / "pictures" / f"{kind}_{name}.svg").read_text()
            actions = (
                4
                * (3 if kind.startswith("zb") else 2)
                * (4 if kind in ("interleaved", "zb-v") else 2)
            )
            assert len(re.findall("<title>", picture)) == actions, (kind, name)

    assert rows["zb-v"][8].split() == ["4", "4"] and rows["zb-h1"][9].split() == ["2", "1"]
    assert re.search(r"^Loss of the last step: \d+\.\d+$", printed, re.MULTILINE), (
        "schedules disagree on the loss"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "1"], "--processes (1) must be parallel.tensor (1) times at least 2"),
        (["--processes", "3", "parallel.tensor=2"], "--processes (3) must be"),
        (
            ["model.num_layers=3"],
            "model.num_layers (3) must be at least 4 for schedule interleaved on 2",
        ),
        (["batch.global_sequences=5"], "interleaved"),
        (["model.num_layer=3"], "num_layers"),
        (["--svg", __file__], "cannot be made"),
    ],
)
def test_a_mistake_costs_one_line(
    tool: ModuleType, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches processes started for a run that cannot be, and a traceback."""
    assert tool.main([*TINY, *arguments]) == 2
    captured = capfd.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
