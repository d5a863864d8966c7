"""A run that spikes goes back, defers the chunk, and ends like one that never read it there.

Would catch a return that forgets an item of the state, an order that differs between the run and
its ledger, and a kill that leaves half a return.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k2train.checkpoint.manifest import list_checkpoints
from k2train.checkpoint.verify import verify_checkpoint
from k2train.data.order import ChunkOrder
from k2train.guard.reaction import Return
from k2train.record.events import Resumed, Spike, of_kind
from k2train.record.ledger import read_ledger
from k2train.record.rollback_events import RolledBack, SpikeCheckpoint, StepRechecked
from k2train.train.rollback import GivenUpError, target_of
from tests.support.command_line import load_tool
from tests.support.events import event as event_of
from tests.support.gloo_pool import GlooPool
from tests.support.recorded import step_rows
from tests.support.spiked_runs import (
    FIRST,
    LAST,
    ONSET,
    POISONED,
    VERDICT,
    spiked_corpus,
    spiked_tree,
)
from tests.support.tiny_corpus import manifest_of, train, trainer_job, write_yaml

compare_runs = load_tool("compare_runs")
TOTAL = FIRST + POISONED + LAST
TP_PP = {"parallel__tensor": 2, "parallel__pipeline": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rollback")
    spiked_corpus(folder / "data")
    return folder


def tree_of(base: Path, name: str, **changes: Any) -> dict[str, Any]:
    return spiked_tree(base / "data" / "manifest.json", base / "runs", name, **changes)


def events(base: Path, name: str, kind: type[Any]) -> list[Any]:
    return of_kind(read_ledger(base / "runs" / name / "ledger.jsonl"), kind)


@pytest.fixture(scope="module")
def ordered(base: Path, pool: GlooPool) -> Path:
    """The run that was given the order after the return from the start."""
    tree = tree_of(base, "ordered", data__order=[0, 2, 1], spikes__policy="alert")
    assert pool.run(1, trainer_job, tree) == [0]
    return base / "runs" / "ordered"


@pytest.fixture(scope="module")
def spiked(base: Path, pool: GlooPool) -> Path:
    assert pool.run(1, trainer_job, tree_of(base, "spiked", spikes__keep_steps=2)) == [0]
    return base / "runs" / "spiked"


def test_a_spiked_run_ends_like_the_deferred_order(base: Path, spiked: Path, ordered: Path) -> None:
    """Catches whatever a return leaves behind in weights, moments, guards or data position."""
    assert compare_runs.differences(ordered, spiked, strict=True) == []
    (event,) = events(base, "spiked", RolledBack)
    assert (event.onset, event.from_step, event.step) == (ONSET, VERDICT + 2, FIRST)
    assert (event.checkpoint, event.chunks, event.hit) == ("ckpt_001", ("chunk_001",), 1)
    last = list_checkpoints(spiked / "checkpoints")[-1]
    names = [chunk["name"] for chunk in manifest_of(last)["chunks"]["order"]]
    assert names == ["chunk_000", "chunk_002", "chunk_001"]
    # Detector state included: it is that of a run that never met the spike there.
    twin = list_checkpoints(ordered / "checkpoints")[-1]
    assert manifest_of(last)["guard"] == manifest_of(twin)["guard"]


def test_the_branch_is_kept_beside_the_run(base: Path, spiked: Path) -> None:
    """Catches a branch that is resumed from, thinned, or without the record of its steps."""
    folder = spiked / "spikes" / "spike_001" / "branch"
    (checkpoint,) = list_checkpoints(folder)
    verify_checkpoint(checkpoint)
    assert manifest_of(checkpoint)["step"] == VERDICT + 2
    kept = step_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in kept] == [*range(FIRST + 1, VERDICT + 3)]
    assert {row["attempt"] for row in kept} == {1}
    (event,) = events(base, "spiked", SpikeCheckpoint)
    assert spiked / event.checkpoint == checkpoint and event.kind == "branch"

    aside = spiked / "checkpoints" / "set_aside_by_attempt_2"
    assert [path.name for path in list_checkpoints(aside)] == ["ckpt_002"]
    (resumed,) = events(base, "spiked", Resumed)
    assert (resumed.checkpoint, resumed.set_aside) == ("ckpt_001", ("ckpt_002",))


def test_tools_understand_a_return(spiked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a checker that calls such a run damaged, and an order without the return."""
    assert load_tool("verify_run").main([str(spiked)]) == 0
    load_tool("show_run").main([str(spiked)])
    shown = capsys.readouterr().out
    assert f"malignant since step {ONSET}, back from step {VERDICT + 2} to ckpt_001" in shown
    load_tool("inspect_data").main(["--run", str(spiked)])
    positions = [line.split()[1] for line in capsys.readouterr().out.splitlines()[-3:]]
    assert positions == ["chunk_000", "chunk_002", "chunk_001"]


