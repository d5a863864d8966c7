"""`tools/bench.py gpu`: the time budget, failures as rows, and the tables made from rows.

The dry run goes through the parts as on a GPU, on the CPU with tiny sizes: its figures mean
nothing.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.command_line import HANG_SECONDS, load_tool, soon

tool = load_tool("bench")

from benchmarks.cpu.contract import UnavailableError  # noqa: E402
from benchmarks.gpu import main as main_module  # noqa: E402
from benchmarks.gpu import part_host, report, requirements, runner  # noqa: E402
from benchmarks.gpu.aims import Aim, aims_of  # noqa: E402
from benchmarks.gpu.bench import Bench, OutOfTimeError  # noqa: E402
from benchmarks.gpu.clock import process_start_seconds  # noqa: E402
from benchmarks.gpu.engines import (  # noqa: E402
    config_of,
    forward_backward,
    make_engine,
    token_ids,
    world_of_one,
)
from benchmarks.gpu.memory import planned  # noqa: E402
from benchmarks.gpu.part_layers import Case, leave_out_attention, rates  # noqa: E402
from benchmarks.gpu.part_models import cases_of  # noqa: E402
from benchmarks.gpu.peers import build_model, peer_contenders  # noqa: E402
from benchmarks.gpu.processes import end_tree  # noqa: E402
from benchmarks.gpu.profiling import STEP, Profile, _union, by_category, profile_step, scopes  # noqa: E402
from benchmarks.gpu.rows import FAIR, against  # noqa: E402
from benchmarks.gpu.runner import Given, Part, read_rows, run_part, run_parts  # noqa: E402
from benchmarks.gpu.sizes import Batch, sizes  # noqa: E402
from benchmarks.gpu.timing import Timer, summary  # noqa: E402
from k2train.data.loader import MicroBatch  # noqa: E402
from k2train.errors import ConfigError, RunError  # noqa: E402
from k2train.plan.cost import ModelShape, flops_per_token, parameters  # noqa: E402
from k2train.processes import live_processes  # noqa: E402
from tests.support.lanes import lanes  # noqa: E402
from tests.support.tiny_model import engine_of  # noqa: E402

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]


def bench_of(stream: io.StringIO, seconds: float = 60.0) -> Bench:
    return Bench("part", torch.device("cpu"), True, time.monotonic() + seconds, stream)


def rows_in(stream: io.StringIO) -> list[Row]:
    rows = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [row for row in rows if row["status"] != "begun"]


@pytest.mark.slow
def test_a_dry_run_goes_through_every_part(bench_gpu_dry: tuple[Path, str]) -> None:
    """Catches a part that no longer fits the library: it would be a failed row on a GPU that is
    paid by the minute.
    """
    rows = json.loads((bench_gpu_dry[0] / "result.json").read_text())["rows"]
    assert [row for row in rows if row["status"] not in ("ok", "unavailable")] == []
    done = {
        row["part"]: [r["what"] for r in rows if r["part"] == row["part"] and r["status"] == "ok"]
        for row in rows
    }
    assert list(done) == list(main_module.PARTS)
    assert {name.split(": ", 1)[1] for name in done["layers"]} >= {
        "auto",
        "without attention",
        "recompute: full",
        "loss: reference",
    }
    assert len([name for name in done["host"] if "micro-batch" in name]) == 4
    assert set(report.LAYER) | {report.HEAD} <= set(done["tp8"])


@pytest.mark.slow
def test_whole_models_are_compared_in_turns(bench_gpu_dry: tuple[Path, str]) -> None:
    """Catches contenders that do not learn from the same work, and one that is timed while the
    others are cold.
    """
    rows = json.loads((bench_gpu_dry[0] / "result.json").read_text())["rows"]
    measured = [row for row in rows if row["part"] == "models" and "step_seconds" in row]
    names = [
        "k2train", "fair peer", "transformers", "transformers compiled", "reference",
        "reference compiled",
    ]  # fmt: skip
    assert [row["contender"] for row in measured] == 2 * names
    assert [row["microbatches"] for row in measured] == 6 * [4] + 6 * [1]
    assert {row["in_turns"] for row in measured} == {6}
    assert all(
        4.5 < row["losses"][0] < 5.3 and row["losses"][-1] < row["losses"][0] for row in measured
    )


@pytest.mark.slow
def test_the_folder_holds_the_results_and_no_caches(bench_gpu_dry: tuple[Path, str]) -> None:
    """Catches results that are only on the screen, and compiler caches left behind."""
    folder, printed = bench_gpu_dry
    assert (folder / "table.md").read_text() == printed
    assert not (folder / runner.SCRATCH).exists()
    assert (
        printed.index("### Device") < printed.index("### K2's layers") < printed.index("### Host")
    )
    assert "### Aims" not in printed, "a dry run is judged"
    assert printed.count("Kernels by time, ") == 4
    planner = json.loads((folder / "planner.json").read_text())
    kinds = ("forward", "input_gradient", "weight_gradient")
    assert set(planner["layer"]) == {f"{kind}_seconds" for kind in kinds}
    products = [planner["pieces"][name] for name in ("qkv product", "down product")]
    assert planner["layer"]["weight_gradient_seconds"] > sum(
        p["weight_gradient_seconds"] for p in products
    )
    assert planner["rank"]["degree"] == 2
    assert planner["head"]["forward_backward_seconds"] > 0


def test_no_device_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches five parts that each fail in their own words where there is no GPU."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert main_module.main(["--folder", str(tmp_path), "--minutes", "1"]) == 2
    output = capfd.readouterr()
    assert "sees no CUDA device; --dry-run" in output.err
    assert output.out == ""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("CUDA error: an illegal memory access\nand more"), "failed"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (RuntimeError("cuBLAS: out of memory"), "out of memory"),
        (UnavailableError("apex cannot be imported"), "unavailable"),
        (ConfigError("kernels.attention (cudnn) needs a CUDA device"), "failed"),
        (OutOfTimeError("10 rounds take 9 s"), "skipped"),
        (AssertionError("2 parameters"), "failed"),
    ],
)
def test_what_goes_wrong_is_a_row_and_the_next_one_is_measured(
    error: Exception, status: str
) -> None:
    """Catches one failure that takes the rows after it along, or that hides why."""
    stream = io.StringIO()
    bench = bench_of(stream)

    def fails() -> Row:
        raise error

    assert bench.attempt("first", fails, batch="b") is None
    assert bench.attempt("second", lambda: {"figure": 1}) == {"figure": 1}
    first, second = rows_in(stream)
    assert (first["status"], first["batch"]) == (status, "b")
    assert str(error).splitlines()[0] in first["why"] and "\n" not in first["why"]
    assert (second["status"], second["figure"]) == ("ok", 1)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), ConfigError("needs the package apex")]
)
def test_a_choice_that_a_device_has_not_is_no_failure(error: Exception) -> None:
    """Catches a machine without flash-attn that can never pass, and an option that hides a bug."""
    stream = io.StringIO()
    bench = bench_of(stream)

    def fails(error: Exception) -> Row:
        raise error

    bench.attempt("first", lambda: fails(error), optional=True)
    bench.attempt("second", lambda: fails(ValueError("a bug")), optional=True)
    assert [row["status"] for row in rows_in(stream)] == ["unavailable", "failed"]


def test_what_no_longer_fits_is_not_begun() -> None:
    """Catches a case that starts although its time has gone, and takes that of the parts behind
    it.
    """
    stream = io.StringIO()
    begun: list[int] = []
    bench = bench_of(stream, 5.0)
    assert bench.attempt("long", lambda: {"n": begun.append(1)}, needs_seconds=30) is None
    assert begun == []
    assert "needs about 30 s" in rows_in(stream)[0]["why"]
    with pytest.raises(OutOfTimeError, match="1000 rounds take"):
        Timer(bench_of(stream, 0.5)).alone(lambda: time.sleep(0.01), rounds=1000)


def given_of(folder: Path, seconds: float = 100.0, dry: bool = True) -> Given:
    return Given(folder, tuple(main_module.PARTS.values()), seconds, dry)


PART = main_module.PARTS


def test_a_part_that_hangs_is_ended_and_leaves_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a compiler that hangs and takes the ten minutes, and rows lost with the process that
    wrote them.
    """
    rows = tmp_path / "rows_layers.jsonl"
    lines = [
        {"part": "layers", "what": "one", "status": "ok"},
        {"part": "layers", "what": "two", "status": "begun"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"part": "layers", "wh'
    (tmp_path / "text").write_text(text)
    # A shell: it has written long before its time is up, also on a busy machine.
    program = f"cat '{tmp_path / 'text'}' >'{rows}'; exec sleep 3600"
    monkeypatch.setattr(runner, "part_command", lambda *_: ["sh", "-c", program])
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.5)
    began = time.monotonic()
    found = run_part(PART["layers"], given_of(tmp_path), 1.5)
    assert time.monotonic() - began < HANG_SECONDS, "it was waited for"
    assert [(row["what"], row["status"]) for row in found] == [("one", "ok"), ("two", "failed")]
    assert "ended after 2 s" in found[1]["why"]


def test_nothing_that_a_part_started_outlives_it(tmp_path: Path) -> None:
    """Catches a training that goes on on the device after its part was ended: it has a group of its
    own, and its ranks have sessions of their own.
    """
    program = (
        "import os, subprocess, sys, time\n"
        "apart = {'process_group': 0} if len(sys.argv) == 4 else {'start_new_session': True}\n"
        "names = sys.argv[2:]\n"
        "command = [sys.executable, *sys.argv[:2], *names[1:]]\n"
        "if names: subprocess.Popen(command, **apart)\n"
        "open(os.path.join(sys.argv[1], f'pid_{len(names)}_{os.getpid()}'), 'w').close()\n"
        "time.sleep(3600)\n"
    )
    script = tmp_path / "tree.py"
    script.write_text(program)
    command = [sys.executable, str(script), str(tmp_path), "training", "rank"]

    def started() -> list[int]:
        return [int(path.name.split("_")[2]) for path in tmp_path.glob("pid_*")]

    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
    try:
        assert soon(lambda: len(started()) == 3), log.read_text()
        end_tree(process)
        assert process.returncode == -signal.SIGKILL
        assert soon(lambda: not {*started()} & {*live_processes()})
    finally:
        for pid in {*started()} & {*live_processes()}:
            os.kill(pid, signal.SIGKILL)


def test_a_part_that_dies_says_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a dead part whose reason stands in a log that nobody opens."""
    program = "import sys; sys.exit('libcuda is too old')"
    monkeypatch.setattr(runner, "part_command", lambda *_: [sys.executable, "-c", program])
    (row,) = run_part(PART["device"], given_of(tmp_path), 30)
    assert (row["status"], row["what"], row["why"]) == (
        "failed",
        "(start)",
        "exit code 1: libcuda is too old",
    )


def test_time_left_over_goes_to_the_parts_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches shares fixed ahead: what the first part did not need must reach the last."""
    clock, asked = [0.0], {}

    def fake(part: Part, given: Given, seconds: float) -> list[Row]:
        asked[part.name] = seconds
        clock[0] += {"device": 1.0, "layers": 600.0}.get(part.name, seconds)
        return [{"part": part.name, "what": "x", "status": "ok", "why": ""}]

    monkeypatch.setattr(runner, "run_part", fake)
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock[0])
    rows = run_parts(given_of(tmp_path, 580.0, dry=False))
    grace = runner.GRACE_SECONDS
    assert asked["device"] == pytest.approx(40 - grace)
    assert asked["layers"] == pytest.approx((580 - 1) * 190 / 540 - grace)
    assert [row["part"] for row in rows if row["status"] == "skipped"] == ["models", "tp8", "host"]


