"""Recheck of a step that raises an alarm: computed again from the same state and batch, by bits.

- The first results are judged before the update. An alarm (loss or norm far from usual, or not
  finite) has the step's forward and backward done again.
- The same bits: data or state are the cause, and the step goes on to the spike policy.
- Other bits: hardware or nondeterminism. A third pass decides, and the result that two passes share
  is applied. If no two are equal, the run stops and names the ranks.
- Each rank compares its own part: its losses and a digest of its own gradients, as they were before
  any rank's were added. The rank whose part differs is named.
- An ordinary step costs no further pass, collective or wait: the host reads the decision before it
  queues the update instead of behind it.

Alternatives considered:
- Loss alone, as other frameworks compare: a wrong gradient leaves the loss as it was.
- A digest of each rank's gradients in every step: the sums stay in memory until the next step
  anyway, so they are read when an alarm asks for them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor

from k2train.optim.grad_norm import StepDecision, StepSums
from k2train.parallel.agreement import Agreement
from k2train.parallel.grad_buffer import GradientBuffer
from k2train.parallel.grid import ProcessGrid
from k2train.text import counted

BLOCK = 1 << 20
"""Elements of a digest at a time."""
SHOWN = 8
"""Tensors that a message names."""


class OwnPart(NamedTuple):
    """What one rank computed by itself, as hexadecimal text."""

    loss: str
    gradients: str
    """Digest of the gradients that no other rank has a share in."""
    shared: str
    """Digest of all, those summed over tensor-parallel ranks included."""


_PARTS = TypeAdapter(list[OwnPart])


@dataclass(frozen=True)
class StepPass:
    """One computation of a step: the reduced gradient, the decision, and this rank's loss."""

    gradient: Tensor
    decision: StepDecision
    loss: Tensor


@dataclass(frozen=True)
class Rechecked:
    """Outcome of a recheck; equal on every rank."""

    same: bool
    """Whether the first two passes gave the same bits on every rank."""
    ranks: tuple[int, ...]
    """Ranks whose own part differs between passes; empty if all are equal."""
    sums: tuple[StepSums, ...]
    """The agreed sums of each pass."""
    tensors: tuple[str, ...]
    """Tensors whose gradient norm differs, the first `SHOWN`."""
    applied: int | None
    """Number of the pass that counts, from 1; None if no two were equal."""


class UnrepeatableError(RuntimeError):
    """No two of three computations of a step were equal; raised on every rank alike."""

    def __init__(self, found: Rechecked):
        losses = ", ".join(f"{one.loss:.9g}" for one in found.sums)
        norms = ", ".join(f"{one.grad_norm:.9g}" for one in found.sums)
        super().__init__(
            f"{ranks_text(found.ranks)} computed the step {counted(len(found.sums), 'time')} from "
            f"the same state and batch, each with another result (loss {losses}; gradient norm "
            f"{norms}): hardware or nondeterminism, not the data; replace the device, or set "
            "kernels.deterministic=true"
        )
        self.found = found


@dataclass(frozen=True)
class StepJudge:
    """How a step is judged before its update; the same on every rank."""

    alarm: Callable[[float, float], bool]
    """Whether a finite loss and gradient norm are far from usual."""
    recheck: bool
    """Whether an alarm has the step done again."""
    leaves_out: Callable[[float, float], bool]
    """Whether a step with a finite loss and norm is left out: its update is not applied."""


@dataclass(frozen=True)
class Judged:
    """What a judged step goes on with."""

    step: StepPass
    sums: StepSums
    recheck: Rechecked | None = None
    outlier: bool = False
    """Whether the step is left out because it raised an alarm."""

    @property
    def applies(self) -> bool:
        """Whether the update is applied."""
        return self.sums.applied and not self.outlier


def judge_step(
    compute: Callable[[], StepPass],
    read: Callable[[StepDecision], StepSums],
    gradients: GradientBuffer,
    grid: ProcessGrid,
    judge: StepJudge,
) -> Judged:
    """Compute a step, and again where it raises an alarm; collective.

    `compute` does forward, backward and reduction and overwrites what it did before. `read` waits
    for the device. Raises UnrepeatableError when no two of three passes are equal.
    """
    step = compute()
    sums = read(step.decision)
    if not (judge.recheck and _alarms(judge, sums)):
        return Judged(step, sums, outlier=_is_left_out(judge, sums))

    found, parts = [sums], [own_part(step.loss, gradients)]

    def again() -> StepPass:
        step = compute()
        found.append(read(step.decision))
        parts.append(own_part(step.loss, gradients))
        return step

    step = again()
    told = _gather(parts, grid)
    if not _equal(0, 1, told, found):
        step = again()
        told = _gather(parts, grid)
    outcome = _outcome(told, found)
    if outcome.applied is None:
        raise UnrepeatableError(outcome)

    # The gradient in memory is the last pass's, which is one of the two equal ones, or the second
    # pass was wrong alone and the last one equals the first.
    last = found[-1]
    return Judged(step, last, outcome, _is_left_out(judge, last))


