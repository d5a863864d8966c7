"""`tools/plan.py --compare RUN`: what the record allows, in words, and one line for a mistake."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from k2train.errors import RunError
from k2train.plan.action import Action, Op
from k2train.planner.cluster_file import load_cluster
from k2train.planner.compare_run import device_note, read_run
from k2train.planner.planned_step import relative_work
from k2train.record.action_trace import newest_traces, read_trace
from tests.support.command_line import load_tool
from tests.support.recorded_actions import recorded, setup_of, write_run, write_traces

KEYS = ("parallel.pipeline=2", "model.vocab_size=256", "parallel.layers_per_stage=[3,5]")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("plan")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with recorded actions, whose backward of stage 1 is slow."""
    setup = setup_of(2, *KEYS)
    directory = write_run(tmp_path_factory.mktemp("runs") / "two", setup, [9.0, 4.0, 5.0, 6.0])

    def slow(action: Action) -> float:
        stage, op = action.stage, action.op
        if not op.is_compute:
            return 1e-3
        slower = 2.0 if (stage, op) == (1, Op.BACKWARD) else 1.0
        return slower * 2e-9 * relative_work(setup, (stage, op))

    write_traces(directory, recorded(setup, slow))
    return directory


def test_the_slow_stage_is_named_with_what_it_holds(
    tool: ModuleType, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a text without the run, the order, the sentence or the terms, and a JSON that says
    something else.
    """
    assert tool.main(["--compare", str(run)]) == 0
    text = capsys.readouterr().out
    assert f"{run}, attempt 1: 2 processes = pipeline 2 x data 1 x tensor 1, 1f1b, " in text
    assert "its shape, scaled to the median" in text
    assert "every rank did its actions in the planned order" in text
    assert "stage 1's backward (layers 3 to 7, head and loss) took 2.00 times the plan, " in text
    assert "bubble (follows from the others)" in text and "1 measured" in text
    assert tool.main(["--compare", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sentence"] in text and found["steps"] == [2, 3]
    assert found["terms"][0]["term"] == "stage 1 backward"
    for lane in found["measured_lanes"]:
        assert sum(lane.values()) == pytest.approx(found["measured_seconds"])


def test_on_a_cluster_of_another_device_that_is_said(
    tool: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches ratios of a CPU to a GPU that read as errors of the plan, and a picture or a trace
    that is not written.
    """
    picture, trace = tmp_path / "step.svg", tmp_path / "all.json"
    files = ["--draw", str(picture), "--trace", str(trace)]
    assert tool.main(["--compare", str(run), "--cluster", "h100", *files]) == 0
    text = capsys.readouterr().out
    assert "the run's device is cpu, the cluster's H100-80GB: the ratios say how" in text
    assert "optimizer  " in text and "terms with -" not in text
    assert picture.read_text(encoding="utf-8").count(">rank ") == 2
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}


def test_devices_are_compared_by_name(run: Path) -> None:
    """Catches a note on the right device, and none on another one."""
    read = read_run(run)
    names = {"NVIDIA H100 80GB HBM3": "", "NVIDIA A100-SXM4-80GB": "A100", "": "not recorded"}
    for device, word in names.items():
        changed = type(read)(**{**vars(read), "device": device})
        note = device_note(changed, load_cluster("h100"))
        assert (word in note) if word else note == ""


def test_without_actions_whole_steps_are_compared(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches terms that are made up, a first step that counts, and no word on what is missing."""
    run = write_run(tmp_path / "plain", setup_of(2, *KEYS), [9.0, 4.0, 5.0, 6.0])
    assert tool.main(["--compare", str(run), "--cluster", "a100-80gb"]) == 0
    text = capsys.readouterr().out
    assert "measured 5.000 s, the median of 3 steps (2 to 4 in metrics.jsonl)" in text
    assert "times the plan" in text and "planned terms: matmul" in text
    assert "which term differs, the bubble and the order of actions are not known" in text
    assert "profile.actions=[FIRST,LAST]" in text
    assert tool.main(["--compare", str(run)]) == 0
    assert "without --cluster it has no seconds" in capsys.readouterr().out
    assert tool.main(["--compare", str(run), "--draw", str(tmp_path / "x.svg")]) == 2
    assert "--draw needs recorded actions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "no/such/run"], "no/such/run is not a directory"),
        (["--compare", "configs"], "configs has no config.yaml"),
    ],
)
def test_a_mistake_is_one_line(
    tool: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback for a folder that is no run."""
    assert tool.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_options_that_do_not_go_together_are_refused(
    tool: ModuleType, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a config beside the run's own, and a number of devices that is not the run's."""
    for arguments in (["configs/demo/stage1.yaml"], ["--gpus", "8"], ["--world", "4"]):
        with pytest.raises(SystemExit) as stopped:
            tool.main([*arguments, "--compare", str(run)])
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("was", "becomes", "message"),
    [
        ('"format": 1', '"format": 9', "key 'format'"),
        ('"cat":"step"', '"cat":"stop"', "key 'cat'"),
        ('"dur":', '"dur":-', "key 'dur'"),
        ('"step":2,', '"step":7,', "of step 2 lies in no step"),
        ('"depth":1', '"depth":0', "has depth 0, and lies in a step"),
        ("}}\n]}", "}}\n", "no trace of actions"),
    ],
)
def test_a_damaged_trace_is_one_line(
    run: Path, tmp_path: Path, was: str, becomes: str, message: str
) -> None:
    """Catches a traceback, or numbers, of a file that was cut off or changed."""
    text = newest_traces(run)[0].read_text(encoding="utf-8")
    assert was in text
    path = tmp_path / "trace.json"
    path.write_text(text.replace(was, becomes, 1), encoding="utf-8")
    with pytest.raises(RunError) as raised:
        read_trace(path)
    assert message in str(raised.value) and "\n" not in str(raised.value)
