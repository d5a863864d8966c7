"""One rank of a run: what its own thread must do before the others are met."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from k2train.guard.stop_signals import StopRequest
from k2train.launch.environment import Launch
from k2train.train import run


class _MetError(Exception):
    """The ranks would meet now."""


def test_the_thread_that_computes_has_the_ranks_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a device that is set in the thread that waits for the other ranks: each thread has
    its own, and streams and kernels of this one would be those of device 0.
    """
    found: list[tuple[torch.device, threading.Thread]] = []

    def met(*arguments: Any) -> None:
        raise _MetError

    monkeypatch.setattr(run, "choose_device", lambda launch: torch.device("cuda", 1))
    monkeypatch.setattr(
        torch.cuda,
        "set_device",
        lambda device: found.append((device, threading.current_thread())),
    )
    for name in ("_check_shared_device", "prepare_strict_mode", "_check_memory"):
        monkeypatch.setattr(run, name, lambda *arguments: None)
    monkeypatch.setattr(run, "keep_freed_memory", lambda kind: "")
    monkeypatch.setattr(run, "run_hearing", met)
    kernels = SimpleNamespace(deterministic=True)
    start: Any = SimpleNamespace(setup=SimpleNamespace(config=SimpleNamespace(kernels=kernels)))
    with pytest.raises(_MetError):
        run.train(Launch(1, 2, 1, launched=True), start, StopRequest(), None)
    assert found == [(torch.device("cuda", 1), threading.main_thread())]


def test_other_kernels_of_a_rank_are_in_the_first_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a comparison of the ranks' kernels that nobody makes."""
    lines: list[str] = []
    silent = lambda text, at_once=False: None  # noqa: E731
    logger = SimpleNamespace(attempt=1, info=lines.append, progress=silent)
    grid = SimpleNamespace(device=torch.device("cpu"))
    start: Any = SimpleNamespace(
        candidates=(), parent=None, hugging_face=None, setup=SimpleNamespace(programs=())
    )
    calls: dict[str, Any] = {
        "decide_precision": start,
        "choose_checkpoint": SimpleNamespace(path=None, step=0, manifest=None),
        "open_run_logger": logger,
        "make_contact": "met",
        "choose_products": None,
        "Engine": SimpleNamespace(kernels="kernels"),
        "other_kernels": "rank 1 has others",
        "log_starting": None,
        "log_start": None,
    }
    for name, result in calls.items():
        monkeypatch.setattr(run, name, lambda *_, result=result, **__: result)

    def stop(*arguments: Any) -> None:
        raise _MetError

    monkeypatch.setattr(run, "CheckpointManager", stop)
    nothing = lambda *_: None  # noqa: E731
    monitor = SimpleNamespace(previous_end=None, begin=nothing, phase=nothing, attach=nothing)
    monitor.watchdog = SimpleNamespace(progress=nothing)
    opened: Any = SimpleNamespace(grid=grid, monitor=monitor)
    with pytest.raises(_MetError):
        run.build(start, opened)
    assert lines == ["met", "rank 1 has others"]
