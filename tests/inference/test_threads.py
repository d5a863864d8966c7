"""Threads of a small model: one, unless the environment says how many."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from k2train.inference.session import joined
from k2train.inference.threads import SMALL, threads_for
from k2train.launch.environment import Launch
from k2train.train.setup import Setup
from tests.support.tiny_model import tiny_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process with three threads that nobody asked for."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def inside(hidden_size: int, device: torch.device = CPU) -> int:
    with threads_for(hidden_size, device):
        return torch.get_num_threads()


def test_small_models_take_one() -> None:
    """Catches a small model on all cores, and a large one that is left with one."""
    assert inside(SMALL - 1) == 1
    assert inside(SMALL) == 3
    assert inside(64, torch.device("cuda")) == 3, "the host's threads are no matter of the model's"


@pytest.mark.parametrize("name", ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
def test_what_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches a default that overrides the environment."""
    monkeypatch.setenv(name, "3")
    assert inside(64) == 3


def test_they_come_back() -> None:
    """Catches a process that stays with one thread after the model, also after an error."""
    with pytest.raises(ValueError, match="within"), threads_for(64, CPU):
        raise ValueError("within")
    assert torch.get_num_threads() == 3


def test_a_session_computes_so() -> None:
    """Catches a context that no command enters."""
    architecture = Setup.of(tiny_config(), 1).architecture
    source: Any = SimpleNamespace(architecture=architecture, path="tiny")
    with joined(source, Launch(0, 1, 0, False), 1, 1) as ranks:
        assert ranks.device == CPU
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
