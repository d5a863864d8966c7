"""`tools/gpu_check.py`: verdicts and exit codes, and that each check finds what it is there for.

The dry run goes through all parts as on a GPU, on the CPU with tiny sizes.
"""

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.command_line import HANG_SECONDS, load_tool, soon

tool = load_tool("gpu_check")

from benchmarks.gpu import aims, runner  # noqa: E402
from benchmarks.gpu import main as bench_main  # noqa: E402
from benchmarks.gpu.bench import Bench  # noqa: E402
from benchmarks.gpu.processes import run_to_end  # noqa: E402
from benchmarks.gpu.sizes import Batch  # noqa: E402
from benchmarks.gpu.timing import Timing  # noqa: E402
from gpu_checks import (  # noqa: E402
    compiled_anew,
    numerics,
    part_checkpoint,
    part_determinism,
    part_environment,
    part_kernels,
    part_nccl,
    part_parity,
    part_price,
    part_ranks,
    part_recompute,
    part_trainer,
    runs,
)
from gpu_checks.catalogue import CATALOGUE  # noqa: E402
from gpu_checks.numerics import DifferentError, Trace  # noqa: E402
from gpu_checks.page import page  # noqa: E402
from gpu_checks.results import read_result, result_of, write_result  # noqa: E402
from k2train.errors import EXIT_INTERRUPTED, RunError  # noqa: E402
from k2train.hf import names as llama_names  # noqa: E402
from k2train.model.kernels import choose_attention, select  # noqa: E402
from k2train.processes import descendants, live_processes  # noqa: E402
from k2train.record.events import Starting  # noqa: E402
from k2train.record.ledger import Ledger  # noqa: E402

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
PARTS = tuple(CATALOGUE.values())
TRACE = Trace((2.0, 1.0), (3.0, 4.0), "root", {"w": torch.tensor([1.0, -4.0])}, "kernels")


def row(part: str, status: str = "ok", what: str = "x", why: str = "", **figures: Any) -> Row:
    return {"part": part, "what": what, "status": status, "why": why, **figures}


def bench_of(folder: Path | None = None, seconds: float = 300.0) -> tuple[Bench, io.StringIO]:
    stream = io.StringIO()
    deadline = time.monotonic() + seconds
    bench = Bench("part", torch.device("cpu"), True, deadline, stream, folder or Path())
    return bench, stream


def rows_in(stream: io.StringIO) -> dict[str, Row]:
    rows = [json.loads(line) for line in stream.getvalue().splitlines()]
    return {found["what"]: found for found in rows if found["status"] != "begun"}


# --- verdicts ---


@pytest.mark.parametrize(
    ("rows", "verdict", "why"),
    [
        ([row("nccl"), row("nccl", "unavailable", "y", "no device to itself")], "held", ""),
        ([row("nccl"), row("nccl", "failed", "y", "died")], "failed", "y: died"),
        ([row("nccl"), row("nccl", "out of memory", "y", "full")], "failed", "y: full"),
        ([row("nccl"), row("nccl", "skipped", "y", "0 s left")], "not run", "y: 0 s left"),
        ([row("nccl", "unavailable", "y", "none here")], "not run", "y: none here"),
        ([], "not run", "the check ended before it"),
        (
            [row("nccl", "skipped", "a", "b"), row("nccl", "failed", "y", "died")],
            "failed",
            "y: died",
        ),
        (
            [row("nccl", "failed", "y", "died"), row("nccl", "failed", "z", "too")],
            "failed",
            "y: died (and 1 more)",
        ),
    ],
)
def test_a_part_holds_only_if_all_of_it_ran(rows: list[Row], verdict: str, why: str) -> None:
    """Catches a part that is called held because nothing of it ran, or because its failure is
    one row among many.
    """
    result = result_of([CATALOGUE["nccl"]], rows, False, 1.0)
    assert [(part.verdict, part.why) for part in result.parts] == [(verdict, why)]
    assert result.held == (verdict == "held")


