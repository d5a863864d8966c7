"""Expectations, measured: when, on which steps, and once, whatever restarts lie between."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k2train.checkpoint.run_facts import HeldOutFacts
from k2train.config.load import Config
from k2train.record.change_events import Change, Outcome
from k2train.record.events import Finished, Resumed, of_kind
from k2train.record.metrics import StepRecord
from k2train.train.expectations import MEDIAN_STEPS, ExpectingRunLogger
from k2train.train.preflight import Start, prepare_start
from tests.support.events import event
from tests.support.tiny_corpus import config_tree, make_corpus

TOTAL = 20 * 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Start:
    folder = tmp_path_factory.mktemp("expected")
    make_corpus(folder / "data", 20)
    tree = config_tree(folder / "data" / "manifest.json", folder / "runs", "run")
    return prepare_start(Config.model_validate(tree), 1, verify=False)


@pytest.fixture
def start(base: Start, tmp_path: Path) -> Start:
    return replace(base, directory=tmp_path)


def stated(logger: ExpectingRunLogger, step: int, text: str) -> None:
    logger.event(Change(attempt=logger.attempt, step=step, changes=(), expect=text))


def train(logger: ExpectingRunLogger, first: int, last: int, **facts: Any) -> None:
    """Steps whose loss is their number and whose norm is a tenth of it."""
    for step in range(first, last + 1):
        record = StepRecord(
            step, logger.attempt, loss=float(step), grad_norm=step / 10, seconds=0.1
        )
        logger.step(replace(record, **facts))


def score(logger: ExpectingRunLogger, step: int, loss: float) -> None:
    other = HeldOutFacts(name="news", loss=9.0, rows=1, targets=1)
    logger.scores(step, [other, HeldOutFacts(name="held_out", loss=loss, rows=1, targets=1)], 0.0)


def outcomes(logger: ExpectingRunLogger) -> list[Outcome]:
    return of_kind(logger.ledger.entries, Outcome)


def test_a_loss_is_the_median_of_the_last_steps(start: Start) -> None:
    """Catches a single step, steps of before the change, and an outcome that comes twice."""
    logger = ExpectingRunLogger(start)
    stated(logger, 0, "loss under 30 within 40 steps")
    stated(logger, 0, "gradient norm over 3.05 within 40 steps")
    stated(logger, 0, "loss under 2.5 within 3 steps")
    train(logger, 1, 39)
    assert [one.due_step for one in outcomes(logger)] == [3]
    train(logger, 40, 45)

    short, loss, norm = outcomes(logger)
    # Steps 1 to 3, then 21 to 40.
    assert (short.value, short.met) == (2.0, True)
    assert (loss.step, loss.measured_step, loss.value, loss.met) == (40, 40, 30.5, False)
    assert norm.value == pytest.approx(3.05, rel=1e-9) and MEDIAN_STEPS == 20


def test_restarts_in_between_change_nothing(start: Start) -> None:
    """Catches an outcome of the steps of one start, of undone steps, and one that stays undone."""
    first = ExpectingRunLogger(start)
    first.event(event(Resumed, attempt=1, step=0))
    stated(first, 1, "loss under 30 within 39 steps")
    train(first, 1, 30)
    train(first, 31, 35, loss=1e3)

    second = ExpectingRunLogger(start)
    second.event(event(Resumed, attempt=2, step=30))
    train(second, 31, 42)
    (found,) = outcomes(second)
    assert (found.due_step, found.value) == (40, 30.5)

    third = ExpectingRunLogger(start)
    third.event(event(Resumed, attempt=3, step=38))
    train(third, 39, 41)
    assert [(one.attempt, one.value) for one in outcomes(third)] == [(2, 30.5), (3, 30.5)]


def test_steps_that_were_not_applied_do_not_count(start: Start) -> None:
    logger = ExpectingRunLogger(start)
    stated(logger, 0, "loss under 9 within 4 steps")
    train(logger, 1, 4, applied=False, loss=float("nan"))
    (found,) = outcomes(logger)
    assert (found.value, found.met, found.measured_step) == (None, None, None)


def test_the_held_out_loss_is_of_the_last_evaluation_in_time(start: Start) -> None:
    """Catches one of before the change, one of after the time although there was one in it, and
    the loss of another set.
    """
    logger = ExpectingRunLogger(start)
    train(logger, 1, 10)
    score(logger, 10, 5.0)
    stated(logger, 10, "held-out loss under 4 within 12 steps")
    train(logger, 11, 20)
    score(logger, 20, 3.0)
    train(logger, 21, 22)
    assert outcomes(logger) == []
    train(logger, 23, 30)
    score(logger, 30, 8.0)
    (found,) = outcomes(logger)
    assert (found.step, found.measured_step, found.value, found.met) == (23, 20, 3.0, True)


@pytest.mark.parametrize("within", (5, 10))
def test_or_of_the_next_one(start: Start, within: int) -> None:
    """Catches one that is never measured, one measured on the due step before its evaluation, and
    the score of before the change.
    """
    logger = ExpectingRunLogger(start)
    train(logger, 1, 10)
    score(logger, 10, 1.0)
    stated(logger, 10, f"held-out loss under 4 within {within} steps")
    train(logger, 11, 20)
    score(logger, 20, 4.5)
    train(logger, 21, 22)
    (found,) = outcomes(logger)
    assert (found.due_step, found.measured_step, found.met) == (10 + within, 20, False)


def test_scores_of_weights_that_were_given_up_do_not_count(start: Start) -> None:
    first = ExpectingRunLogger(start)
    first.event(event(Resumed, attempt=1, step=0))
    stated(first, 1, "held-out loss under 4 within 22 steps")
    train(first, 1, 20)
    score(first, 20, 1.0)
    second = ExpectingRunLogger(start)
    second.event(event(Resumed, attempt=2, step=15))
    train(second, 16, 30)
    assert outcomes(second) == []
    score(second, 30, 6.0)
    assert [one.value for one in outcomes(second)] == [6.0]


def test_nor_do_they_where_no_score_has_replaced_them(start: Start) -> None:
    """Catches a given-up score that a third start reads, since the second one had none there."""
    first = ExpectingRunLogger(start)
    first.event(event(Resumed, attempt=1, step=0))
    stated(first, 1, "held-out loss under 4 within 22 steps")
    train(first, 1, 21)
    score(first, 20, 1.0)
    second = ExpectingRunLogger(start)
    second.event(event(Resumed, attempt=2, step=15))
    train(second, 16, 17)
    score(second, 17, 6.0)
    train(second, 18, 21)
    third = ExpectingRunLogger(start)
    third.event(event(Resumed, attempt=3, step=21))
    train(third, 22, 30)
    assert [(one.measured_step, one.value) for one in outcomes(third)] == [(17, 6.0)]


def test_at_the_end_of_the_stage_everything_is_answered(start: Start) -> None:
    """Catches an expectation beyond the last step, which nobody would ever answer."""
    logger = ExpectingRunLogger(start)
    stated(logger, 90, "loss under 95.7 within 900 steps")
    stated(logger, 90, "held-out loss under 95 within 900 steps")
    train(logger, 91, TOTAL)
    logger.event(Finished(attempt=1, step=TOTAL))
    loss, held_out = outcomes(logger)
    assert (loss.due_step, loss.value, loss.met) == (TOTAL, 95.5, True)
    assert (held_out.value, held_out.met) == (None, None)
    assert isinstance(logger.ledger.entries[-1].event, Finished)
