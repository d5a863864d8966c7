"""What tests of one process share is put back after each: the guard of `tests/conftest.py`."""

import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support import large_values, left_behind
from tests.support.left_behind import State

CHANGES: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "the working folder": (lambda: os.chdir("/"), os.getcwd),
    "the environment's K2TRAIN_LEFT": (
        lambda: os.environ.update(K2TRAIN_LEFT="1"),
        lambda: os.environ.get("K2TRAIN_LEFT"),
    ),
    "the environment's PATH": (
        lambda: os.environ.pop("PATH"),
        lambda: os.environ.get("PATH"),
    ),
    "the handler of SIGUSR2": (
        lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
        lambda: signal.getsignal(signal.SIGUSR2),
    ),
    "logging.disable": (
        lambda: logging.disable(logging.ERROR),
        lambda: logging.root.manager.disable,
    ),
    "torch's threads": (
        lambda: torch.set_num_threads(torch.get_num_threads() + 1),
        torch.get_num_threads,
    ),
    "torch's default type": (
        lambda: torch.set_default_dtype(torch.float64),
        torch.get_default_dtype,
    ),
    "torch's deterministic algorithms": (
        lambda: torch.use_deterministic_algorithms(True),
        torch.are_deterministic_algorithms_enabled,
    ),
    "torch's gradient mode": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named_and_put_back(name: str) -> None:
    """Catches a guard that looks away, under which a failure has another file's name."""
    change, read = CHANGES[name]
    before, state = read(), State()
    assert list(state.put_back()) == []
    change()
    assert read() != before
    (line,) = state.put_back()
    assert line.startswith(f"{name} was ")
    assert read() == before


def test_a_variable_of_a_library_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an address that a library has put there for itself, and looks for later."""
    state = State()
    monkeypatch.setenv("_SOME_LIBRARY", "1")
    assert list(state.put_back()) == [] and os.environ["_SOME_LIBRARY"] == "1"


def test_a_thread_at_work_is_found_and_one_that_ends_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a thread that works on under the next test, and a guard that waits for none."""
    state, go_on = State(), threading.Event()
    late = threading.Thread(target=lambda: go_on.wait(), name="late")
    late.start()
    with monkeypatch.context() as patch:
        patch.setattr(left_behind, "END_SECONDS", 0.0)
        assert list(state.put_back()) == ["the thread late works on"]
    threading.Timer(0.05, go_on.set).start()
    monkeypatch.setattr(left_behind, "END_SECONDS", 600.0)
    assert list(state.put_back()) == []


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([(1, b"\x01\xff" * 100_000)], [(1, b"\x01\xfe" * 100_000)]),
        ("ab" * 200_000, "ba" * 200_000),
    ],
    ids=["list", "text"],
)
def test_large_values_that_differ_are_told_in_a_line(
    left: Any, right: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a comparison by pytest of some megabytes line by line, which takes an hour."""
    assert large_values.difference(left, right), "pytest would compare them itself, for an hour"
    monkeypatch.setenv("CI", "true")
    with pytest.raises(AssertionError, match=r"two large \w+s differ\n.*at character \d+ of") as e:
        assert left == right
    assert len(str(e.value)) < 1000


def test_small_values_are_left_to_pytest() -> None:
    """Catches a threshold that hides the differences of what can be read, and one that leaves
    large values to pytest, also where only one of the two is large.
    """
    # As written, with two quotes.
    most = "a" * (large_values.SHORT - 2)
    assert large_values.difference(most, "b") is None
    assert large_values.difference("b", most) is None
    for left, right in ((most + "a", "b"), ("b", most + "a"), ([most], ["b"])):
        assert large_values.difference(left, right), (len(left), len(right))
    assert large_values.difference(most + "a", [most]) is None, "of two types"
    assert 1_000 < large_values.SHORT < 100_000
