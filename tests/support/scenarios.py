"""Scenarios that wait side by side: programs started and driven together, judged one by one.

A scenario is a generator: it starts something, yields a condition, goes on when that holds, and
returns what a test judges. Most of its time it waits (for limits, queues, sleeps), so all of them
together take about as long as one.

    SCENARIOS = {"killed": of_kill}                    name -> function that makes the generator

    @judges("killed")
    def test_it_is_named(outcome): ...         what the scenario returned; raised if it raised
"""

import time
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import pytest

from tests.support.forkserver import PATIENCE_SECONDS

POLL_SECONDS = 0.05
Scenario = Generator[Callable[[], object], None, Any]


class UnavailableError(Exception):
    """What a scenario needs is not there; its test is skipped."""


def until(condition: Callable[[], object], every_seconds: float = POLL_SECONDS) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(every_seconds)


def after(seconds: float) -> Callable[[], bool]:
    """A condition: so many seconds have passed since it was first asked for."""
    began: list[float] = []

    def passed() -> bool:
        began[:] = began or [time.monotonic()]
        return time.monotonic() - began[0] >= seconds

    return passed


def side_by_side(scenarios: Mapping[str, Scenario]) -> dict[str, Any]:
    """Drive all to their ends; what each returned, or the exception it ended with."""
    outcomes: dict[str, Any] = {}
    waiting: dict[str, Callable[[], object]] = dict.fromkeys(scenarios, lambda: True)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while waiting and time.monotonic() < deadline:
        for name in list(waiting):
            try:
                if waiting[name]():
                    waiting[name] = next(scenarios[name])
            except StopIteration as end:
                outcomes[name] = end.value
                del waiting[name]
            except Exception as error:
                outcomes[name] = error
                scenarios[name].close()
                del waiting[name]
        time.sleep(POLL_SECONDS)
    for name in waiting:
        scenarios[name].close()
        outcomes[name] = TimeoutError(f"{name} did not end in {PATIENCE_SECONDS:.0f} s")
    return outcomes


def judges(*names: str) -> pytest.MarkDecorator:
    """The scenarios that a test judges, one after the other."""
    return pytest.mark.parametrize("outcome", names, indirect=True)


def chosen(items: Iterable[pytest.Item], scenarios: Mapping[str, Any]) -> list[str]:
    """Names of the scenarios that these tests judge."""
    specs = [item.callspec.params for item in items if hasattr(item, "callspec")]
    return [name for name in scenarios if any(spec.get("outcome") == name for spec in specs)]


def judged(outcome: Any) -> Any:
    """An outcome as a test wants it."""
    if isinstance(outcome, UnavailableError):
        pytest.skip(str(outcome))
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
