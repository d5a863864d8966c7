"""`tools/plan.py`: the plan that a user sees before a run, and one line for an error."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.command_line import load_tool

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "plan.py"
DEMO = str(ROOT / "configs" / "demo" / "stage1.yaml")
SMALL = ["batch.global_sequences=16", "batch.micro_sequences=4"]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("plan")


def test_prints_grid_program_bubble_and_picture(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches numbers that are not the layout's: the grid, the micro-batches, the bubble 1/5, every
    rank's program.
    """
    overrides = [*SMALL, "parallel.tensor=2", "parallel.pipeline=2"]
    assert tool.main([DEMO, "--world", "4", "--width", "100", *overrides]) == 0
    printed = capsys.readouterr().out
    assert "world 4 = pipeline 2 x data 1 x tensor 2" in printed
    assert "rank 3    pp 1  dp 0  tp 1  stage 1  layers 4-7" in printed
    assert "16 sequences in 4 micro-batches of 4" in printed
    assert "bubble 20.00% of the step, 25.00%" in printed
    assert "by pipeline rank: 2 1" in printed
    assert "pp 0  0F0 0SF0>1 0F1 0SF1>1 0RB0<1 0B0" in printed
    assert "pp 1  1RF0<0" in printed
    assert printed.splitlines()[-2].startswith("rank 0 0-")


def test_overrides_may_stand_before_and_after_options(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an override swallowed by an option, and a default world other than tensor x
    pipeline.
    """
    assert tool.main([DEMO, "parallel.tensor=2", "--full", "parallel.pipeline=2"]) == 0
    assert "world 4 = pipeline 2 x data 1 x tensor 2" in capsys.readouterr().out


def test_large_worlds_and_long_programs_are_abbreviated(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches 480 lines of grid, and --full that leaves something out."""
    arguments = [
        str(ROOT / "configs" / "k2_65b" / "stage1.yaml"),
        "--world",
        "480",
        "--width",
        "100",
    ]

    assert tool.main(arguments) == 0
    short = capsys.readouterr().out
    assert "65,286,184,960 parameters" in short
    assert "pp 3  ranks 360-479" in short
    assert "bubble 8.11% of the step, 8.82%" in short
    assert "more (--full)" in short
    assert max(map(len, short.splitlines())) <= 110
    assert tool.main([*arguments, "--full"]) == 0
    full = capsys.readouterr().out
    assert "rank 479" in full
    assert "more (--full)" not in full
    assert all(f" 0B{microbatch}" in full for microbatch in range(34))


def test_svg_is_written(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a picture that is not there, and a traceback for a folder that is not there."""
    target = tmp_path / "step.svg"
    assert tool.main([DEMO, "--svg", str(target)]) == 0
    assert target.read_text(encoding="utf-8").startswith("<svg ")
    assert tool.main([DEMO, "--svg", str(tmp_path / "missing" / "step.svg")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([DEMO, "--world", "3", "parallel.tensor=2"], "3"),
        ([DEMO, "--world", "7"], "batch.global_sequences (16)"),
        ([DEMO, "model.num_head=4"], "num_heads"),
        (["no/such/file.yaml"], "no/such/file.yaml"),
    ],
)
def test_a_mistake_costs_one_line_and_exit_code_2(
    tool: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches tracebacks, and half a report printed before the mistake."""
    assert tool.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("world", ["0", "-4", "four", "4.0"])
def test_a_world_that_is_no_count_is_refused(
    tool: ModuleType, world: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches argparse's page of usage in front of the one line that matters."""
    with pytest.raises(SystemExit) as stopped:
        tool.main([DEMO, "--world", world])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_runs_from_anywhere_without_torch_or_an_installed_package(tmp_path: Path) -> None:
    """Catches an import that costs seconds, and a tool that runs in the repository's folder
    only.
    """
    program = (
        "import runpy, sys; sys.argv = ['plan.py', sys.argv[1]]\n"
        f"sys.path[0] = {str(TOOL.parent)!r}\n"
        f"try: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "heavy = {'torch', 'numpy'} & set(sys.modules); assert not heavy, heavy\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, DEMO],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "schedule" in done.stdout


def test_a_reader_that_leaves_early_is_no_failure() -> None:
    """Catches the BrokenPipeError of `plan.py CONFIG | head -1`."""
    command = (
        f"'{sys.executable}' '{TOOL}' '{DEMO}' --full --world 2000 "
        "batch.global_sequences=8000 | head -1"
    )
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