def test_parts_of_most_worth_keep_their_time_when_there_is_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches shares of a short time with which every part ends in the middle, and a part that is
    started without the time for a single row.
    """
    clock, asked = [0.0], {}

    def fake(part: Part, given: Given, seconds: float) -> list[Row]:
        asked[part.name] = seconds
        clock[0] += seconds + runner.GRACE_SECONDS
        return [{"part": part.name, "what": "x", "status": "ok", "why": ""}]

    monkeypatch.setattr(runner, "run_part", fake)
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock[0])
    rows = run_parts(given_of(tmp_path, 240.0, dry=False))
    assert asked == {"device": 40 - runner.GRACE_SECONDS, "layers": 190 - runner.GRACE_SECONDS}
    assert [row["why"] for row in rows if row["part"] == "models"] == ["needs 60 s, 2 s were left"]


def stand_in(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(runner, "part_command", lambda *_: [sys.executable, "-c", program])


def test_a_benchmark_without_results_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches exit code 0 of a benchmark all of whose parts died."""
    stand_in(monkeypatch, "raise SystemExit('no libcuda')")
    folder = ["--dry-run", "--folder", str(tmp_path), "--only", "device", "tp8"]
    assert main_module.main(folder) == 1
    output = capsys.readouterr()
    assert output.err.splitlines()[-1] == "bench.py gpu: no result of device, tp8; see above"
    assert "| device | (start) | failed | exit code 1: no libcuda |" in output.out

    row = {"part": "device", "what": "x", "status": "ok", "why": "", "facts": {}}
    path = tmp_path / "rows_device.jsonl"
    stand_in(monkeypatch, f"open({str(path)!r}, 'w').write({json.dumps(row)!r})")
    assert main_module.main([*folder[:-1]]) == 0


