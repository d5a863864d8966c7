"""The fit: constants come back from rows made with them, and unseen sources stay unseen."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from k2train.errors import ConfigError
from k2train.plan.efficiency import GENERATIONS
from k2train.planner import fit as module
from k2train.planner.fit import (
    fit,
    leave_one_source_out,
    names_of,
    predicted,
    prior_values,
    solve,
)
from k2train.planner.predict import read_rows
from k2train.planner.rows import Case, case_of, cases_of

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "tests" / "golden" / "step_times.csv"
BLACKWELL = ROOT / "tests" / "golden" / "step_times_blackwell.csv"


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Measured rows without a pipeline, which are quick."""
    found = [one for one in cases_of(read_rows(str(ROWS))[1]) if isinstance(one, Case)]
    return [one for one in found if one.measured_seconds and one.work.pipeline == 1]


def made(cases: Sequence[Case], values: dict[str, float]) -> list[Case]:
    """The same rows, their times as other constants would have them."""
    return [
        replace(case, row={**case.row, "published_step_s": str(predicted(case, values))})
        for case in cases
    ]


def test_constants_come_back_from_their_own_rows(cases: list[Case]) -> None:
    """Catches a step in the wrong direction, or a constant that no row moves."""
    wanted = prior_values(names_of(cases))
    wanted |= {"ampere.matmul": 0.70, "hopper.matmul": 0.6, "network": 0.55}
    found = fit(made(cases, wanted))
    for name in ("ampere.matmul", "hopper.matmul", "network"):
        prior = prior_values([name])[name]
        # Priors hold back a little.
        assert abs(found[name] - wanted[name]) < 0.35 * abs(prior - wanted[name]), name


def test_blackwells_shares_are_those_of_its_rows() -> None:
    """Catches a share that no published row supports, and rows that nobody fitted."""
    rows = [case_of(row) for row in read_rows(str(BLACKWELL))[1]]
    found = fit(rows, ["blackwell-ultra.matmul", "mxfp8", "nvfp4"])
    ultra = GENERATIONS["blackwell-ultra"]
    assert found["blackwell-ultra.matmul"] == pytest.approx(ultra.matmul, abs=0.005)
    assert found["mxfp8"] == pytest.approx(ultra.mxfp8, abs=0.005)
    assert found["nvfp4"] == pytest.approx(ultra.nvfp4, abs=0.005)
    # Hopper's shares of bf16 and fp8, which these rows did not move.
    assert GENERATIONS["blackwell"].matmul == GENERATIONS["hopper"].matmul
    for precision, most in (("fp8", 0.04), ("mxfp8", 0.05), ("nvfp4", 0.07)):
        own = [case for case in rows if case.work.precision == precision]
        errors = [abs(predicted(case, found) / (case.measured_seconds or 1) - 1) for case in own]
        assert len(own) >= 10 and sum(errors) / len(errors) < most, precision


def test_one_broken_row_does_not_bend_a_constant(cases: list[Case]) -> None:
    """Catches squares: a row that is four times too slow moves nothing by more than a tenth."""
    rows = made(cases, prior_values(names_of(cases)))
    first = rows[0]
    slow = 4 * (first.measured_seconds or 0.0)
    broken = [replace(first, row={**first.row, "published_step_s": str(slow)}), *rows[1:]]
    honest, bent = fit(rows), fit(broken)
    assert all(abs(bent[name] / honest[name] - 1) < 0.1 for name in ("ampere.matmul", "memory"))


def test_a_source_is_predicted_without_itself(
    cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an error on unseen rows that was computed with them."""
    seen: list[set[str]] = []

    def recorded(others: Sequence[Case]) -> dict[str, float]:
        seen.append({case.source for case in others})
        return {}

    monkeypatch.setattr(module, "fit", recorded)
    judged = leave_one_source_out(cases)
    sources = list(dict.fromkeys(case.source for case in cases))
    assert seen == [set(sources) - {source} for source in sources]
    assert len(judged) == len(cases)


def test_equations_are_solved() -> None:
    """Catches an elimination without pivots."""
    assert solve([[0.0, 2.0], [1.0, 1.0]], [4.0, 5.0]) == pytest.approx([3.0, 2.0])
    with pytest.raises(ConfigError, match="no row with a measured time"):
        fit([])
