"""Actions of a pipeline program: one operation of one pipeline rank, its inputs and its result.

- A backward pass is one action (B) or two. The stage before waits for the gradient of the stage's
  input (I). The gradients of its weights (W) may come later: nothing waits for them before the
  optimizer (Qi et al. 2023, arXiv:2401.10241).
- Dependents treat I like a full backward B: both give the input gradient, and `result` is its one
  name.
- An action is a value with a short printed form (`0F3`, `1SF0>2`). So a program can be read,
  compared, stored and drawn.

Alternatives considered:
- A callable, or a handle to tensors: nothing could inspect it before it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from k2train.errors import UserError


class ScheduleError(UserError):
    """The schedule is impossible for these numbers, or a list of actions cannot run."""


class Op(StrEnum):
    """Operation of an action. The values are the letters of its printed form."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    SEND_FORWARD = "SF"
    RECV_FORWARD = "RF"
    SEND_BACKWARD = "SB"
    RECV_BACKWARD = "RB"

    # Enum's own hash runs in Python, most of the time of building a long program. str's hash agrees
    # with str's equality.
    __hash__ = str.__hash__

    @property
    def is_compute(self) -> bool:
        """Whether this is a forward, a backward or a part of one, not a transfer."""
        return self in (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)

    @property
    def is_backward(self) -> bool:
        """Whether this computes the gradient of a stage's input: a B or an I."""
        return self in (Op.BACKWARD, Op.BACKWARD_INPUT)

    @property
    def is_send(self) -> bool:
        """Whether this is the sending end of a transfer."""
        return self in (Op.SEND_FORWARD, Op.SEND_BACKWARD)


@dataclass(frozen=True)
class Action:
    """One entry of a program; prints as `0F3`, `1SF0>2`, `2RF0<1` (stage, op, micro-batch, peer).

    - `stage` is global. SF: the stage whose output is sent on. RF: the stage whose input is
      received. SB: the stage whose input gradient is sent back. RB: the stage whose output gradient
      is received.
    - `peer` is the pipeline rank at the other end, for transfers only.
    """

    op: Op
    stage: int
    microbatch: int
    peer: int | None = None

    def __str__(self) -> str:
        arrow = "" if self.peer is None else f"{'>' if self.op.is_send else '<'}{self.peer}"
        return f"{self.stage}{self.op.value}{self.microbatch}{arrow}"


Program = tuple[Action, ...]
Owner = Callable[[int], int]
"""Maps a stage to the pipeline rank that holds it."""


def result(action: Action) -> Action:
    """Name the result of a compute action: the action itself, or B for an I.

    Both give the same input gradient.
    """
    return (
        Action(Op.BACKWARD, action.stage, action.microbatch)
        if action.op is Op.BACKWARD_INPUT
        else action
    )


def dependencies(action: Action, num_stages: int) -> tuple[Action, ...]:
    """Return the results (named by `result`) that the compute action `action` uses, on any rank."""
    stage, microbatch = action.stage, action.microbatch
    if action.op is Op.FORWARD:
        return (Action(Op.FORWARD, stage - 1, microbatch),) if stage else ()
    if action.op is Op.BACKWARD_WEIGHT:
        return (Action(Op.BACKWARD, stage, microbatch),)

    # A backward needs its own forward, and the gradient from the stage after it.
    own = (Action(Op.FORWARD, stage, microbatch),)
    return own if stage == num_stages - 1 else (*own, Action(Op.BACKWARD, stage + 1, microbatch))


def transfer_after(
    action: Action, owner: Owner, num_stages: int
) -> tuple[Action, int, Action] | None:
    """Return (send, receiving rank, receive) for the result of a compute action, or None.

    Neighbouring stages with one owner need no transfer: one pipeline rank, or the turn of a V. Nor
    do weight gradients, which stay where they are.
    """
    if action.op is Op.BACKWARD_WEIGHT:
        return None
    forward = action.op is Op.FORWARD
    target = action.stage + 1 if forward else action.stage - 1
    if not 0 <= target < num_stages or owner(action.stage) == owner(target):
        return None

    send, receive = (
        (Op.SEND_FORWARD, Op.RECV_FORWARD) if forward else (Op.SEND_BACKWARD, Op.RECV_BACKWARD)
    )

    return (
        Action(send, action.stage, action.microbatch, owner(target)),
        owner(target),
        Action(receive, target, action.microbatch, owner(action.stage)),
    )


def counterpart(rank: int, action: Action) -> Action:
    """Return the other end of the transfer `action` of pipeline rank `rank`."""
    op, step = {
        Op.SEND_FORWARD: (Op.RECV_FORWARD, 1),
        Op.RECV_FORWARD: (Op.SEND_FORWARD, -1),
        Op.SEND_BACKWARD: (Op.RECV_BACKWARD, -1),
        Op.RECV_BACKWARD: (Op.SEND_BACKWARD, 1),
    }[action.op]
    return Action(op, action.stage + step, action.microbatch, rank)
