"""A check on disk: predicted and measured steps of every layout as JSON, and read again.

- What a check has measured in minutes can be shown again without measuring.
- Times are seconds at the speed of the calibration; `pace` times them are those of the run.
- The file is checked like a config: unknown keys, numbers out of range and their order.

Alternatives considered:
- Reading the table back: it is rounded for people.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from k2train.calibrate.check import Checked, parse_layout
from k2train.config.messages import legal_keys, nearest, problems_of, unknown
from k2train.config.section import Section
from k2train.config.yaml_source import Path as KeyPath
from k2train.config.yaml_source import dotted
from k2train.errors import ConfigError
from k2train.plan.uncertainty import Interval
from k2train.retry import reason
from k2train.safe_json import read_json

Seconds = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Text = Annotated[str, Field(max_length=10_000)]


class TimesSection(Section):
    """Three times that grow."""

    low: Seconds
    seconds: Seconds
    high: Seconds


class LayoutSection(Section):
    """One layout of a check."""

    layout: Text
    pace: Seconds
    measured: TimesSection
    """Median and quartiles of the steps."""
    predicted: TimesSection
    """Prediction, and the interval of nine steps in ten."""


class CheckFacts(Section):
    """What was checked, when, and on what."""

    config: Text
    overrides: tuple[Text, ...]
    when: Text
    processor: Text
    torch: Text
    steps: Count
    """Measured steps of each run."""
    rounds: Count
    """Runs of each layout."""


class CheckFile(CheckFacts):
    """A whole file."""

    layouts: Annotated[list[LayoutSection], Field(min_length=1, max_length=1000)]


@dataclass(frozen=True)
class SavedCheck:
    """A check, and what came out."""

    facts: CheckFacts
    checked: tuple[Checked, ...]


def check_text(check: SavedCheck) -> str:
    """JSON of a check, which `read_check` reads."""
    content = {
        **check.facts.model_dump(),
        "layouts": [
            {
                "layout": one.case.text,
                "pace": one.pace,
                "measured": {"low": one.low, "seconds": one.seconds, "high": one.high},
                "predicted": {
                    "low": one.predicted.low,
                    "seconds": one.predicted.seconds,
                    "high": one.predicted.high,
                },
            }
            for one in check.checked
        ],
    }
    return json.dumps(content, indent=1) + "\n"


def read_check(path: str) -> SavedCheck:
    """Read a file of `check_text`. Raises ConfigError with every mistake, one per line."""
    try:
        file = CheckFile.model_validate(read_json(Path(path)))
    except ValidationError as error:
        mistakes = [f"{path}: {dotted(p.path)}: {p.message}" for p in problems_of(error, _unknown)]
        raise ConfigError("\n".join(dict.fromkeys(mistakes))) from None
    except OSError as error:
        raise ConfigError(f"{path}: {reason(error, path)}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: no check that calibrate has written: {error}") from None
    facts = CheckFacts(**file.model_dump(exclude={"layouts"}))
    return SavedCheck(facts, tuple(_checked(path, file.layouts)))


def _checked(path: str, layouts: Sequence[LayoutSection]) -> list[Checked]:
    found = []
    for one in layouts:
        for name, times in (("measured", one.measured), ("predicted", one.predicted)):
            if not times.low <= times.seconds <= times.high:
                raise ConfigError(
                    f"{path}: {one.layout}: {name}: low ({times.low}), seconds ({times.seconds}) "
                    f"and high ({times.high}) must grow"
                )
        measured, predicted = one.measured, one.predicted
        interval = Interval(predicted.seconds, predicted.low, predicted.high, {}, True)
        try:
            case = parse_layout(one.layout)
        except ConfigError as problem:
            raise ConfigError(f"{path}: {problem}") from None
        found.append(
            Checked(case, interval, measured.seconds, measured.low, measured.high, one.pace)
        )
    return found


def _unknown(path: KeyPath) -> str:
    legal = legal_keys(CheckFile, path[:-1])
    return unknown(nearest(str(path[-1]), legal), legal)