def test_a_part_that_ends_in_the_middle_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a process that some library ends with 0, and whose other rows pass for all."""
    lines = [{"status": "ok", "what": "a"}, {"status": "begun", "what": "b"}]
    (tmp_path / "text").write_text("".join(json.dumps(line) + "\n" for line in lines))
    program = f"cp '{tmp_path / 'text'}' '{tmp_path / 'rows_layers.jsonl'}'"
    monkeypatch.setattr(runner, "part_command", lambda *_: ["sh", "-c", program])
    found = run_part(PART["layers"], given_of(tmp_path), 60.0)
    assert [(row["what"], row["status"]) for row in found] == [("a", "ok"), ("b", "failed")]
    assert found[1]["why"] == "ended without a result"


def test_a_part_that_says_nothing_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a part that ends well and is in no table."""
    stand_in(monkeypatch, "")
    (row,) = run_part(PART["device"], given_of(tmp_path), 30)
    assert (row["status"], row["why"]) == ("failed", "ended without a row")


def test_a_missing_package_is_named_before_the_first_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches five parts that each die of the same import."""
    broken = tmp_path / "site"
    broken.mkdir()
    (broken / "pydantic.py").write_text("raise ModuleNotFoundError('No module named pydantic')")
    monkeypatch.syspath_prepend(str(broken))
    monkeypatch.delitem(sys.modules, "pydantic")
    monkeypatch.setattr(runner, "run_part", lambda *_: pytest.fail("a part was started"))

    with pytest.raises(RunError) as caught:
        main_module.main(["--dry-run", "--folder", str(tmp_path / "out")])
    text = str(caught.value)
    assert "lacks pydantic (ModuleNotFoundError: No module named pydantic); " in text
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert f"bash scripts/gpu_site.sh --python {version}" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lacking", "site", "end"),
    [
        (("torch",), False, "PY=/path/to/python3 (.gpu_site brings no torch)"),
        (("torch", "xxhash"), True, "PY=/path/to/python3 (.gpu_site brings no torch)"),
        (("xxhash",), True, "PY=/path/to/python3"),
    ],
)
def test_the_folder_is_named_for_what_it_brings(
    monkeypatch: pytest.MonkeyPatch, lacking: tuple[str, ...], site: bool, end: str
) -> None:
    """Catches the way to a folder of packages where torch is missing, which is not in it."""
    problems = [f"{name} (no module {name})" for name in lacking]
    monkeypatch.setattr(requirements, "missing", lambda wanted: problems)
    with pytest.raises(RunError) as caught:
        requirements.check_requirements()
    text = str(caught.value)
    assert ("scripts/gpu_site.sh" in text) == site and text.endswith(end) and "\n" not in text


def test_an_old_package_is_named_with_its_bound() -> None:
    """Catches a version that is compared as text, and a bound that is not the project's."""
    bounds = requirements.lower_bounds()
    assert bounds["pydantic"] == "2.10" and "torch" in bounds
    assert list(requirements.missing()) == []
    found = list(requirements.missing(bounds={"numpy": "1.9", "pyyaml": "99.10"}))
    assert len(found) == 1 and found[0].endswith("is older than 99.10)")


