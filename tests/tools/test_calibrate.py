"""`tools/calibrate.py` on real, tiny processes: the file, the table, one line for an error."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from k2train.calibrate import processes
from k2train.planner.cluster_file import load_cluster
from tests.support import forkserver
from tests.support.command_line import load_tool
from tests.support.tiny_corpus import environment

DEMO = str(Path(__file__).resolve().parents[2] / "configs" / "demo" / "stage1.yaml")
TINY = [
    *("model.num_layers=2", "model.hidden_size=16", "model.ffn_hidden_size=24"),
    *("model.num_heads=2", "model.num_kv_heads=2", "model.vocab_size=64"),
    *("data.sequence_length=16", "batch.global_sequences=4", "batch.micro_sequences=1"),
]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("calibrate")


START = processes.start


def warm(
    arguments: Sequence[str], variables: Mapping[str, str], log: Path, piped: bool = False
) -> Any:
    """A process as `processes.start` gives it, from the fork server; one with pipes is started."""
    if piped:
        return START(arguments, variables, log, piped)
    started = forkserver.start(list(arguments), environment(**variables))
    log.write_text("", encoding="utf-8")
    return started


def test_a_machine_is_measured_and_checked(
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a worker that fails, a kind of collective left out, a file that a plan cannot read,
    steps that are none of the trainer's, and a layout without a row."""
    monkeypatch.setattr(processes, "start", warm)
    # One thread: several wait for each other on a busy machine.
    monkeypatch.setattr(tool, "cores_of_machine", lambda: 1)
    out = tmp_path / "machine.yaml"
    measure = ["--out", str(out), "--quick", "--tiny", "--ranks", "2", "--precision", "fp32"]
    layouts = ["--layouts", "data=1", "micro=2", "--steps", "3"]
    kept, drawn = tmp_path / "check.json", tmp_path / "check.svg"
    files = ["--json", str(kept), "--draw", str(drawn)]
    assert tool.main([*measure, "--check", DEMO, *TINY, *layouts, "--device", "cpu", *files]) == 0
    printed = capsys.readouterr()

    cluster = load_cluster(str(out))
    measured = cluster.measured
    assert measured is not None
    kinds = {"all-reduce", "all-gather", "reduce-scatter", "weight-gather", "send"}
    assert set(measured.collectives) == kinds
    assert [one.ranks for one in measured.speeds] == [1]
    assert measured.speeds[0].threads == measured.cores == 1
    assert cluster.device.peak("fp32") > 1e8 and cluster.links[0].bytes_per_second > 1e6

    # What was measured is what a plan takes.
    plan = load_tool("plan")
    asked = ["--cluster", str(out), "--gpus", "2", "--why-not", "tensor=2,micro=1"]
    assert plan.main([DEMO, *TINY, *asked]) == 0
    assert "tensor traffic" in capsys.readouterr().out

    rows = [line.split("|") for line in printed.out.splitlines() if line.startswith("| ")]
    shown = [row for row in rows if "=" in row[1]]
    assert [row[1].strip() for row in shown] == ["data=1", "micro=2"]
    for row in shown:
        seconds, predicted = (float(row[i].split()[0]) for i in (4, 6))
        assert seconds > 0 and predicted > 0 and float(row[3]) > 0
        error = float(row[7].strip(" %")) / 100
        # The shown seconds have three digits behind the point.
        assert error == pytest.approx(predicted / seconds - 1, abs=0.002 / seconds)
    assert re.search(
        r"of 2 within 15%; mean error .*; rank correlation (-|-?\d\.\d\d)", printed.out
    )
    assert "in " in printed.out and "repeated times differ by" in printed.out

    # What was kept is shown again without a process: the same table, the same picture.
    monkeypatch.setattr(processes, "start", None)
    again = tmp_path / "again.svg"
    assert tool.main(["--saved", str(kept), "--draw", str(again)]) == 0
    assert capsys.readouterr().out in printed.out
    assert again.read_text(encoding="utf-8") == drawn.read_text(encoding="utf-8")
    assert "micro=2: 1 rank" in again.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out FILE.yaml to measure, or --cluster FILE.yaml"),
        (["--out", "/proc/none/x.yaml"], "there is no folder /proc/none"),
        (["--out", __file__ + "/x.yaml"], "there is no folder"),
        (["--out", str(Path(__file__).parent)], "that is a folder"),
        (["--out", "x.yaml", "--device", "cpu", "--ranks", "100000"], "--ranks (100000) must be"),
        (["--out", "x.yaml", "--ranks", "0"], "a whole number of at least 1"),
        (["--out", "x.yaml", "--ranks", "two"], "--ranks: must be a whole number of at least 1"),
        (["--out", "x.yaml", "--watts", "W"], "--watts: must be a number above 0, not W"),
        (["--out", "x.yaml", "--steps", "3"], "--steps needs --check"),
        (["--out", "x.yaml", "--layouts", "data=2"], "--layouts needs --check"),
        (["--out", "/proc/x.yaml"], "--out /proc/x.yaml: cannot be written"),
        (
            ["--out", "x.yaml", "--links", "h10"],
            "--links h10: no such cluster; write h100 or h100-",
        ),
        (["--cluster", "h100", "--check", DEMO], "cluster h100 was not measured"),
        (["--cluster", "h100"], "--cluster needs --check"),
        (["--out", "x.yaml", "--json", "x.json"], "--json needs --check"),
        (["--out", "x.yaml", "--draw", "x.svg"], "--draw needs --check CONFIG.yaml, or --saved"),
        (["--saved", "x.json", "--cluster", "h100"], "--saved measures nothing: leave out"),
        (["--saved", "x.json"], "x.json: No such file"),
        (["--saved", DEMO], "no check that calibrate has written"),
        (["--saved", "x.json", "--draw", "/proc/none/x.svg"], "--draw /proc/none/x.svg: there is"),
        (["--cluster", "h100", "--check", DEMO, "--json", "/proc/x"], "--json /proc/x: cannot be"),
        (["--out", "x.yaml", "--cluster", "h100"], "one of the two"),
        (["model.num_layers=2", "--out", "x.yaml"], "need --check"),
    ],
)
def test_a_mistake_costs_one_line(
    tool: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a mistake that is found after minutes, or that ends in a traceback."""
    try:
        code = tool.main(arguments)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1], told
