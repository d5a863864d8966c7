"""`tools/bench.py gpu`: the time budget, failures as rows, and the tables made from rows.

The dry run goes through the parts as on a GPU, on the CPU with tiny sizes: its figures mean
nothing.
"""

import io
import json
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

from tests.support.command_line import load_tool

tool = load_tool("bench")

from benchmarks.cpu.contract import UnavailableError  # noqa: E402
from benchmarks.gpu import main as main_module  # noqa: E402
from benchmarks.gpu import report  # noqa: E402
from benchmarks.gpu.bench import Bench, OutOfTimeError  # noqa: E402
from benchmarks.gpu.engines import config_of, world_of_one  # noqa: E402
from benchmarks.gpu.main import Given, read_rows, run_part, run_parts  # noqa: E402
from benchmarks.gpu.memory import planned  # noqa: E402
from benchmarks.gpu.part_layers import Case, rates  # noqa: E402
from benchmarks.gpu.profiling import STEP, _union, by_category, profile_step, scopes  # noqa: E402
from benchmarks.gpu.sizes import Batch, sizes  # noqa: E402
from benchmarks.gpu.timing import Timer, summary  # noqa: E402
from k2train.data.loader import MicroBatch  # noqa: E402
from k2train.plan.cost import ModelShape, flops_per_token, parameters  # noqa: E402
from tests.support.lanes import lanes  # noqa: E402
from tests.support.tiny_model import engine_of  # noqa: E402

Row = dict[str, Any]


def bench_of(stream: io.StringIO, seconds: float = 60.0) -> Bench:
    return Bench("part", torch.device("cpu"), True, time.monotonic() + seconds, stream)


def rows_in(stream: io.StringIO) -> list[Row]:
    rows = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [row for row in rows if row["status"] != "begun"]


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder, table) of one dry run of everything."""
    folder = tmp_path_factory.mktemp("gpu") / "out"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        code = tool.main(["gpu", "--dry-run", "--folder", str(folder), "--minutes", "8"])
    assert code == 0
    return folder, printed.getvalue()


@pytest.mark.slow
def test_a_dry_run_goes_through_every_part(dry: tuple[Path, str]) -> None:
    """Catches a part that no longer fits the library: it would be a failed row on a GPU that is
    paid by the minute.
    """
    rows = json.loads((dry[0] / "result.json").read_text())["rows"]
    assert [row for row in rows if row["status"] not in ("ok", "skipped")] == []
    done = {
        row["part"]: [r["what"] for r in rows if r["part"] == row["part"] and r["status"] == "ok"]
        for row in rows
    }
    assert list(done) == list(main_module.PARTS)
    assert {name.split(": ", 1)[1] for name in done["layers"]} >= {
        "auto",
        "recompute: full",
        "loss: reference",
    }
    assert len([name for name in done["host"] if "micro-batch" in name]) == 4
    assert set(report.LAYER) | {report.HEAD} <= set(done["tp8"])


@pytest.mark.slow
def test_whole_models_are_compared_in_turns(dry: tuple[Path, str]) -> None:
    """Catches contenders that do not learn from the same work, and one that is timed while the
    others are cold.
    """
    rows = json.loads((dry[0] / "result.json").read_text())["rows"]
    measured = [row for row in rows if row["part"] == "models" and "step_seconds" in row]
    names = ["k2train", "transformers", "transformers compiled", "reference", "reference compiled"]
    assert [row["contender"] for row in measured] == names
    assert {row["in_turns"] for row in measured} == {5}
    assert all(
        4.5 < row["losses"][0] < 5.3 and row["losses"][-1] < row["losses"][0] for row in measured
    )


@pytest.mark.slow
def test_the_folder_holds_the_results_and_no_caches(dry: tuple[Path, str]) -> None:
    """Catches results that are only on the screen, and compiler caches left behind."""
    folder, printed = dry
    assert (folder / "table.md").read_text() == printed
    assert not (folder / "cache").exists()
    assert (
        printed.index("### Device") < printed.index("### K2's layers") < printed.index("### Aims")
    )
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
        (UnavailableError("apex cannot be imported"), "skipped"),
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


def given_of(folder: Path, seconds: float = 100.0) -> Given:
    return Given(folder, tuple(main_module.PARTS), seconds, True)


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
    program = f"cat '{tmp_path / 'text'}' >'{rows}'; exec sleep 600"
    monkeypatch.setattr(main_module, "part_command", lambda *_: ["sh", "-c", program])
    monkeypatch.setattr(main_module, "GRACE_SECONDS", 0.5)
    began = time.monotonic()
    found = run_part("layers", given_of(tmp_path), 1.5)
    assert time.monotonic() - began < 120, "it was waited for"
    assert [(row["what"], row["status"]) for row in found] == [("one", "ok"), ("two", "failed")]
    assert "ended after 2 s" in found[1]["why"]


def test_a_part_that_dies_says_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a dead part whose reason stands in a log that nobody opens."""
    program = "import sys; sys.exit('libcuda is too old')"
    monkeypatch.setattr(main_module, "part_command", lambda *_: [sys.executable, "-c", program])
    (row,) = run_part("device", given_of(tmp_path), 30)
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

    def fake(part: str, given: Given, seconds: float) -> list[Row]:
        asked[part] = seconds
        clock[0] += {"device": 1.0, "layers": 600.0}.get(part, seconds)
        return [{"part": part, "what": "x", "status": "ok", "why": ""}]

    monkeypatch.setattr(main_module, "run_part", fake)
    monkeypatch.setattr(main_module.time, "monotonic", lambda: clock[0])
    rows = run_parts(given_of(tmp_path, 580.0))
    weights, grace = main_module.PARTS, main_module.GRACE_SECONDS
    assert asked["device"] == pytest.approx(weights["device"] - grace)
    later = sum(weights.values()) - weights["device"]
    assert asked["layers"] == pytest.approx((580 - 1) * weights["layers"] / later - grace)
    assert [row["part"] for row in rows if row["status"] == "skipped"] == ["models", "tp8", "host"]


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