def test_the_clock_of_a_part_starts_with_its_process() -> None:
    """Catches a deadline that forgets what importing torch took."""
    program = (
        "import time; time.sleep(1.0)\n"
        "from benchmarks.gpu.clock import process_start_seconds\n"
        "print(time.monotonic() - process_start_seconds())"
    )
    before = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"},
    )  # fmt: skip
    # The kernel counts in hundredths of a second.
    assert 0.98 < float(done.stdout) < time.monotonic() - before + 0.02
    assert process_start_seconds() < time.monotonic()


def test_rows_cut_in_the_middle_are_left_out(tmp_path: Path) -> None:
    """Catches a report that fails because a process was ended while it wrote."""
    path = tmp_path / "rows"
    path.write_text(
        '{"status": "begun", "what": "a"}\n{"status": "ok", "what": "a"}\n{"status": "beg'
    )
    assert read_rows(path) == ([{"status": "ok", "what": "a"}], "")


def layers_row(what: str, batch: str, flops: float, peak: int) -> Row:
    unknown = (
        "forward_backward_seconds", "step_seconds", "tokens_per_second", "flops_per_second_causal",
        "step_flops_per_second",
    )  # fmt: skip
    figures = {"flops_per_second": flops, "spread": 0.01, "kernels": "k"}
    row = {"part": "layers", "what": what, "batch": batch, "status": "ok", "why": ""}
    return dict.fromkeys(unknown) | row | figures | {"peak_bytes": peak, "planned_bytes": 100}