def test_the_cause_is_looked_for_first(base: Path, spiked: Path) -> None:
    """Catches an alarm that opens without the step being done again."""
    opened = [event.step for event in events(base, "spiked", Spike) if event.kind == "opened"]
    found = events(base, "spiked", StepRechecked)
    assert [event.step for event in found] == opened
    assert all(event.same and event.ranks == () for event in found)


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        pytest.param(2, {}, id="dp2"),
        pytest.param(4, TP_PP, id="tp2-pp2", marks=pytest.mark.slow),
    ],
)
def test_every_layout_goes_back_alike(
    base: Path, pool: GlooPool, world: int, changes: dict[str, Any]
) -> None:
    """Catches ranks that decide apart, and a second engine in a process that disturbs the first."""
    name = f"spiked_{world}"
    assert pool.run(world, trainer_job, tree_of(base, name, **changes)) == [0] * world
    again = {**changes, "data__order": [0, 2, 1], "spikes__policy": "alert"}
    assert pool.run(world, trainer_job, tree_of(base, f"{name}_ordered", **again)) == [0] * world
    runs = [base / "runs" / one for one in (f"{name}_ordered", name)]
    assert compare_runs.differences(*runs, strict=True) == []
    assert len(events(base, name, RolledBack)) == 1


@pytest.mark.parametrize(
    ("name", "faults"),
    [
        ("killed", (f"step.done@step={VERDICT - 60}:kill", "rollback.written:kill")),
        pytest.param(
            "killed_again",
            ("rollback.kept:kill", "start.aside:kill"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "killed_in_saves",
            (f"save.hashed@step={VERDICT}:kill", f"save.renamed@step={VERDICT}:kill"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_kills_change_no_bit(base: Path, ordered: Path, name: str, faults: tuple[str, ...]) -> None:
    """Catches a return that is done by half: killed on the branch, in its save, once the return is
    written, and while the next start follows it, the run ends with the same bits.
    """
    config = write_yaml(base / f"{name}.yaml", tree_of(base, name, run__allow=["faults"]))
    for fault in faults:
        assert train(config, K2TRAIN_FAULTS=fault).returncode == -9, fault
    ended = train(config)
    assert ended.returncode == 0, ended.stderr
    assert compare_runs.differences(ordered, base / "runs" / name, strict=True) == []
    assert load_tool("verify_run").main([str(base / "runs" / name)]) == 0
    (event,) = events(base, name, RolledBack)
    assert (event.number, event.chunks) == (1, ("chunk_001",))


def test_a_bad_restart_is_left_behind_whatever_came_since() -> None:
    """Catches a return to the begin of a later start, which has the bad state, and a repetition
    that is not seen as one.
    """
    start: Any = SimpleNamespace(order=ChunkOrder(("a", "b"), (400, 400), 4), returns=[])
    back = Return("restart", onset=73, until=115)
    # The start that went bad began at step 70; it was stopped at 80, and another one followed.
    for first_step in (71, 81):
        newest = target_of(start, back, first_step).newest
        assert (0, 70) <= newest < (0, 73)

    start.returns = [event_of(RolledBack, verdict="restart", checkpoint="c", step=70, chunks=())]
    for first_step in (71, 81):
        with pytest.raises(GivenUpError, match="the restart from c was repeated"):
            target_of(start, back, first_step)
    other = Return("restart", onset=85, until=125)
    assert target_of(start, other, 84).newest == (0, 83)
