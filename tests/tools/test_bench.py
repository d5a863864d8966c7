"""`tools/bench.py cpu`: equal work, no processes left behind, and one line for a usage error.

Sizes are tiny, so the speeds mean nothing. Tested are the pairing of rounds, reports and leftovers.
"""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.cpu import against, contenders, results
from benchmarks.cpu.contenders import Contender, choose, find
from benchmarks.cpu.measure import peak_step_bytes
from benchmarks.cpu.processor import kind_text
from benchmarks.cpu.results import Row, other_work, rows_of, verdicts_of
from benchmarks.cpu.rounds import Plan, Sample, run_group
from benchmarks.cpu.work import Work, layers_of_stages, parse_work
from k2train.errors import RunError
from k2train.plan.schedule import pipeline_layout
from k2train.processes import start_ticks
from tests.support.command_line import HANG_SECONDS, load_tool, soon

tool = load_tool("bench")

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_heads": 4,
    "vocab_size": 256,
    "sequence_length": 16,
    "micro_sequences": 2,
    "global_sequences": 8,
}
SIZE_ARGUMENTS = ["--size", *(f"{name}={value}" for name, value in SIZES.items())]
TINY = Work(**SIZES)
GOOD_LOSSES = [math.log(TINY.vocab_size), math.log(TINY.vocab_size) - 0.1]

# Contenders that need no model: what they do is in the option.
FAKE = """
import os, sys, time
import torch.distributed as dist
from benchmarks.cpu.contract import Built, UnavailableError
def build(work, precision, options, rank, world):
    def tell():
        with open(options["pids"], "a") as stream:
            stream.write(f"{os.getpid()}\\n")
    tell()
    if world > 1:
        dist.barrier()  # so that no rank is ended before it told its number
    how = options["how"]
    if how == "missing":
        import a_package_that_nobody_has
    if how == "cannot":
        raise UnavailableError("needs a unicorn")
    if how == "raises on one rank":
        if rank == 1:
            raise RuntimeError("rank one is ill")
        dist.barrier()
    if how == "ends on one rank":
        if rank == 0:
            os._exit(4)
        dist.barrier()
    losses = iter(range(100))
    def step():
        n = next(losses)
        print("noise on standard output")
        if how == "hangs" and n == 1:
            tell()
            time.sleep(3600)
        if how == "crashes" and n == 1:
            sys.stderr.write("last words\\n")
            sys.stderr.flush()
            os._exit(3)
        return 5.545 - 0.01 * n
    return Built(step, work.parameters, how)
"""


FAULTS = [
    ("missing", "unavailable", "a_package_that_nobody_has is not installed"),
    ("cannot", "unavailable", "needs a unicorn"),
    ("raises on one rank", "failed", "RuntimeError: rank one is ill"),
    ("ends on one rank", "failed", "rank 0 ended with exit code 4"),
    ("crashes", "failed", "rank 0 ended with exit code 3: last words"),
    ("hangs", "failed", "no answer to 'run 1' within 10 s from rank [0]"),
]


def sample(
    seconds: list[float | None], name: str = "k2train", precision: str = "fp32", **changes: Any
) -> Sample:
    contender = dataclasses.replace(
        find(name) or Contender(name, "x"), precision=precision, group=f"g, {precision}"
    )
    made = Sample(contender, 2, list(seconds), list(GOOD_LOSSES), TINY.parameters)
    return dataclasses.replace(made, **changes)


def rows(*samples: Sample) -> list[Row]:
    return rows_of(samples, TINY)


# What is compared


def test_every_name_is_one_contender_and_every_aim_names_contenders() -> None:
    """Catches an aim that silently compares with nothing after a contender was renamed."""
    names = [c.name for c in contenders.CONTENDERS]
    assert len(set(names)) == len(names)
    assert set(contenders.QUICK) <= set(names)

    for aim in contenders.AIMS:
        assert aim.ours and aim.theirs
        assert {*aim.ours, *aim.theirs} <= set(names)
        groups = {
            c.group
            for c in contenders.CONTENDERS
            if c.name in {*aim.ours, *aim.theirs} - {"reference"}
        }
        assert len(groups) == 1, f"{aim}: never measured in turns"


