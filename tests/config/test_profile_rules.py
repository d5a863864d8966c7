"""Rules on `profile`: what they refuse, and what they say to write instead."""

import pytest

from k2train.config.profile_rules import (
    PROFILE_RULES,
    check_profile_steps,
    profile_world_mistake,
)
from k2train.errors import ConfigError

Steps = tuple[int, int] | None


def _mistakes(steps: Steps, actions: Steps = None) -> list[str]:
    values = {"profile.steps": steps, "profile.actions": actions}
    found = [check(values) for _, check in PROFILE_RULES]
    return [text for text in found if text is not None]


def test_steps_are_in_order_and_few() -> None:
    """Catches a profile of a whole run, whose trace nothing opens."""
    assert _mistakes(None) == _mistakes((3, 3)) == _mistakes((1, 100)) == []
    assert _mistakes((12, 10)) == [
        "profile.steps ([12, 10]) must be [first, last], the last not before the first; nearest is "
        "[10, 12]"
    ]
    assert _mistakes((10, 110)) == [
        "profile.steps ([10, 110]) are 101 steps, at most 100; nearest is [10, 109]"
    ]


def test_actions_are_of_steps_without_the_profiler() -> None:
    """Catches actions that torch's profiler slows down, and are compared with a plan."""
    assert (
        _mistakes(None, (10, 12)) == _mistakes((1, 9), (10, 12)) == _mistakes((5, 6), (2, 4)) == []
    )
    assert _mistakes((10, 11), (11, 13)) == [
        "profile.actions ([11, 13]) must not share a step with profile.steps ([10, 11]), which "
        "torch's profiler slows down; nearest is [12, 14]"
    ]
    assert _mistakes(None, (3, 2)) == [
        "profile.actions ([3, 2]) must be [first, last], the last not before the first; nearest "
        "is [2, 3]"
    ]


def test_the_rank_is_one_of_the_world() -> None:
    values = {"profile.steps": (1, 2), "profile.ranks": 4}
    assert profile_world_mistake(values, 5) is None
    assert "nearest is 3" in str(profile_world_mistake(values, 4))
    assert profile_world_mistake(values | {"profile.ranks": "all"}, 1) is None
    assert profile_world_mistake(values | {"profile.steps": None}, 1) is None


def test_the_steps_are_in_the_run() -> None:
    check_profile_steps(None, 1)
    check_profile_steps((9, 10), 10)
    with pytest.raises(ConfigError, match=r"must lie within the 10 steps of this run"):
        check_profile_steps((10, 11), 10)
    with pytest.raises(ConfigError, match=r"or set profile.actions=null"):
        check_profile_steps((10, 11), 10, "profile.actions")
