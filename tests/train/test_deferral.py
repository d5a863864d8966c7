"""Deferral of a chunk by hand: what is refused, and that the next start follows it."""

import os
from pathlib import Path
from typing import Any

import pytest

from k2train.checkpoint.manifest import list_checkpoints
from k2train.errors import UserError
from k2train.record.change_events import Outcome
from k2train.record.events import ChunkDeferred, of_kind
from k2train.record.ledger import Ledger, read_ledger
from k2train.record.metrics import latest
from k2train.run_lock.lock import RunLock
from k2train.train.deferral import Wish, check_deferral
from tests.support.command_line import load_tool
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import config_tree, make_corpus, trainer_job, tree_of

tool = load_tool("defer_chunk")


def run_of(folder: Path, pool: GlooPool, steps: int = 7) -> tuple[Path, dict[str, Any]]:
    """A run of four chunks of five steps, stopped in the second; its folder and config."""
    make_corpus(folder / "data", 4)
    tree = config_tree(
        folder / "data" / "manifest.json", folder / "runs", "run", run__stop_after_steps=steps
    )
    assert pool.run(1, trainer_job, tree) == [75]
    del tree["run"]["stop_after_steps"]
    return folder / "runs" / "run", tree


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pool: GlooPool) -> Path:
    return run_of(tmp_path_factory.mktemp("deferral"), pool)[0]


def names(run: Path) -> list[str]:
    """The chunks in the order that the last steps were trained in."""
    rows = latest(run / "metrics.jsonl")
    return list(dict.fromkeys(record.chunk for record in rows))


@pytest.mark.parametrize(
    ("wish", "words"),
    (
        (Wish("1", "x"), r"chunk_001 \(position 1 of the order\) has begun at ckpt_001_step_0+7"),
        (Wish("chunk_000", "x"), "--from 0"),
        (Wish("9", "x"), "there is no chunk_009 in the order of the run: it has 4 chunks"),
        (Wish("one", "x"), "there is no one"),
        (Wish("2", "x", to=1), r"--to \(1\) must be from 3 to 3"),
        (Wish("2", "x", to=4), r"--to \(4\) must be from 3 to 3"),
        (Wish("3", "x"), "chunk_003 is the last of the order already"),
        (Wish("1", "x", from_checkpoint="9"), "has no ckpt_009 to continue from; it has ckpt_001_"),
    ),
)
def test_what_does_not_fit_is_refused(run: Path, wish: Wish, words: str) -> None:
    """Catches a line in the ledger that no start can follow."""
    with pytest.raises(UserError, match=words) as refused:
        check_deferral(run, read_ledger(run / "ledger.jsonl"), wish)
    assert "\n" not in str(refused.value)


def test_the_tool_writes_one_line_and_the_next_start_follows(
    pool: GlooPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a dry run that writes, a live run whose ledger is written to, and a start that asks
    for run.allow although the ledger says all.
    """
    run, tree = run_of(tmp_path, pool)
    asked = [str(run), "2", "--why", "shuffled", "--expect", "loss over 1 within 4 steps"]
    before = tree_of(run)
    assert tool.main([*asked, "--dry-run"]) == 0
    assert (tree_of(run)["ledger.jsonl"]) == before["ledger.jsonl"]
    assert "after:  chunk_000 chunk_001 chunk_003 chunk_002" in capsys.readouterr().out

    with RunLock(run):
        assert tool.main(asked) == 2
    assert f"pid {os.getpid()}" in capsys.readouterr().err
    assert tree_of(run)["ledger.jsonl"] == before["ledger.jsonl"]

    assert tool.main(asked) == 0
    capsys.readouterr()
    assert tool.main(asked) == 2
    assert "was deferred already, by line" in capsys.readouterr().err

    (event,) = of_kind(read_ledger(run / "ledger.jsonl"), ChunkDeferred)
    assert (event.chunk, event.step, event.order_index, event.why) == (
        "chunk_002",
        7,
        3,
        "shuffled",
    )
    assert pool.run(1, trainer_job, tree) == [0]
    assert names(run) == ["chunk_000", "chunk_001", "chunk_003", "chunk_002"]
    (came,) = of_kind(read_ledger(run / "ledger.jsonl"), Outcome)
    assert (came.stated_step, came.due_step, came.met) == (7, 11, True)


def test_from_an_older_checkpoint_the_run_goes_back(pool: GlooPool, tmp_path: Path) -> None:
    """Catches a start that continues from a checkpoint inside the chunk that was deferred."""
    run, tree = run_of(tmp_path, pool)
    ledger = Ledger(run / "ledger.jsonl")
    wish = Wish("1", "shuffled", from_checkpoint="1")
    ledger.append(check_deferral(run, ledger.entries, wish).event)
    assert pool.run(1, trainer_job, tree) == [0]
    assert names(run) == ["chunk_000", "chunk_002", "chunk_003", "chunk_001"]
    aside = run / "checkpoints" / "set_aside_by_attempt_2"
    assert [path.name for path in list_checkpoints(aside)] == ["ckpt_001_step_000007"]
    assert pool.run(1, trainer_job, tree) == ["finished: ckpt_004"]


def test_the_command_line_is_checked_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a typing mistake that costs a lock, or a folder made for a run that is not there."""
    gone = tmp_path / "no-run"
    for extra, words in (
        (["--why", " "], "--why must say why"),
        (["--why", "x", "--expect", "better"], "--expect must be MEASURE under A"),
        (["--why", "x"], "is not the directory of a run"),
    ):
        try:
            code = tool.main([str(gone), "2", *extra])
        except SystemExit as ended:
            code = ended.code
        assert code == 2
        told = capsys.readouterr().err
        assert words in told
    assert not gone.exists()