def found_aims(rows: list[Row], *parts: str) -> dict[str, tuple[float | None, str]]:
    return {aim.what: (aim.found, aim.state) for aim in aims_of(rows, parts or None)}


def test_aims_are_judged_by_the_rate_of_the_same_call() -> None:
    """Catches a share of a data sheet, or of another call's rate, and a missed aim that is called
    met.
    """
    device = {"part": "device", "status": "ok", "spread": 0.0}
    bad = {"part": "layers", "what": "bad", "status": "out of memory", "why": "full"}
    rows: list[Row] = [
        {**device, "what": "small", "flops_per_second": 50.0},
        {**device, "what": "large", "flops_per_second": 100.0},
        layers_row("4 layers: auto", "2048 x 4", 84.0, 102),
        layers_row("4 layers: without attention", "2048 x 4", 90.0, 104),
        layers_row("4 layers: recompute: full", "2048 x 4", 60.0, 96),
        {**bad, "batch": "2048 x 4"},
    ]

    share = ": share of the matmul rate"
    assert found_aims(rows) == {
        f"K2's layers, 4 layers: auto{share}": (0.84, "missed"),
        f"K2's layers, 4 layers: without attention{share}": (0.9, "met"),
        "K2's layers, 4 layers: auto: peak / plan": (1.02, "met"),
        "K2's layers, 4 layers: without attention: peak / plan": (1.04, "missed"),
        "K2's layers, 4 layers: recompute: full: peak / plan": (0.96, "missed"),
    }
    text = report.markdown(rows, False, 1.0)
    assert "| layers | bad | out of memory | full |" in text
    assert "auto: share of the matmul rate | 0.840 | >= 0.85 | missed |" in text
    # Without the part that measures the rate no share means anything.
    assert set(found_aims(rows[2:4]).values()) >= {(None, "not judged")}


def model_row(contender: str, model: str, batch: str, microbatches: int, rate: float) -> Row:
    figures = {"tokens_per_second": rate, "step_seconds": 1.0, "step_flops_per_second": rate}
    work = {"part": "models", "model": model, "batch": batch, "microbatches": microbatches}
    what = f"{model}, {microbatches} x {batch}: {contender}"
    return {**work, "contender": contender, "what": what, "status": "ok", "why": "", **figures}


def test_models_are_compared_at_the_same_work_only() -> None:
    """Catches a ratio against a peer's time at another length or number of micro-batches."""
    rows = [
        model_row("k2train", "m", "a", 4, 12.0),
        model_row(FAIR, "m", "a", 4, 10.0),
        model_row(FAIR, "m", "b", 4, 1.0),
        model_row("k2train", "m", "a", 1, 9.0),
        model_row(FAIR, "m", "a", 1, 20.0),
    ]
    found = found_aims(rows)
    assert found["m, 4 x a: k2train / fair peer"] == (1.2, "met")
    assert "m, 1 x a: k2train / fair peer" not in found
    assert against(rows[3], rows, FAIR) == pytest.approx(0.45)
    assert against(rows[2], rows[2:], "reference compiled") is None


