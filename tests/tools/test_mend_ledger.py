"""`tools/mend_ledger.py` and the starts around it: what a damaged or lost ledger does to a run.

Would catch a start that goes on over a ledger that lost events, a damaged one that stops a run for
good, and a mended run that is not the run it was.
"""

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k2train.checkpoint.manifest import seal
from k2train.config.load import Config
from k2train.errors import RunError
from k2train.record.events import CheckpointSaved, LedgerMended, of_kind
from k2train.record.ledger import Ledger, read_ledger
from k2train.run_lock.lock import RunLock
from k2train.train import preflight
from k2train.train.preflight import prepare_start
from tests.support.events import event
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import ROOT, config_tree, locked_job, make_corpus

mend: Callable[[list[str]], int] = runpy.run_path(str(ROOT / "tools" / "mend_ledger.py"))["main"]
verify: Callable[[list[str]], int] = runpy.run_path(str(ROOT / "tools" / "verify_run.py"))["main"]
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def stopped(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that was stopped in the middle, and its config."""
    base = tmp_path_factory.mktemp("mend")
    make_corpus(base / "data", chunks=2)
    tree = config_tree(
        base / "data" / "manifest.json", base / "runs", "r", wandb={"mode": "disabled"}
    )
    assert pool.run(1, locked_job, tree | {"run": tree["run"] | {"stop_after_steps": 7}}) == [75]
    return base / "runs" / "r", tree


@pytest.fixture
def run(stopped: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped[0], tmp_path / "runs" / "r"))


def config_of(run: Path, tree: dict[str, Any]) -> dict[str, Any]:
    return tree | {"run": tree["run"] | {"directory": str(run.parent)}}


def lines_of(run: Path) -> list[bytes]:
    return (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)


def cut(run: Path) -> None:
    (run / "ledger.jsonl").write_bytes(b"".join(lines_of(run)[:-3]))


def cut_with_its_head(run: Path) -> None:
    """The newest checkpoint alone remembers."""
    (run / "ledger.jsonl").write_bytes(b"".join(lines_of(run)[:3]))
    (run / "ledger.head").unlink()


def lose(run: Path) -> None:
    (run / "ledger.jsonl").unlink()


def lose_with_its_head(run: Path) -> None:
    lose(run)
    (run / "ledger.head").unlink()


def empty(run: Path) -> None:
    (run / "ledger.jsonl").write_bytes(b"")


def exchange(run: Path) -> None:
    other = Ledger(run.parent / "other.jsonl")
    for step in range(30):
        other.append(event(CheckpointSaved, step=step))
    other.path.rename(run / "ledger.jsonl")


def flip(run: Path) -> None:
    """One bit in the last digit of a time, so that the line stays JSON."""
    content = bytearray((run / "ledger.jsonl").read_bytes())
    where = content.index(b'Z"', len(content) // 3) - 1
    assert chr(content[where]).isdigit()
    content[where] ^= 1
    (run / "ledger.jsonl").write_bytes(content)


def write_into(run: Path) -> None:
    with (run / "ledger.jsonl").open("ab") as stream:
        stream.write(b"hello\n")


DAMAGES: list[tuple[Damage, str]] = [
    (cut, "ledger.head is of a time when it had"),
    (cut_with_its_head, "has 3 events, ckpt_001_step_000007 is of a time when it had"),
    (lose, "ledger.jsonl: is missing or empty, ledger.head is of a run"),
    (lose_with_its_head, "is missing or empty, ckpt_001_step_000007 is of a run"),
    (empty, "is missing or empty"),
    (exchange, "is not the one that"),
    (flip, "it was changed or damaged"),
    (write_into, "is not JSON"),
]


@pytest.mark.parametrize(("damage", "told"), DAMAGES)
def test_it_is_found_at_the_next_start(
    run: Path, stopped: tuple[Path, Any], damage: Damage, told: str
) -> None:
    """Before anything is written, in one line with the way on."""
    damage(run)
    config = Config.model_validate(config_of(run, stopped[1]))
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with pytest.raises(RunError) as error:
        prepare_start(config, 1, verify=False)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert f"tools/mend_ledger.py {run}" in str(error.value)
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.is_file()}


@pytest.mark.parametrize("damage", [damage for damage, _ in DAMAGES])
def test_verify_run_finds_it(run: Path, damage: Damage, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify([str(run)]) == 0
    damage(run)
    assert verify([str(run)]) == 2
    assert "ledger.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [cut, lose_with_its_head, flip, write_into])
def test_a_mended_run_goes_on(
    run: Path,
    stopped: tuple[Path, Any],
    pool: GlooPool,
    damage: Damage,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """To the end, with the reason in its record; the same file mended twice is left alone."""
    damage(run)
    path = run / "ledger.jsonl"
    damaged = path.read_bytes() if path.exists() else None
    assert mend([str(run)]) == 2
    assert "--reason TEXT" in capsys.readouterr().err
    assert (path.read_bytes() if path.exists() else None) == damaged, "nothing without a reason"

    assert mend([str(run), "--reason", "bad disk"]) == 0
    assert mend([str(run), "--reason", "again"]) == 0
    assert "nothing to mend" in capsys.readouterr().out
    (told,) = of_kind(read_ledger(path), LedgerMended)
    assert told.reason == "bad disk"
    if damaged is not None:
        assert (run / str(told.kept)).read_bytes() == damaged

    assert pool.run(1, locked_job, config_of(run, stopped[1])) == [0]
    assert verify([str(run)]) == 0, capsys.readouterr().err


def test_a_run_that_goes_on_is_not_mended(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a tool that rewrites a ledger under a running job."""
    write_into(run)
    before = (run / "ledger.jsonl").read_bytes()
    with RunLock(run):
        assert mend([str(run), "--reason", "x"]) == 2
    assert "is held by a live run" in capsys.readouterr().err
    assert (run / "ledger.jsonl").read_bytes() == before


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mend([str(tmp_path)]) == 2 and mend([str(tmp_path / "none"), "--reason", "x"]) == 2
    assert capsys.readouterr().err.count("is not the directory of a run") == 2
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_was_left_behind_is_dealt_with(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a refusal whose remedy refuses, too: all but the head was removed, to begin anew."""
    shutil.rmtree(run / "checkpoints")
    (run / "ledger.jsonl").unlink()
    assert mend([str(run), "--reason", "begun anew"]) == 0
    assert "a new ledger begins" in capsys.readouterr().out


def test_a_line_written_meanwhile_is_no_contradiction(
    run: Path, stopped: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a start refused because the one before wrote its last line during the checks."""
    ledger = run / "ledger.jsonl"
    read = preflight.read_chain

    def then_written(path: Path) -> Any:
        found = read(path)
        Ledger(ledger).append(event(CheckpointSaved, step=7))
        return found

    monkeypatch.setattr(preflight, "read_chain", then_written)
    prepare_start(Config.model_validate(config_of(run, stopped[1])), 1, verify=False)


def test_a_run_of_an_older_version_goes_on(run: Path, stopped: tuple[Path, Any]) -> None:
    """Catches a start refused for heads that older checkpoints do not have."""
    (run / "ledger.head").unlink()
    for path in (run / "checkpoints").glob("*/manifest.json"):
        content = json.loads(path.read_text())
        del content["ledger"], content["self_sha256"]
        path.write_text(json.dumps(seal(content)))
    prepare_start(Config.model_validate(config_of(run, stopped[1])), 1, verify=False)