def _alarms(judge: StepJudge, sums: StepSums) -> bool:
    return not sums.applied or judge.alarm(sums.loss, sums.grad_norm)


def _is_left_out(judge: StepJudge, sums: StepSums) -> bool:
    return sums.applied and judge.leaves_out(sums.loss, sums.grad_norm)


@torch.no_grad()
def own_part(loss: Tensor, gradients: GradientBuffer) -> OwnPart:
    """Describe this rank's part of a step whose gradients were reduced, and not yet used."""
    own, shared = gradients.local_sums()
    digest = _digest(own)
    losses = " ".join(one.hex() for one in loss.double().reshape(-1).tolist())
    return OwnPart(losses, digest, f"{digest}.{_digest(shared)}")


def _digest(sums: Sequence[Tensor]) -> str:
    """Digest of fp32 tensors: their bits times odd factors, added modulo 2^64."""
    device = sums[0].device if sums else torch.device("cpu")
    total, position = torch.zeros((), dtype=torch.int64, device=device), 0
    for part in sums:
        for block in part.reshape(-1).split(BLOCK):
            factors = torch.arange(position, position + block.numel(), device=device)
            total += (block.view(torch.int32).long() * (2 * factors + 1)).sum()
            position += block.numel()
    return f"{int(total) & (1 << 64) - 1:016x}"


def _gather(parts: Sequence[OwnPart], grid: ProcessGrid) -> list[list[OwnPart]]:
    """Every rank's parts, one of each pass."""
    return Agreement(grid).all(list(parts), _PARTS, "recheck a step")


def _equal(a: int, b: int, told: Sequence[Sequence[OwnPart]], sums: Sequence[StepSums]) -> bool:
    same_sums = _bits(sums[a]) == _bits(sums[b])
    return same_sums and all(parts[a] == parts[b] for parts in told)


def _bits(sums: StepSums) -> tuple[str, ...]:
    return (sums.loss.hex(), sums.grad_norm.hex(), *(norm.hex() for norm in sums.norms.values()))


def _outcome(told: Sequence[Sequence[OwnPart]], sums: Sequence[StepSums]) -> Rechecked:
    """What two or three passes agree on."""
    last = len(sums) - 1
    # Three passes are done only when the first two differ: one of them must equal the last.
    agreed = any(_equal(n, last, told, sums) for n in range(last))
    return Rechecked(
        same=last == 1,
        ranks=_ranks_apart(told),
        sums=tuple(sums),
        tensors=_tensors_apart(sums),
        applied=last + 1 if agreed else None,
    )


def _ranks_apart(told: Sequence[Sequence[OwnPart]]) -> tuple[int, ...]:
    """Ranks whose own part differs between passes, or, without one, whose shared part does."""

    def apart(of: Callable[[OwnPart], tuple[str, ...]]) -> tuple[int, ...]:
        return tuple(rank for rank, parts in enumerate(told) if len(set(map(of, parts))) > 1)

    return apart(lambda part: (part.loss, part.gradients)) or apart(lambda part: (part.shared,))


def _tensors_apart(sums: Sequence[StepSums]) -> tuple[str, ...]:
    names = sums[0].norms
    apart = [name for name in names if len({one.norms[name].hex() for one in sums}) > 1]
    return tuple(apart[:SHOWN])


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 2, 3`; no rank by itself where only the sums differ."""
    if not ranks:
        return "the exchange between the ranks"
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def recheck_text(found: Rechecked) -> str:
    """Say what a recheck showed, in a line."""
    if found.same:
        return "the same bits, so data or state are the cause"
    if found.applied is None:
        return f"{counted(len(found.sums), 'time')}, each with another result"
    where = f"; first in {found.tensors[0]}" if found.tensors else ""
    return (
        f"other bits; {ranks_text(found.ranks)} computed two results (hardware or "
        f"nondeterminism{where}); the one that came twice is applied, no data is blamed"
    )