def test_utilisation_is_of_the_data_sheet_and_of_the_best_that_fits() -> None:
    """Catches MFU of another work, and an aim that vanishes with the part that died."""
    device = {"part": "device", "what": "facts", "status": "ok", "data_sheet_flops": 100.0}
    bad = {"part": "models", "status": "unavailable", "model": "LLaMA 6.7B", "what": "LLaMA 6.7B"}
    rows = [
        {**device, "facts": {}},
        model_row("k2train", "LLaMA 1.3B", "2048 x 4", 4, 47.0),
        model_row("k2train, recompute full", "LLaMA 1.3B", "2048 x 4", 4, 49.0),
        model_row("k2train", "LLaMA 1.3B", "8192 x 1", 4, 60.0),
        {**bad, "why": "k2train: states alone need 120 GiB of 80 GiB"},
    ]
    found = found_aims(rows)
    assert found["LLaMA 1.3B, 4 x 2048 x 4: MFU"] == (0.49, "met")
    assert found["LLaMA 2.7B, 4 x 2048 x 4: MFU"] == (None, "not judged")
    assert found["LLaMA 6.7B, 4 x 2048 x 4: MFU"] == (None, "not possible here")
    # Too little memory for the work, not for the states, is no excuse.
    rows[-1]["why"] = "OutOfMemoryError: CUDA out of memory"
    assert found_aims(rows)["LLaMA 6.7B, 4 x 2048 x 4: MFU"] == (None, "not judged")


def test_what_was_not_measured_is_not_judged() -> None:
    """Catches a dead part whose aims nobody misses."""
    dead = {"status": "failed", "why": "exit code 1: no libcuda", "what": "(start)"}
    rows = [{"part": part, **dead} for part in ("layers", "models", "host", "price")]
    aims = aims_of(rows)
    assert {aim.part for aim in aims} == {"layers", "models", "host", "price"}
    assert {aim.state for aim in aims} == {"not judged"}
    assert {aim.why for aim in aims} == {"failed: exit code 1: no libcuda"}
    price = {"part": "price", "what": "p", "status": "ok", "why": ""}
    host = {"part": "host", "what": "h", "status": "ok", "why": ""}
    rows = [{**price, "price": 0.04}, {**host, "busy_share": 0.97}]
    wanted = [
        Aim("price", "p: price of determinism", 0.04, "<= 0.03", "missed"),
        Aim("host", "h: device busy", 0.97, ">= 0.97", "met"),
    ]
    assert aims_of(rows) == wanted


def test_the_fair_peer_keeps_fp32_and_computes_in_bf16() -> None:
    """Catches a peer that saves memory k2train spends, or that computes in fp32, and a compiled
    layer that quietly falls back.
    """
    bench, shape, batch = bench_of(io.StringIO()), sizes(True).models[0][1], Batch(16, 2)
    made = build_model(bench, FAIR, shape, batch)
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.float32}
    seen: set[torch.dtype] = set()
    for layer in made.model.blocks.values():  # type: ignore[operator,union-attr]
        layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = made.loss(token_ids(bench.device, shape.vocab_size, batch)[0].tokens)
    assert seen == {torch.bfloat16} and loss.dtype == torch.float32

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (contender,) = peer_contenders(bench, FAIR, shape, batch, microbatches=3)
    losses = [float(contender.step()) for _ in range(3)]
    assert 4.5 < losses[0] < 5.3 and losses[2] < losses[1] < losses[0]
    # One graph for all layers and one for the loss.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def test_a_step_of_micro_batches_is_the_step_of_their_batch() -> None:
    """Catches a peer that sums losses where k2train takes their mean, and one that trains on the
    first micro-batch only.
    """
    bench, shape, batch = bench_of(io.StringIO()), sizes(True).models[0][1], Batch(16, 2)
    torch.manual_seed(3)
    contender = peer_contenders(bench, "reference", shape, batch, microbatches=3)[0]
    torch.manual_seed(3)
    made = build_model(bench, "reference", shape, batch)
    parts = token_ids(bench.device, shape.vocab_size, batch, 3)
    with torch.no_grad():
        losses = [float(made.loss(part.tokens)) for part in parts]
    assert len({*losses}) == 3
    assert float(contender.step()) == pytest.approx(sum(losses) / 3, rel=1e-3)


def test_the_smallest_model_at_the_shortest_length_comes_first() -> None:
    """Catches a bench that ends before it has one figure of each model."""
    first = [(case.name, str(case.batch), case.microbatches) for case in cases_of(sizes(False))]
    assert first[0] == ("LLaMA 1.3B", "2048 x 4", 4)
    assert next(name for name, batch, _ in first if batch == "8192 x 1") == "LLaMA 1.3B"
    assert len({*first}) == 12 and {batch for _, batch, _ in first[:6]} == {"2048 x 4"}


