"""A check that was kept: written, read again, and refused where it was changed by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from k2train.calibrate.check import Checked, check_lines, parse_layout
from k2train.calibrate.check_file import CheckFacts, SavedCheck, check_text, read_check
from k2train.errors import ConfigError
from k2train.plan.uncertainty import Interval


def saved() -> SavedCheck:
    """Two layouts, the second on a machine that had slowed down."""
    first = Interval(0.5, 0.4, 0.7, {"lines": 0.1}, True)
    second = Interval(1.25, 1.0, 1.5, {}, False)
    rows = (
        Checked(parse_layout("data=1"), first, 0.5123456789, 0.5, 0.55),
        Checked(parse_layout("tensor=2,pipeline=2"), second, 1.0, 0.9, 1.2, 1.1),
    )
    facts = CheckFacts(
        config="configs/x.yaml",
        overrides=("model.num_layers=2",),
        when="2026-01-01 00:00 UTC",
        processor="a CPU",
        torch="2.0",
        steps=8,
        rounds=3,
    )
    return SavedCheck(facts, rows)


def test_what_was_kept_is_read_again(tmp_path: Path) -> None:
    """Catches a quartile, a pace or a digit that is lost: the table must be the same."""
    path, check = tmp_path / "check.json", saved()
    path.write_text(check_text(check), encoding="utf-8")
    found = read_check(str(path))
    assert check_lines(found.checked) == check_lines(check.checked)
    for mine, theirs in zip(found.checked, check.checked, strict=True):
        times = (mine.seconds, mine.low, mine.high, mine.pace, mine.case)
        assert times == (theirs.seconds, theirs.low, theirs.high, theirs.pace, theirs.case)
    assert found.facts == check.facts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("steps"), "steps: missing; it has no default"),
        (lambda c: c.update(rounds=0), "rounds: must be at least 1, is 0"),
        (lambda c: c["layouts"][0].update(place=1), "layouts[0].place: unknown key"),
        (lambda c: c["layouts"][1]["measured"].update(low=1.3), "measured: low (1.3), seconds"),
        (lambda c: c["layouts"][1]["predicted"].update(high=0.1), "predicted: low (1.0), seconds"),
        (lambda c: c["layouts"][0].update(layout="tensr=2"), "nearest is tensor"),
        (lambda c: c.update(layouts=[]), "layouts: "),
    ],
)
def test_a_file_changed_by_hand_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    """Catches a traceback, and a picture of numbers that cannot be."""
    path, content = tmp_path / "check.json", json.loads(check_text(saved()))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_check(str(path))
    assert message in str(caught.value) and str(caught.value).startswith(str(path))


def test_no_check_is_one_line(tmp_path: Path) -> None:
    """Catches a traceback for a file that is missing, or another kind of file."""
    with pytest.raises(ConfigError, match="No such file"):
        read_check(str(tmp_path / "none.json"))
    path = tmp_path / "torn.json"
    path.write_text(check_text(saved())[:50], encoding="utf-8")
    with pytest.raises(ConfigError, match="no check that calibrate has written"):
        read_check(str(path))
    path.write_text("[1]", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"torn\.json"):
        read_check(str(path))
