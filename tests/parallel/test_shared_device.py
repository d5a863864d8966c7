"""Devices of the ranks of a machine, and the backend of their group."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from k2train.errors import ConfigError, RunError
from k2train.launch.environment import RANKS_PER_DEVICE, Launch, read_ranks_per_device
from k2train.parallel.grid import choose_device, start_process_group


def local(rank: int, world: int = 8) -> Launch:
    return Launch(rank, world, rank, launched=True)


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.delenv(RANKS_PER_DEVICE, raising=False)
    return monkeypatch


def test_each_rank_has_a_device_of_its_own(two_devices: pytest.MonkeyPatch) -> None:
    """Catches ranks that share a device without being asked to."""
    assert [choose_device(local(rank)).index for rank in range(2)] == [0, 1]
    with pytest.raises(ConfigError, match="needs a CUDA device of its own, 2 are visible"):
        choose_device(local(2))


def test_ranks_share_devices_where_asked(two_devices: pytest.MonkeyPatch) -> None:
    """Catches a second device that stays empty, and a rank beyond the last one."""
    two_devices.setenv(RANKS_PER_DEVICE, "3")
    assert [choose_device(local(rank)).index for rank in range(6)] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ConfigError, match=r"LOCAL_RANK \(6\) needs device 2 \(3 ranks each\)"):
        choose_device(local(6))


@pytest.mark.parametrize(
    ("device", "shared", "backend"),
    [
        ("cpu", "", "gloo"),
        ("cpu", "4", "gloo"),
        ("cuda", "", "nccl"),
        ("cuda", "1", "nccl"),
        ("cuda", "4", "cpu:gloo,cuda:gloo"),
    ],
)
def test_ranks_on_one_device_exchange_through_host_memory(
    two_devices: pytest.MonkeyPatch, device: str, shared: str, backend: str
) -> None:
    """Catches NCCL for two ranks of one device, which it refuses, and gloo for anyone else."""
    asked: list[str] = []
    two_devices.setenv(RANKS_PER_DEVICE, shared)
    two_devices.setattr(dist, "init_process_group", lambda name, **_: asked.append(name))
    start_process_group(Launch(0, 1, 0, launched=False), torch.device(device, 0))
    assert asked == [backend]


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_wrong_number_of_ranks_is_one_line(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a typing mistake that gives each rank a device of its own after all."""
    monkeypatch.setenv(RANKS_PER_DEVICE, text)
    with pytest.raises(RunError, match=f"{RANKS_PER_DEVICE} must be a whole number"):
        read_ranks_per_device()


def test_a_pipeline_needs_a_device_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches transfers of device memory over a socket, which fail without a word that helps."""
    from k2train.train import run

    start: Any = SimpleNamespace(layout=SimpleNamespace(pipeline=2))
    monkeypatch.setenv(RANKS_PER_DEVICE, "4")
    run._check_shared_device(start, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"parallel.pipeline \(2\) needs a device for each rank"):
        run._check_shared_device(start, torch.device("cuda", 0))
    start.layout.pipeline = 1
    run._check_shared_device(start, torch.device("cuda", 0))
    monkeypatch.delenv(RANKS_PER_DEVICE)
    start.layout.pipeline = 2
    run._check_shared_device(start, torch.device("cuda", 0))