def test_forward_and_backward_alone_are_those_of_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a figure, and a price of determinism, that was measured without it."""
    work = sizes(True)
    shape, batch = replace(work.k2, num_layers=1), work.k2_batches[0]
    modes: list[bool] = []
    with world_of_one(bench_of(io.StringIO())) as grid:
        engine = make_engine(grid, shape, batch)
        run = engine._run

        def seen(*arguments: Any) -> torch.Tensor:
            modes.append(torch.are_deterministic_algorithms_enabled())
            return run(*arguments)

        monkeypatch.setattr(engine, "_run", seen)
        for strict in (True, False):
            # A CPU needs no such mode, so its engines never ask for it.
            monkeypatch.setattr(engine, "strict", strict)
            forward_backward(engine, token_ids(grid.device, shape.vocab_size, batch))
    assert modes == [True, False] and not torch.are_deterministic_algorithms_enabled()


def test_layers_without_attention_still_learn() -> None:
    """Catches a figure without attention that still pays for it, or leaves out more."""
    work = sizes(True)
    shape, batch = replace(work.k2, num_layers=2), work.k2_batches[0]
    with world_of_one(bench_of(io.StringIO())) as grid:
        engine = make_engine(grid, shape, batch)
        leave_out_attention(engine)
        ids = token_ids(grid.device, shape.vocab_size, batch)
        losses = [engine.train_step(ids, 1e-2).loss for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    case = Case("x", shape, batch, ())
    with_it, without = rates(case, None, 1.0), rates(replace(case, attention=False), None, 1.0)
    # 6 FLOPs a parameter and token of the matrices, none of the pairs.
    layer = 4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.ffn_hidden_size
    matrices = 2 * layer + shape.vocab_size * shape.hidden_size
    assert without["flops_per_second"] == 6 * matrices * batch.tokens
    assert without["flops_per_second_causal"] == without["flops_per_second"]
    assert with_it["flops_per_second"] > without["flops_per_second"]


def test_the_planner_gets_each_piece_as_often_as_a_layer_has_it() -> None:
    """Catches a layer with one norm, or a sum over pieces of which some are missing."""
    piece = {"part": "tp8", "status": "ok", "forward_seconds": 1.0, "input_gradient_seconds": 2.0}
    rows = [{**piece, "what": name} for name in report.LAYER]
    facts = report.planner_facts(rows)
    assert facts is not None
    assert facts["layer"] == {
        "forward_seconds": 11,
        "input_gradient_seconds": 22,
        "weight_gradient_seconds": 0,
    }
    assert facts["head"] is None
    missing = report.planner_facts(rows[1:])
    assert missing is not None and missing["layer"] is None
    assert report.planner_facts([]) is None


def test_rates_count_all_micro_batches_and_half_of_the_scores() -> None:
    """Catches FLOPs of one micro-batch over the time of four, and scores halved twice."""
    shape, batch = ModelShape(2, 64, 96, 4, 4, 131), Batch(32, 2)
    found = rates(Case("x", shape, batch, (), microbatches=4), 2.0, 1.0)
    flops = 4 * 64 * flops_per_token(shape, 32)
    assert found["tokens_per_second"] == 4 * 64 / 2
    assert found["step_flops_per_second"] == flops / 2
    assert found["flops_per_second"] == flops
    assert found["flops_per_second_causal"] == flops - 4 * 64 * 6 * 2 * 32 * 64
    assert rates(Case("x", shape, batch, ()), None, 1.0)["tokens_per_second"] is None


def test_the_work_is_the_work() -> None:
    """Catches a model or a rank's part that is not the one it is named after."""
    full = sizes(False)
    k2, rank = full.k2, full.rank
    assert (k2.hidden_size, k2.ffn_hidden_size, k2.vocab_size) == (8192, 22016, 32032)
    assert [parameters(shape) // 10**7 for _, shape in full.models] == [134, 270, 673]
    heads, ffn = rank.num_heads * rank.degree, rank.ffn_hidden_size * rank.degree
    assert (rank.head_dim, heads, ffn) == (128, 64, 22016)
    assert rank.vocab_rows * rank.degree == 32032
    assert full.rounds >= 10


def test_the_spread_is_that_of_the_quartiles() -> None:
    """Catches a mean, which one slow sample moves."""
    found = summary([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.median, found.low, found.high, found.samples) == (3.0, 2.0, 4.0, 5)
    assert found.spread == pytest.approx(2 / 3)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=12))