def test_the_reference_leads_every_group_and_one_group_joins_the_precisions() -> None:
    """Catches ratios to a reference of other rounds, and bf16 numbers without a link to the fp32
    reference.
    """
    groups = choose(None, False, ("fp32", "bf16"))
    assert len({group[0].group for group in groups}) == len(groups) == 10
    for group in groups:
        assert [c.name for c in group].index("reference") == 0
        assert len({c.group for c in group}) == 1

    joined = [group for group in groups if len({c.precision for c in group}) == 2]
    assert [[(c.name, c.precision) for c in group[:2]] for group in joined] == [
        [("reference", "fp32"), ("reference", "bf16")]
    ]
    assert sorted(c.name for group in groups[:5] for c in group if c.name != "reference") == sorted(
        c.name for c in contenders.CONTENDERS if c.name != "reference"
    )


def test_peers_get_the_cut_that_k2train_gives_itself() -> None:
    """Catches a lead that is only a better cut, and layers that no stage or two stages have."""
    for schedule, several, counts in (
        ("1f1b", 1, [5, 3]),
        ("interleaved", 2, [3, 2, 2, 1]),
        ("zb-v", 2, [2, 3, 2, 1]),
    ):
        layout = pipeline_layout(schedule, 2, several)
        for balanced in (False, True):
            cut = layers_of_stages(Work(), layout, balanced)
            even = [8 // layout.num_stages] * layout.num_stages
            assert [len(layers) for layers in cut] == (counts if balanced else even)
            assert [layer for layers in cut for layer in layers] == list(range(8))

    # The same work as a config: what `auto` may take.
    keys = find("k2train-pp2-auto").options["parallel"]  # type: ignore[union-attr]
    assert keys["layers_per_stage"] == keys["schedule"] == "auto"
    even_peers = [c for c in contenders.CONTENDERS if c.module.endswith(".pipelining")]
    names = {c.name for c in even_peers}
    assert all(name.endswith("-balanced") or f"{name}-balanced" in names for name in names)


def test_quick_is_one_group_of_few() -> None:
    """Catches a quick run that starts everything, or that measures k2train's layouts apart from
    their peers.
    """
    (group,) = choose(None, True, ("fp32",))
    assert {c.name for c in group} == set(contenders.QUICK)


def test_a_variant_is_its_contender_with_other_keys() -> None:
    """Catches a variant that loses the layout it varies, or text where a list was meant."""
    made = contenders.variant(
        "uneven: k2train-pp2-1f1b parallel.layers_per_stage=[5,3] kernels.norm=torch"
    )
    assert made.options["parallel"] == {
        "pipeline": 2,
        "schedule": "1f1b",
        "stages_per_rank": 1,
        "layers_per_stage": [5, 3],
    }

    assert made.options["kernels"] == {"norm": "torch"}
    assert (made.name, made.world, made.group) == ("uneven", 2, "pipeline")
    assert made.name in [c.name for c in choose(["k2train"], True, ("fp32",), [made])[0]]
    assert find("k2train-pp2-1f1b").options["parallel"].get("layers_per_stage") is None  # type: ignore[union-attr]


def test_a_ratio_is_of_the_same_round() -> None:
    """Catches a ratio of two medians, where the machine was slower in some rounds, and a mean that
    one round decides.
    """
    ours, reference = (
        sample([1.0, 1.0, 3.0, 3.0, None]),
        sample([2.0, 2.0, 24.0, 6.0, 1.0], "reference"),
    )
    found = {row.name: row for row in rows(reference, ours)}
    ratio = found["k2train"].to_reference
    assert ratio is not None
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 8.0)
    assert found["k2train"].tokens_per_second == pytest.approx(TINY.tokens * (1 + 1 / 3) / 2)
    assert (found["k2train"].low, found["k2train"].high) == (TINY.tokens / 3, TINY.tokens)