def test_aims_are_judged_by_the_rate_of_the_same_call() -> None:
    """Catches a share of a data sheet, or of another call's rate, and a missed aim that is called
    met.
    """
    device = {"part": "device", "status": "ok", "spread": 0.0}
    bad = {"part": "layers", "what": "bad", "status": "out of memory", "why": "full"}
    rows: list[Row] = [
        {**device, "what": "small", "flops_per_second": 50.0},
        {**device, "what": "large", "flops_per_second": 100.0},
        layers_row("auto", "2048 x 4", 70.0, 102),
        layers_row("compile: off", "2048 x 4", 80.0, 104),
        {**bad, "batch": "2048 x 4"},
    ]

    text = report.aims_text(rows)
    assert "auto: share of the matmul rate | 0.700 | >= 0.75 | missed" in text
    assert "compile: off: share of the matmul rate | 0.800 | >= 0.75 | met" in text
    assert "auto: peak / plan | 1.020 | 0.97 to 1.03 | met" in text
    assert "compile: off: peak / plan | 1.040 | 0.97 to 1.03 | missed" in text
    assert "| layers | bad | out of memory | full |" in report.markdown(rows, False, 1.0)


def test_models_are_compared_at_the_same_work_only() -> None:
    """Catches a ratio against a peer's time at another length."""

    def row(name: str, batch: str, rate: float) -> Row:
        figures = {"tokens_per_second": rate, "step_seconds": 1.0, "what": f"{batch} {name}"}
        work = {"part": "models", "model": "m", "batch": batch, "contender": name}
        return {**work, "status": "ok", **figures}

    rows = [
        row("k2train", "a", 12.0),
        row("transformers compiled", "a", 10.0),
        row("transformers compiled", "b", 1.0),
    ]
    assert "a k2train / transformers compiled | 1.200 | >= 1.15 | met" in report.aims_text(rows)
    assert report.against(rows[2], rows[2:], "reference compiled") is None


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
    assert [parameters(shape) // 10**7 for _, shape in full.models] == [134, 270]
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
    kernels = {"attention": "flash", "recompute": recompute}

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
