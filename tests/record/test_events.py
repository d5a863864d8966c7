"""Ledger events: catches keys that writer and readers spell differently, and hostile values.

`every_event.jsonl` was written before events had classes: the format must not move.
"""

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2train.errors import RunError
from k2train.record.event import EVENTS, Event, UnknownEvent
from k2train.record.events import (
    CheckpointSaved,
    Resumed,
    StageTransition,
    Started,
    Takeover,
    of_kind,
    parse_entry,
)
from k2train.record.held_out import SetScore, SubsetScore
from k2train.record.jsonl import encode_line
from k2train.record.ledger import read_ledger
from k2train.record.line_check import with_check

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("every_event.jsonl")
ROWS = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
CHAIN = {"seq": 0, "time": "t", "previous": ""}
STARTED = next(row for row in ROWS if row["event"] == "started")


def test_a_ledger_is_read_and_written_again_to_the_same_bytes() -> None:
    """Catches a key that is lost, added, renamed or moved."""
    lines = GOLDEN.read_bytes().splitlines(keepends=True)
    for line, entry in zip(lines, read_ledger(GOLDEN), strict=True):
        assert entry.event.extra == {}, "a key that no field reads any more"
        row = {"seq": entry.seq, "time": entry.time, **entry.event.row()}
        assert with_check(encode_line({**row, "previous": entry.previous})) == line


def test_every_event_is_in_the_golden_ledger() -> None:
    """Catches an event class that is written but not read, or whose format no test holds."""
    assert set(Event.__subclasses__()) == {*EVENTS.values(), UnknownEvent}
    assert {row["event"] for row in ROWS} == set(EVENTS)
    assert not any(isinstance(entry.event, UnknownEvent) for entry in read_ledger(GOLDEN))


def test_values_have_their_types() -> None:
    entries = read_ledger(GOLDEN)
    assert [type(start.taken_over_from) for start in of_kind(entries, Resumed)] == [
        Takeover,
        type(None),
        type(None),
    ]
    saved = of_kind(entries, CheckpointSaved)
    assert saved[0].loss is None and saved[0].recovered is None and saved[2].recovered is True
    assert saved[1].held_out_loss is not None and math.isnan(saved[1].held_out_loss)
    own, news = saved[-1].held_out or ()
    assert isinstance(own, SetScore) and isinstance(own.subsets[1], SubsetScore)
    assert math.isnan(own.subsets[0].loss) and (news.rows, news.subsets) == (9, ())
    assert saved[0].held_out is None, "an older line does not have it"
    assert of_kind(entries, StageTransition)[0].data_in_common == ()


def test_keys_that_came_later_have_defaults() -> None:
    """Catches a reader that refuses the ledgers of the first version."""
    later = {"memory", "config_sha256", "fencing_token", "taken_over_from"}
    event = parse_entry({key: value for key, value in STARTED.items() if key not in later}).event
    assert isinstance(event, Started) and event.config_sha256 is None
    assert not later - {"taken_over_from"} & set(event.row())
    for name in later:
        assert getattr(event, name) is None


@given(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text()))
def test_what_a_newer_version_writes_is_kept(facts: dict[str, Any]) -> None:
    """Catches a newer ledger that an older tool refuses or truncates."""
    facts = {key: value for key, value in facts.items() if key not in STARTED}
    for known in ({"event": "of_tomorrow"}, STARTED):
        row = {**known, **CHAIN, **facts}
        event = parse_entry(row).event
        assert {**event.row(), **CHAIN} == row
        assert isinstance(event, UnknownEvent) == (known is not STARTED)
        assert event.name == known["event"]


WRONG: tuple[Any, ...] = (None, True, -1, 2**63, 0.5, "nine", [], ["a", 1], {}, {"token": 1}, "nan")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["event"]))
def test_a_value_of_another_type_is_refused(row: dict[str, Any]) -> None:
    """Catches a value that a reader cannot use: every key with values of every other type."""
    row = {key: value for key, value in row.items() if key != "check"}
    refused = 0
    for changed in [{**row, key: value} for key in row for value in WRONG]:
        try:
            again = parse_entry(changed).event.row()
        except ValueError as error:
            assert str(error).startswith("has ") and "\n" not in str(error)
            refused += 1
        else:
            assert again.items() <= {**changed, **again}.items()
    assert refused >= 6 * len(row)


@pytest.mark.parametrize("key", sorted({*CHAIN, *STARTED} - {"memory", "config_sha256", "check"}))
def test_a_line_without_a_key_is_one_sentence(key: str, tmp_path: Path) -> None:
    """Catches a traceback, and a message that names neither file nor line."""
    path = tmp_path / "ledger.jsonl"
    row = {name: value for name, value in STARTED.items() if name not in (key, "check")}
    path.write_bytes(encode_line({**row, **({"previous": ""} if key != "previous" else {})}))
    if key in ("fencing_token", "taken_over_from"):
        parse_entry(row)
        return
    with pytest.raises(RunError, match=rf"{path}: line 1 has no {key}") as error:
        read_ledger(path)
    assert "\n" not in str(error.value)


def test_a_wide_value_is_shortened(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    row = {**CHAIN, "event": "finished", "attempt": "x" * 10**6, "step": 1}
    path.write_bytes(encode_line(row))
    with pytest.raises(RunError, match=r"line 1 has .x+ as attempt: it was changed") as error:
        read_ledger(path)
    assert len(str(error.value)) < 400


def test_nothing_reads_an_event_that_nothing_writes() -> None:
    """Catches an event class that no code constructs: its readers would wait for it in vain."""
    classes = {kind.__name__ for kind in EVENTS.values()}
    written = {
        node.func.id
        for path in (ROOT / "k2train").rglob("*.py")
        if path.name != "events.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert classes - written == set()


def test_no_event_is_read_by_its_name() -> None:
    """Catches a reader that goes round the classes: an event's name as text outside of them."""
    texts = {f'"{name}"' for name in EVENTS if "_" in name} | {'["event"]', '.get("event")'}
    found = [
        f"{path.relative_to(ROOT)}: {text}"
        for folder in ("k2train", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if not path.name.endswith("events.py")
        for text in texts
        if text in path.read_text(encoding="utf-8")
    ]
    assert found == []