def test_an_aim_takes_the_fastest_of_each_side() -> None:
    """Catches an aim met against a peer's slow schedule, or missed by our slow one."""
    measured = rows(
        sample([1.0], "reference"),
        sample([1.0], "pipelining-1f1b"),
        sample([0.9], "pipelining-zb"),
        sample([0.5], "k2train-pp2-1f1b", losses=[1.0, 0.9]),
        sample([0.8], "k2train-pp2-interleaved"),
        sample([0.7], "k2train-pp2-zb-h1"),
    )

    by_title = {v.title: v for v in verdicts_of(measured)}
    verdict = by_title["torch's pipelining"]
    assert (verdict.ours, verdict.theirs) == ("k2train-pp2-zb-h1", "pipelining-zb")
    assert verdict.measured.median == pytest.approx(0.9 / 0.7)
    assert verdict.met
    assert not dataclasses.replace(verdict, wanted=1.3).met
    assert set(by_title) == {"torch's pipelining", "the reference"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"parameters": TINY.parameters + 1}, "parameters"),
        ({"losses": [GOOD_LOSSES[0] * 1.03, 1.0]}, "first loss"),
        ({"losses": [GOOD_LOSSES[0], GOOD_LOSSES[0]]}, "did not fall"),
        ({"losses": [GOOD_LOSSES[0], math.nan]}, "not finite"),
        ({"losses": []}, "no loss"),
    ],
)
def test_who_does_other_work_is_told(changes: dict[str, Any], message: str | None) -> None:
    """Catches a contender that is fast because it trains another model, or does not train."""
    found = other_work(sample([1.0], **changes), TINY)
    assert (found is None) if message is None else (found is not None and message in found)


def test_bf16_is_also_told_in_fp32_references() -> None:
    """Catches a bf16 column without the fp32 yardstick, or one that divides the wrong way round."""
    joined = rows(
        sample([3.0], "reference"),
        sample([2.0], "reference", "bf16"),
        sample([1.0], "k2train", "bf16"),
    )
    joined = [dataclasses.replace(row, group="one process, bf16") for row in joined]
    assert results.joining_ratio(joined, "bf16") == 1.5
    text = tool.table.report(_facts(), joined, [])
    assert [cell.strip() for cell in text.splitlines()[-1].split("|")][6:8] == ["2.00", "3.00"]


def _facts() -> dict[str, Any]:
    return tool.table.to_json(TINY, Plan(), tool.machine_facts(), ("0" * 40, False), 1.0)


def test_peak_bytes_of_a_step_are_those_held_at_once() -> None:
    """Catches a sum of all allocations, and a peak that forgets what was freed within the step."""
    torch = pytest.importorskip("torch")

    def step() -> None:
        for _ in range(3):
            first = torch.ones(2**20)
            second = first + 1
            del first, second

    assert 8 * 2**20 <= peak_step_bytes(step) < 9 * 2**20


# Contenders as processes


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Sample], Path]]:
    """One group of contenders of which one is well, and the file of all their processes."""
    folder = tmp_path_factory.mktemp("fakes")
    (folder / "fake_contender.py").write_text(FAKE)
    pids = folder / "pids"

    def fake(how: str, world: int = 1) -> Contender:
        return Contender(how, "fake_contender", world, {"how": how, "pids": str(pids)})

    members = [fake(how, 1 + ("one rank" in how)) for how, _, _ in FAULTS]
    members.insert(0, fake("well", 2))

    plan = Plan(rounds=2, warmup_steps=1, measure=False, limit_seconds=10, extra_path=str(folder))
    began = time.monotonic()
    samples = run_group(members, TINY, plan, lambda text: None)
    assert time.monotonic() - began < 500, "a hanging contender held the others up"
    yield samples, pids


def test_the_others_run_whatever_one_does(fakes: tuple[list[Sample], Path]) -> None:
    """Catches a peer's fault that ends the measurement, and a loss told by two ranks counted
    twice.
    """
    well = fakes[0][0]
    assert well.problem is None
    assert len(well.seconds) == 2 and all(s is not None and 0 < s < 10 for s in well.seconds)
    assert well.losses == pytest.approx([5.545, 5.535, 5.525])
    assert well.parameters == TINY.parameters


