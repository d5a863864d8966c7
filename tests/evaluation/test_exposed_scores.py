"""`evaluation/exposed_scores.py`: catches scores of the wrong side of a step, and errors that are
too small.
"""

from collections.abc import Mapping
from math import sqrt
from statistics import mean, stdev

import pytest

from k2train.errors import UserError
from k2train.evaluation.contamination_findings import ItemFinding, PartFinding
from k2train.evaluation.exposed_scores import (
    TARGET_LIKELIHOOD,
    Mean,
    difference,
    exposed_scores,
    metric_of,
)
from k2train.evaluation.results import Item, TaskResult
from k2train.evaluation.scores import main_metric
from tests.evaluation.test_results import item, result


def finding(name: str, label: str, step: int | None = None) -> ItemFinding:
    part = PartFinding("prompt", 20, 13, 20 if step else 0, 1.0, step, 1.0, False, ())
    return ItemFinding(name, label, (part,))


def at(step: int, scores: Mapping[str, float]) -> tuple[TaskResult, list[Item]]:
    items = [item(name, scores={"acc": value}) for name, value in scores.items()]
    return result(step=step, checkpoint=f"ckpt_{step:03d}"), items


FINDINGS = [
    finding("x", "exposed", 3),
    finding("y", "exposed", 10),
    finding("z", "exposed", 30),
    finding("half", "partly"),
    finding("c", "clean"),
    finding("d", "clean"),
    finding("e", "clean"),
]
RESULTS = [
    at(0, {"x": 0, "y": 0, "z": 1, "half": 1, "c": 0, "d": 1, "e": 0}),
    at(10, {"x": 1, "y": 1, "z": 1, "half": 1, "c": 0, "d": 1, "e": 1}),
    at(20, {"x": 1, "y": 0, "z": 0, "half": 1, "c": 1, "d": 1, "e": 0.5}),
]


def test_groups_at_each_checkpoint() -> None:
    """Catches items of another group, and a count of those that were read by then."""
    found = exposed_scores(RESULTS, FINDINGS, "acc")
    assert [one.read for one in found.checkpoints] == [0, 2, 2]
    first, second, _ = found.checkpoints
    assert (first.exposed.items, first.clean.items) == (3, 3)
    assert first.exposed.mean == pytest.approx(1 / 3) == first.clean.mean
    assert second.exposed == Mean(3, 1.0, 0.0)
    assert second.clean.mean == pytest.approx(2 / 3)
    assert second.clean.error == pytest.approx(stdev([0, 1, 1]) / sqrt(3))
    assert second.difference.mean == pytest.approx(1 / 3)
    assert second.difference.error == pytest.approx(second.clean.error)


def test_before_and_after_the_step() -> None:
    """Catches a checkpoint at the step itself that counts as before it, items without one behind
    their step, and clean items at other checkpoints.
    """
    found = exposed_scores(RESULTS, FINDINGS, "acc")
    # A checkpoint at step 10 has the step that exposed y.
    assert found.pairs == {("ckpt_000", "ckpt_010"): 2}
    assert found.exposed_change == Mean(2, 1.0, 0.0)
    changes = [0, 0, 1]
    assert found.clean_change.mean == pytest.approx(mean(changes))
    assert found.clean_change.error == pytest.approx(stdev(changes) / sqrt(3))
    assert found.difference.mean == pytest.approx(1 - 1 / 3)
    assert any("1 of 3 exposed items have no evaluated checkpoint" in one for one in found.notes)
    assert any("3 exposed items are few" in one for one in found.notes)
    assert any("an error of 0 is not certainty" in one for one in found.notes)


def test_clean_items_are_weighted_as_the_exposed_ones() -> None:
    """Catches a mean over pairs that has no exposed item in most of them."""
    exposed = [finding("x", "exposed", 3), finding("y", "exposed", 3), finding("z", "exposed", 15)]
    found = exposed_scores(RESULTS, [*exposed, *FINDINGS[4:]], "acc")
    assert found.pairs == {("ckpt_000", "ckpt_010"): 2, ("ckpt_010", "ckpt_020"): 1}
    changes = [(2 * 0 + 1) / 3, 0, (2 * 1 - 0.5) / 3]
    assert found.clean_change.mean == pytest.approx(mean(changes))
    assert found.exposed_change.mean == pytest.approx(mean([1, 1, -1]))


def test_too_few_for_an_error() -> None:
    """Catches an error of 0 for one item, and a division by none."""
    found = exposed_scores(RESULTS, [finding("x", "exposed", 3), *FINDINGS[3:]], "acc")
    assert found.exposed_change == Mean(1, 1.0, None) and found.difference.error is None
    none = exposed_scores(RESULTS, FINDINGS[3:], "acc")
    assert none.exposed_change == Mean(0, None, None) == none.checkpoints[0].exposed
    assert none.notes == ("no item is exposed, so there is nothing to compare",)
    assert difference(Mean(5, 1.0, 3.0), Mean(4, 3.0, 4.0)) == Mean(4, -2.0, 5.0)


def test_the_metric() -> None:
    """Catches a log-likelihood of another choice, and a metric that nobody asked for."""
    task = result(scores={"acc": 0.5, "acc_norm": 0.2, "f1": 0.1})
    one = item("0", scores={"acc": 1, "acc_norm": 0})
    # By the rule of every other table, among what items have.
    assert metric_of(task, [one], None) == main_metric(task) == "acc_norm"
    assert metric_of(task, [item("0", scores={"acc": 1})], None) == "acc"
    assert metric_of(task, [one], "acc") == "acc"
    strict = item("0", scores={"exact_match,strict": 1})
    assert metric_of(task, [strict], None) == "exact_match,strict"
    own = result(scores={"second": 1.0, "bleu": 3.0})
    assert metric_of(own, [item("0", scores={"bleu": 3, "second": 1})], None) == "second"
    with pytest.raises(UserError, match=r"--metric \(f1\): the items have acc, acc_norm"):
        metric_of(task, [one], "f1")
    with pytest.raises(UserError, match="no scores"):
        metric_of(task, [item("0", scores={}, choices=[], log_likelihoods=[])], None)

    pair = [
        (result(step=step, checkpoint=name), [item("x", choices=["5", "4"], log_likelihoods=own)])
        for step, name, own in ((0, "a", [-1.0, -9.0]), (5, "b", [-1.0, -2.0]))
    ]
    found = exposed_scores(pair, [finding("x", "exposed", 2)], TARGET_LIKELIHOOD)
    assert found.exposed_change == Mean(1, 7.0, None)
