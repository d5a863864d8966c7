"""Ledger repair: nothing intact is lost, nothing damaged believed, and the file says what was."""

import json
import random
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from k2train.errors import RunError
from k2train.record.events import CheckpointSaved, LedgerMended, of_kind
from k2train.record.ledger import Ledger, read_chain, read_ledger
from k2train.record.ledger_head import LedgerHead, head_problems, read_head
from k2train.record.ledger_repair import examine, mend
from tests.support.events import event

EVENTS = 6
Lines = list[bytes]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(tmp_path / "ledger.jsonl")
    for step in range(EVENTS):
        made.append(event(CheckpointSaved, step=step, checkpoint=f"ckpt_{step:03d}"))
    return made


def flipped(lines: Lines) -> Lines:
    damaged = bytearray(lines[2])
    damaged[damaged.index(b"ckpt_002") + 6] ^= 1
    return [*lines[:2], bytes(damaged), *lines[3:]]


DAMAGES: dict[str, tuple[Callable[[Lines], Lines], int, list[int], int]] = {
    # lines -> lines; events kept, steps carried, lines lost
    "flipped": (flipped, 2, [3, 4, 5], 1),
    "foreign line": (lambda lines: [*lines[:4], b"hello\n", *lines[4:]], 4, [4, 5], 1),
    "foreign end": (lambda lines: [*lines, b"hello\n"], 6, [], 1),
    "removed": (lambda lines: lines[:1] + lines[2:], 1, [2, 3, 4, 5], 0),
    "exchanged": (lambda lines: [*lines[:3], lines[4], lines[3], lines[5]], 3, [4, 3, 5], 0),
    "first": (lambda lines: [b"\x00" * 40 + b"\n", *lines[1:]], 0, [1, 2, 3, 4, 5], 1),
    "lost newline": (lambda lines: [*lines[:-1], lines[-1][:-1] + b"\x0b"], 5, [], 1),
    "cut": (lambda lines: lines[:3], 3, [], 0),
    "empty": (lambda lines: [], 0, [], 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_intact_goes_on(ledger: Ledger, damage: str) -> None:
    """Catches intact events that are lost, damaged ones that are believed, and links that break."""
    change, kept, carried, lost = DAMAGES[damage]
    before, hashes = read_chain(ledger.path)
    heads = {
        "ckpt_005": ledger.head,
        "ckpt_000": LedgerHead(1, hashes[0]),
        "ckpt_002": LedgerHead(3, hashes[2]),
    }
    damaged = b"".join(change(ledger.path.read_bytes().splitlines(keepends=True)))
    ledger.path.write_bytes(damaged)

    found = examine(ledger.path, heads)
    assert found.problems and (len(found.entries), found.lost) == (kept, lost)
    told = mend(found, "a test")
    entries, new = read_chain(ledger.path)
    assert entries[:kept] == before[:kept] and new[:kept] == hashes[:kept]
    assert entries[kept].event == told and told.reason == "a test" and told.lost == lost

    behind = entries[kept + 1 :]
    assert [entry.event.step for entry in behind if isinstance(entry.event, CheckpointSaved)] == (
        carried
    )
    assert told.carried == len(behind) == len(carried)
    assert [(e.time, e.event) for e in behind] == [
        (before[s].time, before[s].event) for s in carried
    ]

    # The file as it was is kept, and its hash told.
    assert told.kept == "ledger.damaged_1.jsonl"
    assert ledger.path.with_name(told.kept).read_bytes() == damaged
    assert told.kept_sha256 == sha256(damaged).hexdigest()

    # Old heads stop no start any more, and other ones still do.
    assert head_problems(ledger.path, entries, new, heads) == []
    assert head_problems(ledger.path, entries, new, {"x": LedgerHead(2, "0" * 64)})
    assert read_head(ledger.path) == (len(entries), new[-1])
    assert not examine(ledger.path, heads).problems

    Ledger(ledger.path).append(event(CheckpointSaved, step=9))
    assert len(read_ledger(ledger.path)) == len(entries) + 1


def test_a_missing_ledger_begins_anew_with_the_reason(ledger: Ledger) -> None:
    head = ledger.head
    ledger.path.unlink()
    told = mend(examine(ledger.path, {"ckpt_005": head}), "the disk was lost")
    (entry,) = read_ledger(ledger.path)
    assert entry.event == told and (told.kept, told.kept_sha256) == (None, None)
    assert told.accepted == (head.sha256,) and "is missing" in told.problem


def test_what_is_whole_is_left_alone(ledger: Ledger) -> None:
    """A torn last line is no damage either: the next start moves it aside by itself."""
    assert not examine(ledger.path, {"ckpt_005": ledger.head}).problems
    with ledger.path.open("ab") as stream:
        stream.write(b'{"seq": 6, "ti')
    assert not examine(ledger.path, {"ckpt_005": ledger.head}).problems


def test_mended_twice(ledger: Ledger) -> None:
    """Catches a first mending, and the heads it accepted, that the second one forgets."""
    head = ledger.head
    path = ledger.path
    path.write_bytes(b"".join(flipped(path.read_bytes().splitlines(keepends=True))))
    mend(examine(path, {"ckpt_005": head}), "first")
    again = Ledger(path).head
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"hello\n" + b"".join(lines))
    told = mend(examine(path, {"ckpt_005": head, "ledger.head": again}), "second")
    assert told.kept == "ledger.damaged_2.jsonl"
    entries, hashes = read_chain(path)
    assert [event.reason for event in of_kind(entries, LedgerMended)] == ["second", "first"]
    assert head_problems(path, entries, hashes, {"a": head, "b": again}) == []
    assert {entry.event.step for entry in entries if isinstance(entry.event, CheckpointSaved)} == (
        {0, 1, 3, 4, 5}
    )


@pytest.mark.parametrize("seed", range(40))
def test_any_damage_is_mended_into_a_ledger_that_reads(ledger: Ledger, seed: int) -> None:
    """Random bits, bytes, cuts and copies of lines: afterwards every reader is content."""
    draw = random.Random(seed)
    head, content = ledger.head, bytearray(ledger.path.read_bytes())
    for _ in range(draw.randrange(1, 4)):
        at, size = draw.randrange(len(content)), draw.randrange(1, 300)
        kind = draw.randrange(4)
        if kind == 0:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[at : at + size] = draw.randbytes(size)
        elif kind == 2:
            del content[at : at + size]
        else:
            content[at:at] = content[:size]
    ledger.path.write_bytes(content)
    found = examine(ledger.path, {"ckpt_005": head})
    if not found.problems:
        with pytest.raises(AssertionError):
            mend(found, "nothing")
        return
    mend(found, "a test")
    entries, hashes = read_chain(ledger.path)
    assert head_problems(ledger.path, entries, hashes, {"ckpt_005": head}) == []
    assert json.loads(ledger.path.read_bytes().splitlines()[-1])["seq"] == len(entries) - 1


def test_readers_name_the_way_on(ledger: Ledger) -> None:
    """Catches a refusal without a remedy."""
    ledger.path.write_bytes(ledger.path.read_bytes() + b"hello\n")
    with pytest.raises(RunError, match=r"line 7 .*tools/mend_ledger.py"):
        read_ledger(ledger.path)
