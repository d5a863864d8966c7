"""Heads of the ledger: kept with every event, and what they say of a ledger that is not theirs."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from k2train.record import ledger as ledger_module
from k2train.record.events import CheckpointSaved, Straggler
from k2train.record.ledger import Ledger, read_chain
from k2train.record.ledger_head import HEAD_FILE, LedgerHead, head_problems, read_head
from tests.support.events import event


def filled(path: Path, events: int) -> Ledger:
    ledger = Ledger(path)
    for step in range(events):
        ledger.append(event(CheckpointSaved, step=step))
    return ledger


def problems(path: Path, head: LedgerHead) -> list[str]:
    entries, hashes = read_chain(path) if path.exists() else ([], [])
    return head_problems(path, entries, hashes, {"ckpt_003": head})


def test_the_file_beside_the_ledger_follows_every_event(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert read_head(path) is None
    ledger = filled(path, 0)
    assert ledger.head == LedgerHead(0, "") and not (tmp_path / HEAD_FILE).exists()
    for number in (1, 2, 3):
        ledger.append(event(Straggler, told="x"))
        last = path.read_bytes().splitlines()[-1]
        assert read_head(path) == ledger.head == (number, sha256(last).hexdigest())
    assert json.loads((tmp_path / HEAD_FILE).read_text())["events"] == 3
    assert Ledger(path).head == ledger.head


def test_no_event_is_lost_to_its_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an append that fails after its line is on the disk: it would be written twice."""
    ledger = filled(tmp_path / "ledger.jsonl", 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger_module, "write_head", full)
    ledger.append(event(Straggler, told="x"))
    monkeypatch.undo()
    assert len(read_chain(ledger.path)[0]) == 2
    # The head is one event behind, which contradicts nothing.
    head = read_head(ledger.path)
    assert head is not None and head.events == 1 and problems(ledger.path, head) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"events": "3", "sha256": ""}', "null"])
def test_a_damaged_head_file_is_no_head(tmp_path: Path, content: str) -> None:
    """The heads in the checkpoints are left; a start is not refused for the file's sake."""
    ledger = filled(tmp_path / "ledger.jsonl", 1)
    (tmp_path / HEAD_FILE).write_text(content)
    assert read_head(ledger.path) is None


def test_a_flipped_bit_in_the_head_file_speaks_against_no_ledger(tmp_path: Path) -> None:
    """Catches a head that is valid JSON and another one: every bit of the file is tried."""
    ledger = filled(tmp_path / "ledger.jsonl", 3)
    file = tmp_path / HEAD_FILE
    content = file.read_bytes()
    for bit in range(8 * (len(content) - 1)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        assert read_head(ledger.path) is None, damaged
    file.write_bytes(content)
    assert read_head(ledger.path) == ledger.head


def test_a_ledger_that_goes_on_has_all_its_earlier_heads(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger.jsonl", 0)
    heads = [ledger.head]
    for step in range(5):
        ledger.append(event(CheckpointSaved, step=step))
        heads.append(ledger.head)
    assert [problems(ledger.path, head) for head in heads] == [[]] * 6


def test_what_was_cut_changed_or_exchanged_is_named(tmp_path: Path) -> None:
    """Catches each way in which a ledger can be whole by its own chain and yet not this run's."""
    path = filled(tmp_path / "ledger.jsonl", 5).path
    head = Ledger(path).head
    lines = path.read_bytes().splitlines(keepends=True)

    path.write_bytes(b"".join(lines[:2]))
    (found,) = problems(path, head)
    assert "has 2 events, ckpt_003 is of a time when it had 5" in found

    other = filled(tmp_path / "other" / "ledger.jsonl", 7).path
    shutil.copy(other, path)
    (found,) = problems(path, head)
    assert "line 5 is not the one that ckpt_003 names" in found

    path.unlink()
    (found,) = problems(path, head)
    assert "is missing or empty, ckpt_003 is of a run with 5 events" in found