@pytest.mark.parametrize(("how", "kind", "message"), FAULTS)
def test_why_a_contender_has_no_numbers_is_in_its_row(
    fakes: tuple[list[Sample], Path], how: str, kind: str, message: str
) -> None:
    """Catches a contender left out in silence, and one rank's fault told as the other's silence."""
    found = next(s for s in fakes[0] if s.contender.name == how)
    assert (found.kind, found.problem) == (kind, message)
    (row,) = rows(found)
    assert message in tool.table.report(_facts(), [row], []).splitlines()[-1]


def test_no_process_is_left(fakes: tuple[list[Sample], Path]) -> None:
    """Catches a rank that hangs on after its contender was given up."""
    started = {int(line) for line in fakes[1].read_text().split()}
    assert len(started) == 10
    assert soon(lambda: not any(start_ticks(pid) for pid in started))


DRIVER = """
import sys
from benchmarks.cpu.contenders import Contender
from benchmarks.cpu.rounds import Plan, run_group
from benchmarks.cpu.work import Work
how = Contender("hangs", "fake_contender", 2, {"how": "hangs", "pids": sys.argv[2]})
run_group([how], Work(), Plan(rounds=2, extra_path=sys.argv[1]), print)
"""


def test_ranks_inside_a_step_end_with_a_killed_driver(tmp_path: Path) -> None:
    """Catches processes that outlive the driver because they only see the end of their input
    between two steps.
    """
    (tmp_path / "fake_contender.py").write_text(FAKE)
    pids = tmp_path / "pids"
    paths = os.pathsep.join([str(ROOT / "tools"), str(ROOT)])
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), str(pids)],
        env={**os.environ, "PYTHONPATH": paths, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
    )

    try:
        # Each rank writes its number when it is built, and again when it begins to hang.
        assert soon(lambda: pids.exists() and len(pids.read_text().split()) == 4)
        driver.kill()
        driver.wait(HANG_SECONDS)
        assert soon(lambda: not any(start_ticks(int(pid)) for pid in pids.read_text().split()))
    finally:
        driver.kill()
        driver.wait()


@pytest.mark.parametrize("after_seconds", [0, 3])
def test_a_stopped_bench_leaves_nothing(after_seconds: int) -> None:
    """Catches processes that outlive a bench that is asked to stop, whatever they do at that
    moment.
    """
    command = [
        sys.executable,
        str(ROOT / "tools/bench.py"),
        *["cpu", "--only", "ddp2", "--rounds", "10000"],
        *SIZE_ARGUMENTS,
    ]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children")

    try:
        assert soon(lambda: len(children.read_text().split()) == 3)
        pids = [int(pid) for pid in children.read_text().split()]
        time.sleep(after_seconds)
        driver.send_signal(signal.SIGTERM)
        driver.wait(HANG_SECONDS)
        assert soon(lambda: not any(start_ticks(pid) for pid in pids))
    finally:
        driver.kill()
        driver.wait()