def test_the_busy_time_counts_no_moment_twice(spans: list[tuple[int, int]]) -> None:
    """Catches a device that is busy for more than all of the time."""
    intervals = [(float(start), float(start + length)) for start, length in spans]
    moments = {t for start, length in spans for t in range(start, start + length)}
    assert _union(intervals) == len(moments)


class Small:
    """Something with parts to put scopes around."""

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ x).tanh()

    def step(self, x: torch.Tensor) -> None:
        with torch.profiler.record_function(STEP):
            y = (self.attend(x) @ x).exp()
            y.sum().backward()


def test_a_backward_operation_is_in_the_scope_of_its_forward() -> None:
    """Catches attention's backward counted as products, and a scope that stays after the
    profile.
    """
    engine = Small()
    x = torch.randn(128, 128, requires_grad=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=activities) as recorded,
        scopes([("attention", engine, "attend")]),
    ):
        engine.step(x)

    assert "attend" not in vars(engine)
    host = list(recorded.events())
    products = [event for event in host if event.name == "aten::mm"]
    assert len(products) == 6
    seconds = by_category(host, cuda=False)
    own = sorted(event.self_cpu_time_total / 1e6 for event in products)
    assert seconds["attention"] > sum(own[:3]) * 0.9
    assert sum(own[:3]) * 0.9 < seconds["products"] < sum(own[-3:]) * 1.1
    assert seconds["elementwise"] > 0


def test_a_profiler_that_sees_no_kernel_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a device that was busy for 0 % of a step because nobody was allowed to look."""
    blind = Profile(1.0, 1.0, {}, 9, 0.0, 0, 0, 0)
    monkeypatch.setattr(part_host, "profile_engine", lambda *_: blind)
    bench, work = bench_of(io.StringIO()), sizes(True)
    with world_of_one(bench) as grid, pytest.raises(RuntimeError, match="saw no kernel"):
        part_host.profiled(bench, grid, work.models[0][1], work.model_batches[0], 1)


def test_a_profile_accounts_for_the_whole_step() -> None:
    """Catches time that is in two categories, and Python that is in none."""
    x = torch.randn(64, 64)

    def step() -> None:
        x @ x
        time.sleep(0.02)

    found = profile_step(step, cuda=False)
    assert 0.015 < found.rest_seconds < found.profiled_seconds
    assert found.seconds["products"] > 0
    assert sum(found.seconds.values()) + found.rest_seconds == pytest.approx(found.profiled_seconds)
    assert (found.busy_seconds, found.kernels, found.to_host) == (None, 0, 0)


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors alive.

    What an operation asks of a fake number is answered with one that is fine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if arguments[0].is_floating_point() else 0
        out = function(*arguments, **(keywords or {}))

        for tensor in tree_leaves(out):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage()._cdata not in self.alive
            ):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata)

        self.peak = max(self.peak, self.now)
        return out

    def gone(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


@pytest.mark.parametrize(
    *lanes("recompute", ["none", "selective", "full"], lambda policy: policy == "selective")
)
def test_a_step_of_k2s_layers_takes_what_is_planned(recompute: str) -> None:
    """Catches a plan that misses what a step holds, at the size where 3 % are gigabytes: tensors
    without memory.
    """
    full = sizes(False)
    shape, batch = replace(full.k2, num_layers=2), full.k2_batches[0]
    # As on a GPU: some CPUs multiply bf16 upcast.
    kernels = {"attention": "flash", "recompute": recompute, "matmul": "torch"}

    with world_of_one(bench_of(io.StringIO())) as grid, FakeTensorMode(), Held() as held:
        engine = engine_of(config_of(shape, batch, 1, kernels, "bf16"), grid, fill=False)
        states, plan = held.now, planned(engine)
        held.peak = 0  # what building took for a moment is no step's
        engine.train_step(
            [MicroBatch(torch.zeros(batch.sequences, batch.length_tokens, dtype=torch.long))], 1e-4
        )

    assert states == pytest.approx(plan.state.total_bytes, rel=0.001)
    assert held.peak == pytest.approx(plan.total_bytes, rel=0.01)
    assert plan.total_bytes - plan.state.total_bytes > 2**31
