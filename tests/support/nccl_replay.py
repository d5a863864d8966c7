"""Replay of pipeline transfers under NCCL's point-to-point rules, from what the executor issues.

- `issued` runs the real executor of a rank on toy stages, and records in host order what would go
  to the device: computing, sends, receives, and waits of the computing stream for a transfer.
- `replay` plays all ranks' records together and returns what never ends and what is crossed.
- NCCL ignores tags: a send meets whatever its peer runs on the communicator at that time. It runs
  one operation a communicator at a time, in the order in which they were issued.
- A transfer starts after all computing that was issued before it. A wait holds up the computing
  that is issued after it.

Alternatives considered:
- Two processes on gloo: gloo matches by tag and buffers, so it forgives every order.
- The lists of actions alone: an executor that issues them in another order would not be seen.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.parallel import pipeline
from k2train.parallel.grid import Axis
from k2train.parallel.pipeline import Executor
from k2train.plan.layout import Layout
from k2train.plan.schedule import Action, Program


@dataclass(frozen=True)
class Compute:
    """Kernels of one action."""

    name: str


@dataclass(frozen=True)
class Transfer:
    """One end of a transfer. `tag` says which tensor is meant; NCCL does not look at it."""

    name: str
    peer: int
    sends: bool
    tag: int


@dataclass(frozen=True)
class Wait:
    """The computing stream waits for the transfer that was issued at this index."""

    name: str
    transfer: int


Issued = Compute | Transfer | Wait


@dataclass(frozen=True)
class Rules:
    """Which transfers share a communicator, and whether all streams share one hardware queue.

    - `pair`: one communicator for each two ranks, as NCCL makes for unbatched transfers of a group
      that is not bound to a device. `parent`: one for the whole group.
    - `one_queue`: CUDA_DEVICE_MAX_CONNECTIONS=1. Work is begun in the order in which it was issued,
      whatever its stream.
    """

    communicator: Literal["pair", "parent"]
    one_queue: bool


RULES = tuple(Rules(name, queue) for name in ("pair", "parent") for queue in (False, True))  # type: ignore[arg-type]


class _Recorder:
    """Stands for `torch.distributed` inside the executor."""

    Work = dist.Work

    def __init__(self) -> None:
        self.issued: list[Issued] = []
        self._name = ""

    def about(self, action: Action) -> None:
        """Called by the executor before every action."""
        self._name = str(action)
        if action.op.is_compute:
            self.issued.append(Compute(self._name))

    def isend(self, tensor: Tensor, group: Any, group_dst: int, tag: int) -> "_Work":
        return self._transfer(Transfer(self._name, group_dst, True, tag))

    def irecv(self, tensor: Tensor, group: Any, group_src: int, tag: int) -> "_Work":
        return self._transfer(Transfer(self._name, group_src, False, tag))

    def _transfer(self, transfer: Transfer) -> "_Work":
        self.issued.append(transfer)
        return _Work(self, len(self.issued) - 1)


@dataclass(frozen=True)
class _Work:
    recorder: _Recorder
    index: int

    def wait(self) -> None:
        name = self.recorder.issued[self.index].name
        self.recorder.issued.append(Wait(f"wait for {name}", self.index))

    def is_completed(self) -> bool:
        """The host runs ahead of the device, so nothing has ended yet."""
        return False


def issued(program: Program, layout: Layout, rank: int) -> list[Issued]:
    """Return what the executor of pipeline rank `rank` issues for `program`, in order."""
    recorder = _Recorder()
    stages = {stage: lambda x: 2 * x for stage in layout.stages_of(rank)}
    axis = Axis("pp", layout.pipeline, rank, None)
    executor = Executor(stages, layout.num_stages, axis, torch.device("cpu"))
    with mock.patch.object(pipeline, "dist", recorder):
        executor.run(
            program,
            lambda microbatch: torch.zeros(1, requires_grad=True),
            lambda y, microbatch: y.sum(),
            (1,),
            torch.float32,
            before=recorder.about,
        )
    return recorder.issued


def different_orders(ranks: Sequence[Sequence[Issued]]) -> list[tuple[int, int]]:
    """Return the pairs of ranks whose two ends see their transfers in different orders."""
    seen: dict[tuple[int, int], list[tuple[bool, int]]] = defaultdict(list)
    for rank, events in enumerate(ranks):
        for event in events:
            if isinstance(event, Transfer):
                forwards = event.sends == (rank < event.peer)
                seen[(rank, event.peer)].append((forwards, event.tag))
    pairs = {(min(pair), max(pair)) for pair in seen}
    return sorted(pair for pair in pairs if seen[pair] != seen[pair[::-1]])


@dataclass
class Outcome:
    """What came of a replay; nothing is wrong when both lists are empty."""

    stuck: list[str] = field(default_factory=list)
    """What never ended, with its rank."""
    crossed: list[str] = field(default_factory=list)
    """Transfers that met the wrong tensor."""


class _Rank:
    """The queues of one device."""

    def __init__(self, rank: int, events: Sequence[Issued], rules: Rules):
        self.rank, self.events, self.rules = rank, events, rules
        self.done = [False] * len(events)
        self.running: dict[Any, int] = {}
        """Communicator -> index of its transfer under way."""
        self._begun = 0
        self._needs: list[tuple[int, ...]] = []
        self._queues: dict[Any, list[int]] = defaultdict(list)

        computing: tuple[int, ...] = ()
        for index, event in enumerate(events):
            if isinstance(event, Transfer):
                # It reads, or writes, what the computing stream has handed over.
                self._needs.append(computing)
                self._queues[self.communicator(event)].append(index)
            else:
                waited = (event.transfer,) if isinstance(event, Wait) else ()
                self._needs.append(waited)
                self._queues["computing"].append(index)
                computing = (index,)

    def communicator(self, transfer: Transfer) -> Any:
        """Return what the transfer shares with others that must take turns with it."""
        if self.rules.communicator == "parent":
            return "parent"
        return (min(self.rank, transfer.peer), max(self.rank, transfer.peer))

    def advance(self) -> bool:
        """Begin what can begin; whether anything did."""
        moved = False
        for name, queue in self._queues.items():
            while queue and name not in self.running and self._may_begin(queue[0]):
                index, moved = queue.pop(0), True
                self._begun += 1
                if isinstance(self.events[index], Transfer):
                    self.running[name] = index
                else:
                    self.done[index] = True
        return moved

    def _may_begin(self, index: int) -> bool:
        in_turn = not self.rules.one_queue or index == self._begun
        return in_turn and all(self.done[need] for need in self._needs[index])


def replay(ranks: Sequence[Sequence[Issued]], rules: Rules) -> Outcome:
    """Play what all ranks issued until nothing moves."""
    devices = [_Rank(rank, events, rules) for rank, events in enumerate(ranks)]
    outcome = Outcome()
    moved = True
    while moved:
        moved = any([device.advance() for device in devices])
        moved |= any([_meet(device, devices, outcome) for device in devices])

    outcome.stuck = [
        f"rank {device.rank}: {event.name}"
        for device in devices
        for event, done in zip(device.events, device.done, strict=True)
        if not done
    ]
    return outcome


def _meet(device: _Rank, devices: Sequence[_Rank], outcome: Outcome) -> bool:
    """End this rank's running sends whose peer runs a receive from it; whether any did."""
    met = False
    for name, index in list(device.running.items()):
        send = device.events[index]
        assert isinstance(send, Transfer), "only transfers stay under way"
        peer = devices[send.peer]
        other = peer.running.get(name)
        if not send.sends or other is None:
            continue
        receive = peer.events[other]
        assert isinstance(receive, Transfer), "only transfers stay under way"
        if receive.sends or receive.peer != device.rank:
            continue

        if receive.tag != send.tag:
            outcome.crossed.append(f"{send.name} met {receive.name}")
        device.done[index] = peer.done[other] = met = True
        del device.running[name], peer.running[name]
    return met
