"""`tools/plan.py`: the plan that a user sees before a run, and one line for an error."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from k2train.config.load import load_config
from k2train.plan.search import Choice
from k2train.planner.cluster_file import load_cluster
from k2train.planner.layouts import Question, checked
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
    overrides.append("parallel.layers_per_stage=null")
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


def test_shows_what_auto_takes(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan of another cut or schedule than the run has."""
    keys = ["parallel.pipeline=2", "parallel.schedule=auto", "parallel.layers_per_stage=auto"]
    assert tool.main([DEMO, *keys]) == 0
    printed = capsys.readouterr().out
    assert "stage 0  layers 0-4" in printed and "stage 1  layers 5-7" in printed
    assert "schedule  zb-h1; " in printed
    assert "  parallel.schedule auto is zb-h1: " in printed
    assert "  parallel.layers_per_stage auto is [5, 3]: " in printed
    assert "hint" not in printed


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


K2 = str(ROOT / "configs" / "k2_65b" / "stage1.yaml")
H100 = ["--cluster", "h100", "--gpus", "8"]
SMALL_K2 = ["model.num_layers=8", "batch.global_sequences=48", "parallel.pipeline=2"]


def test_a_cluster_gets_layouts_and_a_picture(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Catches a search that shows nothing, JSON that is none, and a picture of another layout."""
    picture = tmp_path / "best.svg"
    on = [K2, *SMALL_K2, "--cluster", "a100-80gb", "--gpus", "16"]
    assert tool.main([*on, "--tokens", "1e12", "--draw", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "are excluded. The best 10:" in printed and "goodput" in printed
    assert tool.main([*on, "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["best"]
    assert len(best) == 10 and best[0]["step_seconds"] <= best[9]["step_seconds"]
    if best[0]["pipeline"] > 1:
        assert picture.read_text(encoding="utf-8").startswith("<svg")
    assert tool.main([*on, "--why-not", "tensor=8,pipeline=2"]) == 0
    assert "tensor traffic" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        ([K2, "--cluster", "a100-80gb"], "needs --cluster NAME and --gpus N"),
        ([K2, "--gpus", "8"], "--gpus needs --cluster"),
        ([K2, "--judge", "rows.csv"], "--judge needs --calibration-report"),
        ([K2, "--cluster", "a100", "--gpus", "1e3"], "must be a whole number, not 1e3"),
        ([K2, "--cluster", "a100", "--gpus", "8"], "no such cluster; write a100-40gb or a100-"),
        ([K2, "--cluster", "a100-40gb", "--gpus", "8"], "no layout fits A100-40GB on 8 devices"),
        (["--predict", "rows.csv"], "--predict needs --out"),
        (["--predict", "none.csv", "--out", "x.csv"], "none.csv: cannot be read"),
        ([K2, "--before-you-burn", "--cluster", "h100", "--gpus", "8"], "needs STAGE1.yaml and"),
        ([], "required: CONFIG.yaml"),
        ([DEMO, *H100, "--tokens", "many"], "--tokens: must be a number above 0, not many"),
        ([DEMO, *H100, "--svg", "x.svg"], "--svg does not go with --cluster; it has --draw"),
        ([DEMO, *H100, "--world", "4"], "--world does not go with --cluster; it has --gpus"),
        ([DEMO, *H100, "--why-not", ""], "must name a layout"),
        ([DEMO, *H100, "--explain", "stages=2,micro=1"], "2 stages a rank with pipeline=1"),
        ([DEMO, DEMO, "--before-you-burn", *H100, "--json"], "--json does not go with --before"),
        ([DEMO, *H100, "--why-not", "tensor=2,tensor=4"], "tensor is named twice"),
    ),
)
def test_a_question_that_cannot_be_is_one_line(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    """Catches a traceback, several lines, or a mode that is ignored."""
    try:
        code = tool.main(arguments)
    except SystemExit as left:
        code = int(str(left.code))
    errors = capsys.readouterr().err
    assert code == 2
    assert words in errors and len(errors.strip().splitlines()) == 1


def test_a_schedule_that_a_search_does_not_time_is_told(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches uneven stages and zero-bubble schedules shown with the seconds of even 1F1B."""
    own = ["parallel.pipeline=2", "parallel.layers_per_stage=[5,3]", "parallel.schedule=zb-h1"]
    words = "parallel.schedule (zb-h1) and parallel.layers_per_stage ([5, 3]) counts in"
    for keys, times in (([*own], 1), ([*own, "--explain"], 1), ([own[0], "--explain"], 0)):
        assert tool.main([DEMO, *H100, *keys]) == 0
        assert capsys.readouterr().out.count(words) == times


def test_a_picture_of_a_part_says_so(tool: ModuleType, tmp_path: Path) -> None:
    """Catches the seconds of the first micro-batches that read as those of the whole step."""
    picture = tmp_path / "step.svg"
    draw = sys.modules["plan_parts.on_cluster"]._draw
    for sequences, part in ((48, "6 of 24"), (12, "all 6")):
        words = (
            f" s for {part} micro-batches of tensor=1,pipeline=2,stages=1,micro=1,recompute=none; "
        )
        keys = ["model.num_layers=8", f"batch.global_sequences={sequences}"]
        config = load_config(K2, [*keys, "parallel.pipeline=2", "parallel.tensor=1"])
        question = Question(config, load_cluster("a100-80gb"), 4)
        draw(question, checked(question.space, Choice(1, 2, 1, 1, "none")), str(picture))
        assert words in picture.read_text(encoding="utf-8")


def test_a_named_layout_is_in_the_json(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches --why-not and --explain that --json ignores, and steps of a small model shown alike.

    The demo is in fp32: its utilisation is of the peak in fp32, as in a run's metrics.
    """
    for option in ("--why-not", "--explain"):
        assert tool.main([DEMO, *H100, "--json", option, "tensor=2,micro=2"]) == 0
        named = json.loads(capsys.readouterr().out)["named"]
        assert (named["tensor"], named["micro_sequences"]) == (2, 2)
        rate = named["tokens_per_second_per_device"]
        # 15,949,824 FLOPs a token: 6 x (8 x 200,704 + 528,384) + 12 x 8 x 256 x 128.
        assert named["mfu"] == pytest.approx(rate * 15_949_824 / 66.9e12, rel=1e-3)

    assert tool.main([DEMO, *H100]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line[:2].strip().isdecimal()]
    table = [row for row in rows if len(row) == 12]
    assert len(table) == 10 and len({row[7] for row in table}) > 1
    assert all(float(row[11]) > 0 for row in table) and "-0.0%" not in printed


def test_two_stages_that_do_not_hold_end_with_one(
    tool: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a page of failures with exit code 0, and an overlooked second stage."""
    second = str(ROOT / "configs" / "k2_65b" / "stage2.yaml")
    on = ["--before-you-burn", "--cluster", "a100-80gb", "--gpus", "480"]
    assert tool.main([K2, second, *on]) == 1
    printed = capfd.readouterr().out
    assert printed.count("FAILS  data.manifest") == 2
    assert "holds  one model of 65,286,184,960 parameters" in printed