def test_a_missed_aim_is_a_failed_part() -> None:
    """Catches a slow device that passes, an aim without a figure that counts as met, and a dry run
    that is judged by figures of tiny sizes.
    """
    slow = [row("host", busy_share=0.5, what="K2")]
    part = [CATALOGUE["host"]]
    found = result_of(part, slow, False, 1.0)
    (verdict,) = found.parts
    assert verdict.verdict == "failed" and not found.held
    assert verdict.why == "K2: device busy: 0.500, wanted >= 0.97"
    (verdict,) = result_of(part, [row("host")], False, 1.0).parts
    assert (verdict.verdict, verdict.why) == ("not run", "device busy: no figure")
    assert result_of(part, slow, True, 1.0).held
    assert result_of(part, [row("host", busy_share=0.98)], False, 1.0).held


def test_no_parts_hold_nothing() -> None:
    assert not result_of([], [], False, 1.0).held


def test_the_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Catches a field that is not written, and a file of another format that is taken."""
    rows = [row("environment", facts={"device": "H100", "commit": "abc"}), row("nccl", "failed")]
    written = result_of(PARTS[:9], rows, False, 12.34)
    path = tmp_path / "result.json"
    write_result(written, path)
    assert read_result(path) == written
    assert written.device == {"device": "H100", "commit": "abc"} and written.seconds == 12.3

    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, "format": 2}))
    with pytest.raises(RunError, match="format 2, this version reads 1"):
        read_result(path)
    for text in ("[]", "{", json.dumps({"format": 1})):
        path.write_text(text)
        with pytest.raises(RunError, match="not the result of a GPU check"):
            read_result(path)


def test_the_page_names_what_failed_before_any_figure() -> None:
    """Catches a page on which only what went well can be seen, and a reason that breaks the
    table.
    """
    rows = [
        row("environment", facts={"device": "H100|x", "commit": "abc"}),
        row("parity", loss_distance=1.5e-6, gradient_distance=2e-5, what="fp32 = the CPU"),
        row("nccl", "failed", "all-reduce", "line one\nline | two " + "x" * 300),
    ]
    text = page(result_of(PARTS, rows, False, 12.0))
    assert text.startswith("## Check of H100|x, commit abc\n")
    assert f"2 of {len(PARTS)} parts ran and held" in text
    line = next(line for line in text.splitlines() if line.startswith("| nccl |"))
    assert "**failed**" in line and "line one" in line and len(line) < 400
    assert text.index("**failed**") < text.index("### Aims") < text.index("1.5e-06")
    assert "| parity | fp32 = the CPU | loss distance 1.5e-06, gradient distance 2.0e-05 |" in text
    assert "no figure means anything" not in text
    assert "no figure means anything" in page(result_of(PARTS, rows, True, 12.0))


def test_correctness_comes_before_speed() -> None:
    """Catches a check that runs out of time with figures of a device that computes wrongly."""
    names = list(CATALOGUE)
    assert names[0] == "environment"
    assert names.index("ranks") < names.index("device") < names.index("layers")
    assert all(part.least_seconds <= part.seconds for part in PARTS)


# --- the command ---


def stand_in(monkeypatch: pytest.MonkeyPatch, status: Mapping[str, str]) -> None:
    def command(part: runner.Part, given: runner.Given, seconds: float) -> list[str]:
        text = json.dumps(row(part.name, status.get(part.name, "ok"), why="because"))
        path = str(runner.rows_file(given, part))
        return [sys.executable, "-c", f"open({path!r}, 'w').write({text!r})"]

    monkeypatch.setattr(runner, "part_command", command)


@pytest.mark.parametrize(
    ("status", "code"),
    [({}, 0), ({"nccl": "failed"}, 1), ({"nccl": "skipped"}, 1), ({"nccl": "unavailable"}, 1)],
)
def test_the_exit_code_is_0_only_if_all_held(
    status: dict[str, str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a check whose failure nobody notices in a script."""
    stand_in(monkeypatch, status)
    arguments = ["--dry-run", "--folder", str(tmp_path), "--only", "recompute", "nccl"]
    assert tool.main(arguments) == code
    output = capsys.readouterr()
    result = read_result(tmp_path / "result.json")
    assert [part.part for part in result.parts] == ["recompute", "nccl"]
    assert (tmp_path / "page.md").read_text() == output.out
    assert ("gpu_check: nccl" in output.err) == bool(code)