def test_one_and_two_processes_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches what only real contenders show: same model, same losses, numbers in table and JSON
    alike.
    """
    path = tmp_path / "now.json"
    arguments = ["cpu", "--only", "k2train", "ddp2", "--quick", "--rounds", "2", "--cores", "1"]
    assert tool.main([*arguments, "--json", str(path), *SIZE_ARGUMENTS]) == 0
    text, record = capsys.readouterr().out, json.loads(path.read_text())
    assert {row["name"]: row["problem"] for row in record["rows"]} == {
        "reference": None,
        "k2train": None,
        "ddp2": None,
    }
    for row in record["rows"]:
        assert row["parameters"] == TINY.parameters
        assert row["steps"] == 3 and len(row["seconds"]) == 2
        assert row["peak_resident_bytes"] > 2**26 and row["peak_step_bytes"] > 0
        assert f"{row['tokens_per_second']:,.0f}" in text

    by_name = {row["name"]: row for row in record["rows"]}
    # One model with one seed on one batch, whole or in halves: the sums differ by rounding.
    assert by_name["ddp2"]["last_loss"] == pytest.approx(
        by_name["reference"]["last_loss"], rel=1e-4
    )
    assert by_name["k2train"]["last_loss"] == pytest.approx(
        by_name["reference"]["last_loss"], rel=0.02
    )
    assert [by_name[n]["world"] for n in ("reference", "ddp2")] == [1, 2]
    assert record["machine"]["versions"]["torch"] and record["format"] == 1
    torch = pytest.importorskip("torch")
    assert {row["runtime"]["capability"] for row in record["rows"]} == {
        torch.backends.cpu.get_cpu_capability()
    }
    assert f"v{record['rows'][0]['runtime']['onednn']} " in torch.__config__.show()
    assert f"Processor: {kind_text(record['machine']['cpu'])}" in text
    assert "Ratios hold for this kind of processor only." in text.splitlines()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines == text.splitlines()[-5:], "the table is last"
    assert len({line.count("|") for line in lines}) == 1


# Against an earlier commit


@pytest.fixture
def repository(tmp_path: Path) -> tuple[Path, str]:
    """A git repository with this tree's k2train and bench, whose own contender signs its rows, and
    its commit.
    """
    folder = tmp_path / "repository"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "k2train", folder / "k2train", ignore=ignore)
    shutil.copytree(ROOT / "tools/benchmarks", folder / "tools/benchmarks", ignore=ignore)
    signed = folder / "tools/benchmarks/cpu/k2train_contender.py"
    text = signed.read_text()
    note = 'f"{engine.kernels}; {memory}"'
    assert note in text
    signed.write_text(text.replace(note, '"of the base"'))
    return folder, commit_all(folder)


def commit_all(folder: Path) -> str:
    quiet = {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        "PATH": os.environ["PATH"],
    }
    who = ["-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", *command], cwd=folder, env=quiet, check=True)
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


BASE = {"format": 1, "kind": "cpu", "commit": "0" * 40}


def record_of(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({"format": 1, "kind": "cpu", "commit": "0" * 40, **changes}))
    return path


def test_the_base_runs_its_own_code_beside_ours(
    repository: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a comparison of the present tree with itself, and a checkout that stays."""
    folder, commit = repository
    monkeypatch.setattr(tool, "ROOT", folder)
    base, written = record_of(tmp_path / "base.json", commit=commit), tmp_path / "now.json"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))

    arguments = ["cpu", "--only", "k2train", "--quick", "--cores", "1", "--rounds", "3"]
    arguments += ["--json", str(written), "--against", str(base), *SIZE_ARGUMENTS]
    assert tool.main(arguments) in (0, 1)
    record, text = json.loads(written.read_text()), capsys.readouterr().out
    assert [(row["name"], row["base"], row["problem"]) for row in record["rows"]] == [
        ("k2train", False, None),
        ("k2train", True, None),
    ]
    assert [row["note"] == "of the base" for row in record["rows"]] == [False, True]
    (layout,) = record["against"]["layouts"]
    assert record["against"]["commit"] == commit and layout["name"] == "k2train"
    assert (
        text.splitlines()[-1].startswith("| k2train | fp32 |")
        and f"{layout['ratio']['median']:.2f}" in text
    )
    assert list(temporary.iterdir()) == []


def now_and_then(now: list[float | None], then: list[float | None], **changes: Any) -> list[Row]:
    ours = sample(now, **changes)
    base = sample(then)
    base.contender = dataclasses.replace(base.contender, root=Path("base"))
    return rows(ours, base)


