"""Curves of mirrors: names, groups, axes, and values that are left out."""

import pytest

from k2train.record.branch import branch
from k2train.record.curves import Curves
from k2train.record.energy import Site
from k2train.record.held_out import HeldOutRecord
from k2train.record.metrics import StepRecord


def test_a_step_has_no_junk_and_what_is_unknown_is_left_out() -> None:
    """Catches a curve of row numbers or attempts, and one of zeros where nothing is known."""
    curves = Curves(rank_flops_per_token=2e9, site=Site(500.0, 1.2), devices=4)
    known = curves.of_step(
        StepRecord(
            3,
            2,
            consumed_tokens=300,
            loss=1.5,
            grad_norm=0.5,
            lr=0.1,
            rows=[4, 8],
            tokens_per_second=1000.0,
            mfu=0.4,
            seconds=7.2,
            peak_memory_bytes=2**31,
            update_norm=0.01,
            subsets={"web": [10, 1.25]},
            device={"cpu_cores": 1.5, "utilization": 0.9, "memory_bytes": 2**31, "celsius": 60.0},
        )
    )
    assert known == {
        "loss/train": 1.5,
        "loss_over_tokens/train": 1.5,
        "loss_over_hours/train": 1.5,
        "loss_by_subset/web": 1.25,
        "optimizer/grad_norm": 0.5,
        "optimizer/lr": 0.1,
        "optimizer/update_norm": 0.01,
        "optimizer/skipped": 0.0,
        "speed/tokens_per_second": 1000.0,
        "speed/seconds_per_step": 7.2,
        "speed/mfu": 0.4,
        "speed/tflops_per_rank": 2.0,
        "memory/peak_gib": 2.0,
        "device/cpu_cores": 1.5,
        "device/utilization_percent": 90.0,
        "device/memory_gib": 2.0,
        "device/celsius": 60.0,
        # 7.2 s of 4 devices at 500 W are 4 Wh.
        "energy/kwh": pytest.approx(0.0048),
    }
    assert curves.tokens == 300 and curves.hours == pytest.approx(0.002)
    unknown = Curves().of_step(StepRecord(1))
    assert not {"speed/mfu", "speed/tflops_per_rank", "memory/peak_gib"} & unknown.keys()


def test_hours_continue_behind_earlier_steps() -> None:
    curves = Curves()
    curves.begin(500, 3600.0)
    assert (curves.tokens, curves.hours) == (500, 1.0)
    curves.of_step(StepRecord(9, seconds=1800.0, consumed_tokens=550))
    assert (curves.tokens, curves.hours) == (550, 1.5)


def test_energy_is_by_the_power_that_was_read_last() -> None:
    """Catches steps between two readings without energy, and an assumption that hides them."""
    curves = Curves(site=Site(100.0), devices=2)
    for watts in (None, 700.0, None):
        device = {"cpu_cores": 1.0} if watts is None else {"power_watts": watts}
        curves.of_step(StepRecord(1, seconds=10.0, device=device))
    assert curves.joules == 2 * 10 * (100 + 700 + 700)
    assert "energy/kwh" not in Curves().of_step(StepRecord(1, seconds=10.0))


def test_effective_time_is_of_all_time_since_the_run_began() -> None:
    """Catches a share of the time of this start, and one before anything is known."""
    curves = Curves()
    assert curves.of_time(5000.0) == {}
    curves.began = 1000.0
    curves.begin(500, 1800.0)
    assert curves.of_time(8200.0) == {
        "time/effective_percent": 25.0,
        "time/hours": 2.0,
        "time/lost_hours": 1.5,
    }


def test_sets_and_subsets_are_apart() -> None:
    """Catches another set's loss in the curve of the run's own."""
    own = Curves().of_score(HeldOutRecord(1, 1, "held_out", 2.0, subsets={"web": 3.0}))
    other = Curves().of_score(HeldOutRecord(1, 1, "web", 4.0, subsets={"web": 5.0}))
    assert own["loss/held_out"] == 2.0 and own["held_out_by_subset/web"] == 3.0
    assert other["loss/held_out_web"] == 4.0 and other["held_out_web_by_subset/web"] == 5.0
    assert not own.keys() & other.keys()


def test_the_branch_has_no_step_that_was_undone() -> None:
    """Catches the tail of a given-up branch behind a start that has not come so far."""
    rows = [StepRecord(step, 1) for step in range(1, 11)]
    rows += [StepRecord(step, 2) for step in range(5, 8)]
    rows += [StepRecord(7, 3)]
    kept = branch(rows)
    assert [(row.step, row.attempt) for row in kept] == [
        *((step, 1) for step in range(1, 5)),
        (5, 2),
        (6, 2),
        (7, 3),
    ]
    scores = [HeldOutRecord(5, 1, name) for name in ("held_out", "web")]
    assert branch(scores) == scores