def test_no_device_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches fourteen parts that each look for a device that is not there."""
    stand_in(monkeypatch, {"environment": "no device"})
    assert tool.main(["--folder", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.splitlines()[-1] == "gpu_check: because"
    assert not (tmp_path / "result.json").exists()


def test_a_check_that_is_ended_early_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches minutes on a device that leave no page, the page of an earlier check that passes for
    this one's, and folders of a user's that are removed with the check's own.
    """

    def interrupted(part: runner.Part, given: runner.Given, seconds: float) -> list[Row]:
        assert (tmp_path / runner.SCRATCH).is_dir()
        if part.name == "parity":
            raise KeyboardInterrupt
        assert not (tmp_path / "page.md").exists(), "the page of an earlier check"
        return [row(part.name)]

    for name in ("work", "cache", runner.SCRATCH):
        (tmp_path / name).mkdir()
    for name in ("result.json", "page.md"):
        (tmp_path / name).write_text("of an earlier check")
    monkeypatch.setattr(runner, "run_part", interrupted)
    assert tool.main(["--dry-run", "--folder", str(tmp_path)]) == EXIT_INTERRUPTED

    verdicts = {part.part: part.verdict for part in read_result(tmp_path / "result.json").parts}
    assert verdicts == {**dict.fromkeys(CATALOGUE, "not run"), "environment": "held"}
    assert f"1 of {len(PARTS)} parts ran and held" in (tmp_path / "page.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"work", "cache", "result.json", "page.md"}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_check_and_its_parts(name: str, tmp_path: Path) -> None:
    """Catches a part that goes on on the device after the check, also at the end of a terminal."""
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--dry-run"]
    command += ["--only", "recompute", "--folder", str(tmp_path)]
    # Under nohup these tests ignore SIGHUP, and hand that on.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    check = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGHUP, before)
    rows, parts = tmp_path / "rows_recompute.jsonl", list[int]()
    try:
        assert soon(lambda: rows.exists() and "begun" in rows.read_text()), check.poll()
        parts = descendants([check.pid])
        check.send_signal(signal.Signals[name])
        _, error = check.communicate(timeout=HANG_SECONDS)
    finally:
        check.kill()
    assert check.returncode == 1 and error.splitlines()[-1] == f"gpu_check: ended by {name}"
    assert parts and soon(lambda: not {*parts} & {*live_processes()})


def test_a_folder_that_cannot_be_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert tool.main(["--dry-run", "--folder", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"--folder ({folder}): nothing can") and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "x"


def test_what_has_no_time_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches parts that vanish from the page because the time was over."""
    clock = [0.0]

    def fake(part: runner.Part, given: runner.Given, seconds: float) -> list[Row]:
        clock[0] += part.seconds
        return [row(part.name)]

    monkeypatch.setattr(runner, "run_part", fake)
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock[0])
    rows = runner.run_parts(runner.Given(tmp_path, PARTS, 330.0, False), log=lambda text: None)
    verdicts = {part.part: part.verdict for part in result_of(PARTS, rows, True, 1.0).parts}
    done = [name for name, verdict in verdicts.items() if verdict == "held"]
    assert done == list(CATALOGUE)[: len(done)] and 4 <= len(done) < len(PARTS)
    assert {verdicts[name] for name in list(CATALOGUE)[len(done) :]} == {"not run"}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--minutes", "0"], "must be a number above 0"),
        (["--minutes", "soon"], "must be a number above 0"),
        (["--minutes", "nan"], "must be a number above 0"),
        (["--only", "speed"], "invalid choice: 'speed'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        tool.main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and word in error and error.count("\n") == 1


def test_the_list_names_all_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CATALOGUE)


def test_the_documents_say_what_each_part_proves() -> None:
    """Catches a part that is not explained, and an aim that is another one there."""
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")] == [
        *CATALOGUE
    ]
    for model, share in aims.MFU.items():
        assert f"{share * 100:.0f} % ({model.removeprefix('LLaMA ')}" in text
    assert all(f"{share:.2f}" in text for share in aims.LAYERS.values())


# --- each check finds what it is there for ---


def test_distances_are_those_of_the_farthest_value() -> None:
    """Catches a mean in which one wrong gradient vanishes, and NaN that passes as near."""
    other = Trace((2.0, 1.1), (3.0, 4.0), "r", {"w": torch.tensor([1.0, -3.0])}, "k")
    found = numerics.distance(other, TRACE)
    assert found.loss == pytest.approx(0.1) and found.gradient == pytest.approx(0.25)
    assert numerics.hold_within(found, 0.11, 0.26)["gradient_distance"] == found.gradient
    with pytest.raises(DifferentError, match=r"gradients 2.50e-01 \(bound 1e-01, in w\)"):
        numerics.hold_within(found, 1.0, 0.1)

    broken = Trace((2.0, 1.0), (3.0, 4.0), "r", {"w": torch.tensor([1.0, torch.nan])}, "k")
    with pytest.raises(DifferentError):
        numerics.hold_within(numerics.distance(broken, TRACE), 1e9, 1e9)
    # Beside a tensor that is right, and in any order of the two.
    with pytest.raises(DifferentError, match="in w"):
        right = {"v": torch.ones(1), "w": TRACE.gradients["w"], "x": torch.ones(1)}
        nan = numerics.farthest(right | {"w": broken.gradients["w"]}, right)
        numerics.hold_within(numerics.Distance(0.0, *nan), 1e9, 1e9)
    lost = Trace((float("nan"), 1.0), (3.0, 4.0), "r", {"w": TRACE.gradients["w"]}, "k")
    with pytest.raises(DifferentError):
        numerics.hold_within(numerics.distance(lost, TRACE), 1e9, 1e9)
    missing = Trace((2.0, 1.0), (3.0, 4.0), "r", {}, "k")
    with pytest.raises(DifferentError, match="tensors differ"):
        numerics.distance(missing, TRACE)


def test_parity_holds_against_independent_code() -> None:
    """Catches a mapping of names that compares a tensor with itself only: one weight changed in
    k2train must be found.
    """
    bench, stream = bench_of()
    work = numerics.small(True)
    with part_parity.world_of_one(bench):
        bench.attempt("right", lambda: part_parity.independent(bench, work))
        with pytest.MonkeyPatch.context() as patch:
            wrong = dict(llama_names.LAYER_PARTS)
            wrong["attention.query"], wrong["attention.key"] = (
                wrong["attention.key"],
                wrong["attention.query"],
            )
            patch.setattr(llama_names, "LAYER_PARTS", wrong)
            bench.attempt("queries are keys", lambda: part_parity.independent(bench, work))
    rows = rows_in(stream)
    assert rows["right"]["status"] == "ok" and rows["right"]["code"].startswith("transformers ")
    assert rows["right"]["gradient_distance"] < 1e-5
    assert rows["queries are keys"]["status"] == "failed"


def test_parity_works_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bare machine on which nothing independent is compared."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "benchmarks.cpu.hugging_face", raising=False)
    bench, stream = bench_of()
    with part_parity.world_of_one(bench):
        bench.attempt("x", lambda: part_parity.independent(bench, numerics.small(True)))
    found = rows_in(stream)["x"]
    assert (found["status"], found["code"]) == ("ok", "a LLaMA written by hand")


def wrong_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
    return select.sdpa_attention(q, k, v, mask) * 1.5


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check of kernels that compares names, or losses only of a model that hardly
    listens to its attention.
    """
    monkeypatch.setitem(select.ATTENTION, "flash", wrong_attention)
    monkeypatch.setattr(
        part_kernels, "choices", lambda: [("attention", "flash"), ("attention", "sdpa")]
    )
    bench, stream = bench_of()
    part_kernels.run(bench)
    status = {what: found["status"] for what, found in rows_in(stream).items()}
    assert status == {
        "bf16, references": "ok",
        "bf16, attention flash": "failed",
        "bf16, attention sdpa": "ok",
        "fp32, references": "ok",
        "fp32, attention flash": "failed",
        "fp32, attention sdpa": "ok",
        "bf16, documents, references": "ok",
        "bf16, documents, attention auto": "ok",
        "bf16, documents, attention sdpa": "ok",
        "bf16, documents, attention flash": "failed",
        **{f"bf16, documents, attention flash_attn_{n}": "unavailable" for n in (2, 3, 4)},
    }


def test_a_kernel_that_looks_over_borders_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows of one document each, in which no kernel can be wrong about borders."""
    monkeypatch.setattr(
        choose_attention, "packed", lambda kernel: lambda q, k, v, documents: kernel(q, k, v, None)
    )
    monkeypatch.setattr(part_kernels, "WITHIN", ("auto", "sdpa"))
    bench, stream = bench_of()
    with part_kernels.world_of_one(bench):
        part_kernels.within_documents(bench)
    status = [found["status"] for found in rows_in(stream).values()]
    assert status == ["ok", "failed", "failed"]


def test_every_choice_of_the_config_is_checked() -> None:
    """Catches a kernel that is added to the config and never compared on a device."""
    found = set(part_kernels.choices())
    assert found >= {("attention", "cudnn"), ("norm", "fused"), ("matmul", "fp8")}
    assert ("compile", "on") in found and ("loss", "fused") in found
    assert not any(value in ("auto", "reference") or key == "recompute" for key, value in found)


def test_different_bits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check of determinism that looks at losses, or at the first two runs only."""
    count = [0]

    def unsteady(*arguments: Any, **keywords: Any) -> Trace:
        count[0] += 1
        root = f"root {count[0] % 3 == 0}" if keywords.get("attention") == "flash" else "root"
        return Trace(TRACE.losses, TRACE.norms, root, TRACE.gradients, "k")

    monkeypatch.setattr(part_determinism, "trace", unsteady)
    monkeypatch.setattr(part_determinism, "root_compiled_anew", lambda bench: "other root")
    bench, stream = bench_of()
    part_determinism.run(bench)
    rows = rows_in(stream)
    assert rows["kernels auto"]["status"] == rows["attention sdpa"]["status"] == "ok"
    assert rows["another process, compiled anew"]["status"] == "failed"
    assert rows["attention flash"]["status"] == "failed"
    assert "2 different states of 3 equal runs" in rows["attention flash"]["why"]
    assert rows["hash on the device = hash on the CPU"]["status"] == "ok"


def test_another_process_compiles_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second process that reads what the first one compiled, or computes something else,
    and an error of it that passes for a hash.
    """
    bench, _ = bench_of(tmp_path)
    given: list[Sequence[str]] = []

    def seen(command: Sequence[str], log: Path, seconds: float) -> int | None:
        given.append(command)
        return run_to_end(command, log, seconds)

    monkeypatch.setattr(compiled_anew, "run_to_end", seen)
    with part_determinism.world_of_one(bench):
        mine = numerics.trace(bench.device, numerics.small(True), "bf16").root
    assert compiled_anew.root_compiled_anew(bench) == mine
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        (value,) = [one for one in given[0] if one.startswith(f"{name}=")]
        folder = Path(value.partition("=")[2])
        assert folder.is_relative_to(tmp_path) and not folder.exists()
    monkeypatch.setattr(compiled_anew, "MODULE", "gpu_checks.nothing")
    with pytest.raises(numerics.DifferentError, match=r"ended with 1: .*No module named"):
        compiled_anew.root_compiled_anew(bench)


def test_other_bits_of_a_recomputation_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a policy that is compared with itself."""

    def changed(*arguments: Any, recompute: str = "none", **keywords: Any) -> Trace:
        root = "other" if recompute == "full" else "root"
        return Trace(TRACE.losses, TRACE.norms, root, TRACE.gradients, "k")

    monkeypatch.setattr(part_recompute, "trace", changed)
    bench, stream = bench_of()
    part_recompute.run(bench)
    status = {what: found["status"] for what, found in rows_in(stream).items()}
    assert status == {
        "recompute none": "ok",
        "recompute selective = none": "ok",
        "recompute full = none": "failed",
    }


def test_a_collective_that_changes_a_value_is_found() -> None:
    """Catches a check of NCCL that only sees that a call returned."""

    def damaged(x: torch.Tensor, group: Any) -> torch.Tensor:
        x[7] += 1
        return x

    bench, _ = bench_of()
    with pytest.raises(DifferentError, match="1 of 4096 values changed"):
        part_nccl.held(bench, damaged, None, torch.bfloat16)
    same = part_nccl.held(bench, lambda x, group: x, None, torch.int64)
    assert same == {"values": 4096}


def test_a_wrong_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a first kernel whose result nobody looks at."""
    bench, _ = bench_of()
    assert part_environment.exact_product(bench)["values"] == 256 * 256
    assert part_environment.first_kernel(bench)["first_seconds"] >= 0
    product = torch.Tensor.__matmul__

    def wrong(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = product(a, b)
        return out + 1 if out.dtype == torch.bfloat16 else out

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    with pytest.raises(DifferentError, match="values of an exact product are wrong"):
        part_environment.exact_product(bench)


def test_a_run_that_ends_otherwise_is_found(tmp_path: Path) -> None:
    """Catches a training that failed and passes for one that stopped; its last line is the
    reason.
    """
    bench, _ = bench_of(tmp_path)
    made = runs.Runs(bench, "fp32")
    with pytest.raises(DifferentError, match=r"exit code 2 instead of 75: .*lr\.peek"):
        made.train("x", 2, "lr.peek=1")
    late, _ = bench_of(tmp_path, seconds=0.0)
    made._bench = late
    with pytest.raises(runs.OutOfTimeError):
        made.train("x", 2)


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("found", [False, True])
def test_a_run_on_another_device_is_found(
    on_cpu: bool, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a way from CUDA to a CPU and back that never leaves the device or was never there."""
    bench, _ = bench_of(tmp_path)
    made = runs.Runs(replace(bench, device=torch.device("cuda")), "bf16")
    commands: list[Sequence[str]] = []

    def started(command: Sequence[str], wanted: int) -> None:
        commands.append(command)
        made.path("x").mkdir(parents=True)
        ledger = Ledger(made.path("x") / "ledger.jsonl")
        ledger.append(Starting(attempt=1, step=0, settings={} if found else None))

    monkeypatch.setattr(made, "_run", started)
    if found != on_cpu:
        made.train("x", 2, on_cpu=on_cpu)
    else:
        with pytest.raises(DifferentError, match=r"run x was to compute on .*, and did on "):
            made.train("x", 2, on_cpu=on_cpu)
    assert ("CUDA_VISIBLE_DEVICES=" in commands[0]) == on_cpu


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, module: Any) -> tuple[Bench, io.StringIO]:
    """A bench of a device that is not there, for a part whose computations are stood in for."""
    bench, stream = bench_of()
    monkeypatch.setattr(module, "world_of_one", lambda bench: nullcontext(), raising=False)
    return replace(bench, device=torch.device("cuda")), stream


def test_parity_is_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a device that is compared with itself."""
    bench, stream = on_a_gpu(monkeypatch, part_parity)
    wrong = Trace((9.0, 9.0), TRACE.norms, "root", TRACE.gradients, "k")
    monkeypatch.setattr(part_parity, "independent", lambda bench, work: {})
    monkeypatch.setattr(
        part_parity,
        "trace",
        lambda device, *_, **kernels: wrong if device.type == "cuda" else TRACE,
    )
    part_parity.run(bench)
    status = {what: found["status"] for what, found in rows_in(stream).items()}
    right = {"the CPU, fp32", "independent code, fp32"}
    assert len(status) == 6 and {what for what in status if status[what] == "ok"} == right


def test_the_hash_is_computed_on_both_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a hash that is compared with itself."""
    for name in ("build_engine", "trace_of"):
        monkeypatch.setattr(part_determinism, name, lambda *_: None)
    monkeypatch.setattr(part_determinism, "root_of", lambda *_, on_host=False: str(on_host))
    with pytest.raises(DifferentError, match="2 different states of 2 devices"):
        part_determinism.digests(bench_of()[0])


def test_the_price_is_that_of_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two engines of one kind, whose price is nothing, and a price of the wrong one."""
    seconds = {True: 1.5, False: 1.0}

    class Turns:
        def __init__(self, bench: Bench) -> None: ...

        def in_turns(self, works: Sequence[Any], rounds: int) -> list[Timing]:
            took = [seconds[work.args[0].kernels] for work in works]
            return [Timing(one, one, one, 1) for one in took]

    monkeypatch.setattr(
        part_price, "make_engine", lambda *given: SimpleNamespace(kernels=given[4]["deterministic"])
    )
    monkeypatch.setattr(part_price, "token_ids", lambda *_: [])
    monkeypatch.setattr(part_price, "Timer", Turns)
    found = part_price.price(bench_of()[0], None, Batch(16, 2))
    assert (found["price"], found["kernels"]) == (0.5, "True | False")


class StandInRuns:
    """Runs of which only the record is left, as `Runs`."""

    losses_of: Mapping[str, list[float]] = {}

    def __init__(self, bench: Bench, precision: str):
        self.started: list[tuple[Any, ...]] = []
        made.append(self)

    def steps(self, count: int) -> int:
        return count

    def path(self, name: str) -> Path:
        return Path(name)

    def train(self, name: str, steps: int, *overrides: str, **how: Any) -> None:
        self.started.append((name, steps, *overrides, *how.items()))

    def tool(self, name: str, *arguments: str) -> None:
        self.started.append((name, *arguments))

    def losses(self, name: str) -> list[float]:
        return self.losses_of[name]


made: list[StandInRuns] = []


@pytest.mark.parametrize(
    ("losses", "status"),
    [
        ({"stopped": [1.0] * 18, "whole": [1.0] * 18}, "ok"),
        ({"stopped": [1.0] * 17, "whole": [1.0] * 17}, "failed"),
        ({"stopped": [1.0] * 18, "whole": [1.0] * 17 + [2.0]}, "failed"),
    ],
)
def test_a_resume_is_compared_with_a_run_that_never_stopped(
    losses: dict[str, list[float]], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that was never resumed, or that is compared with itself."""
    monkeypatch.setattr(StandInRuns, "losses_of", losses)
    monkeypatch.setattr(part_trainer, "Runs", StandInRuns)
    bench, stream = on_a_gpu(monkeypatch, part_trainer)
    part_trainer.run(bench)
    assert made[-1].started == [
        ("stopped", 12),
        ("stopped", 6),
        ("whole", 18),
        ("compare_runs", "stopped", "whole"),
    ]
    assert rows_in(stream)["the same bits"]["status"] == status


def test_a_checkpoint_goes_to_the_cpu_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a way to a CPU that stays on the device, and checkpoints that nobody verifies."""
    monkeypatch.setattr(StandInRuns, "losses_of", {"moved": [1.0] * 4})
    monkeypatch.setattr(part_checkpoint, "Runs", StandInRuns)
    bench, stream = on_a_gpu(monkeypatch, part_checkpoint)
    part_checkpoint.run(bench)
    assert rows_in(stream)["the same run on a CPU"]["why"].endswith(
        "4 steps on record, 6 were asked for"
    )

    monkeypatch.setattr(
        StandInRuns, "losses", lambda runs, name: [1.0] * (2 + 2 * len(runs.started))
    )
    part_checkpoint.run(bench)
    assert made[-1].started == [
        ("moved", 4, ("on_cpu", False)),
        ("moved", 2, ("on_cpu", True)),
        ("moved", 2, ("on_cpu", False)),
        ("verify_checkpoint", "--root", "moved"),
    ]


@pytest.mark.parametrize(
    ("together", "world", "status"),
    [(1.0001, 4, "ok"), (1.0003, 4, "failed"), (1.0, 1, "failed"), (float("nan"), 4, "failed")],
)
def test_ranks_are_compared_with_one(
    together: float, world: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches ranks that never met, and a run that is compared with itself."""
    (tmp_path / "ledger.jsonl").write_text(json.dumps({"world_size": world}))
    losses = {"alone": [1.0], "together": [together]}
    monkeypatch.setattr(StandInRuns, "losses_of", losses)
    monkeypatch.setattr(StandInRuns, "path", lambda runs, name: tmp_path)
    monkeypatch.setattr(part_ranks, "Runs", StandInRuns)
    bench, stream = on_a_gpu(monkeypatch, part_ranks)
    part_ranks.run(replace(bench, dry=False))
    assert made[-1].started[1][2:] == (
        "parallel.tensor=2",
        ("processes", 4),
        ("variables", {"K2TRAIN_RANKS_PER_DEVICE": "4"}),
    )
    assert rows_in(stream)["4 ranks, tensor 2, on one device"]["status"] == status


@pytest.fixture(scope="module")
def dry(
    bench_gpu_dry: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """(folder, exit code) of one dry run of everything.

    `layers` and `host` are the benchmark's, and its dry run has just run them: by the same command,
    but for the time that is left and the folder. Their rows are taken from there.
    """
    folder, run_part = tmp_path_factory.mktemp("check"), runner.run_part
    theirs = runner.Given(bench_gpu_dry[0], (), 0, True)

    def run_once(part: runner.Part, given: runner.Given, seconds: float) -> list[Row]:
        if part.name not in ("layers", "host"):
            return run_part(part, given, seconds)
        command = runner.part_command(part, given, 1.0)
        there = runner.part_command(bench_main.PARTS[part.name], theirs, 1.0)
        assert [one.replace(str(folder), str(theirs.folder)) for one in command] == there
        return runner.read_rows(runner.rows_file(theirs, part))[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_part", run_once)
        code = tool.main(["--dry-run", "--folder", str(folder), "--minutes", "60"])
    return folder, code


@pytest.mark.slow
def test_a_dry_run_goes_through_every_part(dry: tuple[Path, int]) -> None:
    """Catches a part that no longer fits the library: it would fail on a GPU that is paid by the
    minute.
    """
    folder, code = dry
    result = read_result(folder / "result.json")
    verdicts = {part.part: part.verdict for part in result.parts}
    assert verdicts == dict.fromkeys(CATALOGUE, "held")
    assert code == 0 and result.held
    bad = [found for found in result.rows if found["status"] not in ("ok", "unavailable")]
    assert bad == []


@pytest.mark.slow
def test_a_dry_run_leaves_results_and_nothing_else(dry: tuple[Path, int]) -> None:
    """Catches checkpoints and caches that fill a disk, and figures that are only on the screen."""
    folder, _ = dry
    names = {path.name for path in folder.iterdir()}
    assert names >= {"result.json", "page.md"}
    assert {name.split("_")[0] for name in names} <= {"result.json", "page.md", "rows", "log"}
    text = (folder / "page.md").read_text()
    assert "no figure means anything" in text and "### Aims" not in text
    order = ["**held**", "### Device and software", "### Numbers compared", "### K2's layers"]
    assert [text.index(word) for word in order] == sorted(text.index(word) for word in order)
    rows = {
        (found["part"], found["what"]): found for found in read_result(folder / "result.json").rows
    }
    assert rows["trainer", "the same bits"]["steps"] == 6
    assert rows["ranks", "2 ranks, tensor 2, on one device"]["loss_distance"] < 2e-4
