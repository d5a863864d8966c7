"""Wrong values made on purpose, where transfers overlap with computing and where they do not.

Would catch a fault that changes what has left already, or what a later transfer overwrites: it
would count as made, and nothing would have been tried.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from k2train import fault_injection
from k2train.checkpoint.manifest import list_checkpoints
from k2train.record.events import Faults, StepSkipped, Stopped, of_kind
from k2train.record.ledger import read_ledger
from k2train.record.metrics import StepRecord, latest
from k2train.train.trainer import Trainer
from tests.support.command_line import load_tool
from tests.support.gloo_pool import GlooPool
from tests.support.lanes import lanes
from tests.support.sent_gradients import check_struck, sent_job
from tests.support.tiny_corpus import (
    STEPS_PER_CHUNK,
    audited_tree,
    kept_of,
    make_corpus,
    manifest_of,
    train,
    trainer_job,
    write_yaml,
)

OVERLAPPED = {"parallel__overlap": "on", "parallel__bucket_bytes": 1000}
TP = {"parallel__tensor": 2}
PP = {"parallel__pipeline": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fault_values")
    make_corpus(folder / "data", 1, held_out=False)
    return folder


def armed(text: str, lines: Path, trainer: Trainer) -> None:
    """Arm the faults, and keep the lines that the run prints."""
    parallel, buckets = trainer.config.parallel, trainer.engine.gradients._buckets
    assert parallel.overlap != "on" or len(buckets) > 3, "one bucket leaves when all is complete"
    fault_injection.arm(text, trainer.engine.grid.rank)
    say = trainer.logger.info

    def info(text: str) -> None:
        if trainer.engine.grid.rank == 0:
            with lines.open("a") as file:
                file.write(text + "\n")
        say(text)

    trainer.logger.info = info  # type: ignore[method-assign]


def run_with(
    pool: GlooPool, base: Path, name: str, world: int, fault: str, **changes: Any
) -> list[int | str]:
    lines = base / f"{name}.txt"
    return pool.run(
        world, trainer_job, audited_tree(base, name, **changes), partial(armed, fault, lines)
    )


def rows_of(base: Path, name: str) -> list[StepRecord]:
    return list(latest(base / "runs" / name / "metrics.jsonl"))


def ledger_of(base: Path, name: str) -> Any:
    return read_ledger(base / "runs" / name / "ledger.jsonl")


GRADIENTS: tuple[tuple[int, dict[str, Any], str, str], ...] = (
    (2, {}, "@rank=0", "layers.0.mlp.gate.weight"),
    (2, {}, "@rank=1", "head.weight"),
    (2, {}, "@rank=1", "embedding.weight"),
    (2, {}, "@rank=0", "norm.weight"),
    (4, TP, "@rank=3", "layers.1.attention_norm.weight"),
    (4, TP, "@rank=2", "layers.3.attention.query.weight"),
    # Without a rank: those that hold the tensor.
    (4, PP, "", "head.weight"),
    (4, PP, "@rank=0", "layers.1.mlp.down.weight"),
)


@pytest.mark.parametrize(
    *lanes(
        ("world", "layout", "rank", "tensor"),
        GRADIENTS,
        lambda case: case in (GRADIENTS[0], GRADIENTS[3], GRADIENTS[6]),
    )
)
def test_a_gradient_changes_before_it_is_sent(
    base: Path, pool: GlooPool, world: int, layout: dict[str, Any], rank: str, tensor: str
) -> None:
    """Catches a gradient changed after its bucket has left: every rank would apply the step."""
    name = f"gradient-{world}{rank[1:]}{tensor}".replace("=", "")
    fault = f"gradient{rank}@step=3:nan={tensor}"
    codes = run_with(pool, base, name, world, fault, **OVERLAPPED, **layout)
    assert codes == [0] * world
    assert [row.step for row in rows_of(base, name) if not row.applied] == [3]
    (skipped,) = of_kind(ledger_of(base, name), StepSkipped)
    assert (skipped.step, skipped.tensors) == (3, (tensor,))
    (made,) = of_kind(ledger_of(base, name), Faults)
    assert (made.step, made.faults) == (3, ("gradient",)), "whichever rank changed it"


STRUCK: tuple[tuple[int, dict[str, Any], int, int, str, str], ...] = (
    (2, {}, 1, 2, "huge", "layers.2.mlp.gate.weight"),
    (2, {}, 0, 3, "nan", "norm.weight"),
    (4, {**PP, "parallel__schedule": "zb-h1"}, 3, 2, "inf", "layers.3.attention.output.weight"),
    (4, TP, 2, 2, "huge", "layers.1.mlp.down.weight"),
)


@pytest.mark.parametrize(
    *lanes(
        ("world", "layout", "rank", "step", "action", "tensor"),
        STRUCK,
        lambda case: case in STRUCK[:2],
    )
)
def test_what_leaves_a_rank_differs_in_the_named_element_only(
    pool: GlooPool,
    world: int,
    layout: dict[str, Any],
    rank: int,
    step: int,
    action: str,
    tensor: str,
) -> None:
    """Catches a fault on another rank, tensor or step than it names, and one that comes after its
    bucket has left: buckets are sent while the backward passes still run.
    """
    changes = {**OVERLAPPED, **layout}
    fault = f"gradient@rank={rank}@step={step}:{action}={tensor}"
    check_struck(
        pool.run(world, sent_job, changes, fault, tensor),
        pool.run(world, sent_job, changes, "", tensor),
        rank,
        step,
        action,
        tensor,
    )


def test_a_loss_is_not_finite_where_transfers_overlap(base: Path, pool: GlooPool) -> None:
    codes = run_with(pool, base, "loss", 2, "loss@rank=1@step=3@nth=2:inf", **OVERLAPPED)
    assert codes == [0, 0]
    assert [row.step for row in rows_of(base, "loss") if not row.applied] == [3]


FLIPS: tuple[tuple[str, str], ...] = (
    ("weight@rank=0@step=3:flip=layers.0.mlp.gate.weight", "layers.0.mlp.gate.weight on rank 0"),
    ("weight@rank=1@step=3:flip=head.weight", "weights of head.weight on rank 1"),
    ("weight@rank=1@step=3:flip=norm.weight", "weights of norm.weight on rank 1"),
    ("moment@rank=1@step=3:flip=head.weight.exp_avg_sq", "head.weight.exp_avg_sq on rank 1"),
    ("moment@rank=0@step=3:flip=layers.1.mlp.up.weight.master", "layers.1.mlp.up.weight"),
)


@pytest.mark.parametrize(
    *lanes(("fault", "words"), FLIPS, lambda case: case in (FLIPS[0], FLIPS[3]))
)
def test_a_flipped_bit_is_found_where_transfers_overlap(
    base: Path, pool: GlooPool, fault: str, words: str
) -> None:
    """Catches a bit that the gather of the last update writes over: the run would go to its end.

    A start without the fault goes on with the bits of a run that never had it.
    """
    name = "flip-" + fault.split("@")[0] + fault.rpartition("=")[2]
    # A state root waits for the weights of the step: without one they arrive in the next step.
    changes = {**OVERLAPPED, "audit__root_every_steps": int(fault.startswith("moment"))}
    assert run_with(pool, base, name, 2, fault, **changes) == [1, 1]
    (stopped,) = of_kind(ledger_of(base, name), Stopped)
    assert stopped.reason == "damaged" and words in str(stopped.problem), stopped

    assert run_with(pool, base, name, 2, "", **changes) == [0, 0]
    if not (base / "runs" / "alone").exists():
        assert run_with(pool, base, "alone", 2, "", **OVERLAPPED) == [0, 0]
    roots = [
        manifest_of(list_checkpoints(base / "runs" / each / "checkpoints")[-1])["state"]["root"]
        for each in (name, "alone")
    ]
    assert roots[0] == roots[1]


HUGE = "gradient@rank=0@step=3:huge=layers.0.attention.query.weight"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp": (2, OVERLAPPED),
    "dp-off": (2, {"parallel__overlap": "off"}),
    "tp": (2, TP),
    "pp": (2, PP),
}


@pytest.mark.parametrize("clip_norm", (1.0, None))
def test_a_huge_gradient_is_decided_alike_on_every_layout(
    base: Path, pool: GlooPool, clip_norm: float | None
) -> None:
    """Catches squares that overflow on some layouts only, a finite gradient called not finite, and
    second moments that become infinite.

    1e30 can be clipped. Without clipping its square is beyond fp32, so the step is skipped.
    """
    found: dict[str, list[StepRecord]] = {}
    for layout, (world, changes) in LAYOUTS.items():
        name = f"huge-{layout}-{clip_norm}"
        codes = run_with(pool, base, name, world, HUGE, **changes, optimizer__clip_norm=clip_norm)
        assert codes == [0] * world
        found[layout] = rows_of(base, name)
        assert len(found[layout]) == STEPS_PER_CHUNK
        skipped = of_kind(ledger_of(base, name), StepSkipped)
        assert [(event.step, event.tensors) for event in skipped] == (
            [] if clip_norm else [(3, ())]
        )
        lines = (base / f"{name}.txt").read_text()
        assert "not finite" not in lines
        assert ("too large without optimizer.clip_norm" in lines) == (clip_norm is None)

    for layout, rows in found.items():
        assert rows[2].grad_norm == pytest.approx(1e30, rel=1e-6), layout
        for row, one in zip(rows, found["one"], strict=True):
            assert row.applied == one.applied == (clip_norm is not None or row.step != 3)
            assert row.loss == pytest.approx(one.loss, rel=1e-4), (layout, row.step)


def test_a_tensor_that_no_rank_holds_is_not_hit(base: Path, pool: GlooPool) -> None:
    """Catches a misspelled name that strikes whatever comes first."""
    assert run_with(pool, base, "nobody", 1, "gradient@step=3:nan=layers.99.weight") == [0]
    assert all(row.applied for row in rows_of(base, "nobody"))
    assert of_kind(ledger_of(base, "nobody"), Faults) == []


# The trace of faults in the record, and the permission that they need.

FAULT = "gradient@rank=1@step=3:nan=norm.weight"
NAMED = "K2TRAIN_FAULTS is set ('gradient@rank=1@step=3:nan=norm.weight')"


def config_of(base: Path, name: str, **changes: Any) -> Path:
    return write_yaml(base / f"{name}.yaml", audited_tree(base, name, **changes))


@pytest.mark.parametrize("processes", (1, 2))
def test_faults_without_permission_are_refused(base: Path, processes: int) -> None:
    """Catches a variable left behind that changes the numbers of a run: a fresh one, one that is
    gone on with, and `--explain`.
    """
    name = f"refused-{processes}"
    path = config_of(base, name, run__stop_after_steps=2, checkpoint__every_chunks=1)
    refused = train(path, processes=processes, K2TRAIN_FAULTS=FAULT)
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 2
    assert NAMED in line and "run.allow=[faults]" in line
    assert not (base / "runs" / name).exists()

    begun = train(path, processes=processes)
    assert begun.returncode == 75, begun.stderr
    assert "on purpose" not in begun.stderr
    assert of_kind(ledger_of(base, name), Faults) == []
    before = kept_of(base / "runs" / name)
    assert train(path, processes=processes, K2TRAIN_FAULTS=FAULT).returncode == 2
    assert kept_of(base / "runs" / name) == before


def test_explain_tells_of_faults(base: Path) -> None:
    """Catches a look at the config that says all is well, where the start is then refused."""
    path = config_of(base, "explained")
    refused = train("--explain", path, K2TRAIN_FAULTS=FAULT)
    assert refused.returncode == 2 and NAMED in refused.stderr
    assert "run.allow" in refused.stdout
    permitted = train("--explain", path, "run.allow=[faults]", K2TRAIN_FAULTS=FAULT)
    assert permitted.returncode == 0
    assert permitted.stderr == f"k2train: faults on purpose, permitted by run.allow: {FAULT}\n"
    assert train("--explain", path).stderr == ""


def test_permitted_faults_leave_a_trace(base: Path) -> None:
    """Catches a run whose numbers were changed and whose record does not say so, and an attempt
    without faults that is marked with those of another.
    """
    path = config_of(base, "traced", run__allow=["faults"], run__stop_after_steps=3)
    run = base / "runs" / "traced"
    first = train(path, processes=2, K2TRAIN_FAULTS=FAULT)
    assert first.returncode == 75, first.stderr
    told = first.stderr.splitlines()
    assert any("on purpose" in line and FAULT in line for line in told[:2]), told
    assert any("step 3: gradient changed on purpose" in line for line in told)

    second = train(path, "run.stop_after_steps=null", processes=2)
    assert second.returncode == 0 and "on purpose" not in second.stderr, second.stderr
    made = [
        (event.attempt, event.step, event.faults)
        for event in of_kind(read_ledger(run / "ledger.jsonl"), Faults)
    ]
    assert made == [(1, None, (FAULT,)), (1, 3, ("gradient",))]

    # Whoever reads the run sees it.
    note = f"attempt 1 had faults on purpose: {FAULT}; changed: gradient in step 3"
    assert load_tool("show_run").lines_of_run(run)[1] == note
    notes = [problem for problem in load_tool("verify_run").problems_of(run, None)]
    assert [problem.text for problem in notes if problem.note] == [note]
    assert [problem.text for problem in notes if not problem.note] == []


def test_compared_runs_tell_of_faults(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches two runs called equal, both of which had the same fault."""
    for name in ("one", "two"):
        path = config_of(base, name, run__allow=["faults"])
        assert train(path, K2TRAIN_FAULTS="gradient@step=3:nan").returncode == 0
    runs = [str(base / "runs" / name) for name in ("one", "two")]
    assert load_tool("compare_runs").main([*runs, "--assert-equal"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": attempt 1 had faults")[0] for line in lines[:2]] == [
        f"note: {run}" for run in runs
    ]
    assert "are equal" in lines[2]
