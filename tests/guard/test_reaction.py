"""Steps left out in a row, and a return that is to come.

Would catch a run that stands still, and a state that cannot be true.
"""

import pytest

from k2train.guard.reaction import OutlierCounter, Reaction, Return


def test_only_steps_in_a_row_stop_a_run() -> None:
    """Catches a limit on all outliers of a long run, and one that is a step late."""
    counter = OutlierCounter()
    for _ in range(10 * OutlierCounter.limit):
        assert not counter.observe(True) and not counter.observe(False)
    stops = [counter.observe(True) for _ in range(OutlierCounter.limit)]
    assert stops == [False] * (OutlierCounter.limit - 1) + [True]
    assert counter.total == 11 * OutlierCounter.limit
    # One that was let go on is stopped again as late.
    assert [counter.observe(True) for _ in range(OutlierCounter.limit)] == stops


@pytest.mark.parametrize(
    ("reaction", "words"),
    [
        (Reaction(OutlierCounter(3, 2)), "3 steps in a row and 2 in all, of 9"),
        (Reaction(OutlierCounter(1, 10)), "1 steps in a row and 10 in all, of 9"),
        (Reaction(to_return=Return("malignant", 10, 12)), "onset (10) is after step 9"),
    ],
)
def test_what_cannot_be_true_is_named(reaction: Reaction, words: str) -> None:
    """Catches a changed state that a checkpoint brings back."""
    assert words in reaction.contradiction(9)
    assert Reaction(OutlierCounter(1, 2), Return("malignant", 3, 20)).contradiction(9) == ""
    with pytest.raises(ValueError, match="a return at step 2 is before its onset, 3"):
        Return("restart", 3, 2)