@pytest.mark.parametrize(
    ("measured", "verdict", "lost"),
    [
        (now_and_then([1.0], [1.0]), "no established difference", False),
        (now_and_then([1.0, 1.0], [0.93, 0.93]), "no established difference", False),
        (now_and_then([1.0, 1.0], [0.91, 0.91]), "LOSS", True),
        (now_and_then([1.0, 1.0], [1.1, 1.1]), "gain", False),
        (now_and_then([None], [1.0], problem="it fell", kind="failed"), "now it fell", True),
        (now_and_then([1.0], []), "no established difference", False),
    ],
)
def test_a_loss_is_named(
    measured: list[Row],
    verdict: str,
    lost: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a loss that passes, noise called a loss, a ratio upside down, and a layout that no
    longer runs.
    """
    if not measured[1].seconds:
        measured[1] = dataclasses.replace(
            measured[1], problem="it was not there", kind="unavailable"
        )
        verdict = "then it was not there"
    (found,) = against.compare(measured)
    assert (found.verdict, found.lost) == (verdict, lost)
    assert tool._report(_facts(), measured, {"commit": "0" * 40}, None) == (1 if lost else 0)
    captured = capsys.readouterr()
    assert verdict in captured.out
    assert ("k2train (fp32)" in captured.err) == lost

    # A disk that is full by now must not take the result with it.
    with pytest.raises(RunError, match=r"--json gone/x\.json cannot be written"):
        tool._report(_facts(), measured, {"commit": "0" * 40}, Path("gone/x.json"))
    assert verdict in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("not json", "is no JSON"),
        ("[1]", "is no record"),
        ('{"format": 99, "kind": "cpu"}', "is no record"),
        ('{"format": 1, "kind": "cpu", "commit": null}', "names no commit (None)"),
        (json.dumps({**BASE, "machine": ["x"]}), "machine is no object"),
        (json.dumps({**BASE, "machine": {"cpu": ["x"]}}), "machine.cpu: "),
        ('{"format": 1, "kind": "cpu", "commit": "' + "0" * 40 + '"}', "is not in"),
    ],
)
def test_a_base_that_cannot_be_costs_one_line(
    text: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback, and minutes of measuring before the mistake is seen."""
    monkeypatch.setattr(tool, "_measure", lambda *given: pytest.fail("it measures"))
    path = tmp_path / "base.json"
    if text is not None:
        path.write_text(text)
    assert tool.main(["cpu", "--quick", "--against", str(path)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_a_commit_without_the_bench_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a worker that does not exist, started and waited for."""
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "a").write_text("a")
    commit = commit_all(folder)
    monkeypatch.setattr(tool, "ROOT", folder)
    with (
        pytest.raises(against.RunError, match="has no tools/benchmarks/cpu"),
        against.checkout(folder, commit),
    ):
        pass


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cpu", "--only", "deepspeed"], "--only deepspeed"),
        (["cpu", "--size", "hidden=3"], "hidden is not one of"),
        (["cpu", "--size", "num_heads=7"], "must be divisible by num_heads (7)"),
        (["cpu", "--size", "global_sequences=7"], "must be divisible by micro_sequences"),
        (["cpu", "--size", "num_layers=two"], "'two' is no int"),
        (["cpu", "--size", "num_layers=0"], "must be above 0"),
        (["cpu", "--variant", "x: transformers a.b=1"], "with a k2train contender"),
        (["cpu", "--variant", "k2train: k2train run.seed=1"], "is a contender already"),
        (["cpu", "--variant", "x: k2train seed=1"], "is not section.key=value"),
        (["cpu", "--json", "no/such/folder/x.json"], "there is no folder"),
        (["cpu", "--json", "."], "that is a folder; name a file in it"),
    ],
)
def test_a_mistake_costs_one_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches tracebacks, and processes started for a command line that cannot be."""
    monkeypatch.setattr(tool, "_measure", lambda *given: pytest.fail("it measures"))
    assert tool.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_sizes_are_the_work() -> None:
    """Catches a size that is parsed and not used.

    The standard work is 10.5 million parameters and 4,096 tokens.
    """
    assert dataclasses.asdict(parse_work(SIZE_ARGUMENTS[1:])) == dataclasses.asdict(TINY)
    assert (Work().parameters, Work().tokens) == (10_522_880, 4096)


def test_the_gpu_part_gets_its_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches options of the other part eaten or refused here."""
    seen: list[list[str]] = []
    fake = ModuleType("benchmarks.gpu.main")
    fake.main = lambda arguments: seen.append(list(arguments)) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.main", fake)
    assert tool.main(["gpu", "--dry-run", "x"]) == 7
    assert seen == [["--dry-run", "x"]]
